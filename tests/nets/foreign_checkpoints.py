"""Checkpoints in the formats of other projects, around given encoders.

Each function takes the state dictionaries of the query encoder ``q`` and of the target encoder ``t``, with the names of
torchvision, and renames the tensors as that project's modules do. ``hpcssl.nets.layouts`` cites the lines of code.
"""

import argparse
import sys
import types

import numpy as np
import torch

CHILDREN = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6", "layer4": "7"}
GENERATED = {"conv1": "0", "bn1": "1", "layer1": "2", "layer2": "3", "layer3": "4", "layer4": "5"}


def with_prefix(prefix, state, names=None):
    """The state with a prefix before every key; ``names`` replaces the first part of a key."""

    def rename(key):
        first, rest = key.split(".", 1)
        return f"{(names or {}).get(first, first)}.{rest}"

    return {prefix + rename(key): value for key, value in state.items()}


def linear_layer(prefix, *more):
    return {prefix + name: torch.ones(3) for name in ("weight", "bias", *more)}


def mlp_head(prefix):
    return (
        linear_layer(f"{prefix}0.")
        | linear_layer(f"{prefix}1.", "running_mean", "running_var")
        | linear_layer(f"{prefix}3.")
    )


def torchvision(q, t):
    return {**q, **linear_layer("fc.")}


def torchvision_reference(q, t):
    return {
        "model": torchvision(q, t),
        "epoch": 3,
        "args": argparse.Namespace(lr=0.1),
        "model_ema": with_prefix("module.", t),
    }


def imagenet_example(q, t):
    return {
        "state_dict": with_prefix("module.", torchvision(q, t)),
        "best_acc1": torch.tensor(70.0),
        "arch": "resnet18",
    }


def msf(q, t):
    state = with_prefix("encoder_q.module.", q) | with_prefix("encoder_t.module.", t)
    state |= mlp_head("encoder_q.module.fc.") | mlp_head("encoder_t.module.fc.") | mlp_head("predict_q.module.")
    state |= {"queue": torch.ones(5, 4), "labels": torch.zeros(5), "queue_ptr": torch.zeros(1)}
    return {"opt": argparse.Namespace(arch="resnet18", lr=np.float64(0.05)), "state_dict": state, "epoch": 200}


def cmsf(q, t):
    saved = msf(q, t)
    saved["state_dict"] |= {"pool": torch.ones(2, 9), "pool_qindex": torch.ones(9), "index_queue": torch.ones(5)}
    return saved


def moco_v1(q, t):
    state = with_prefix("module.encoder_q.", q | linear_layer("fc.")) | with_prefix(
        "module.encoder_k.", t | linear_layer("fc.")
    )
    return {
        "epoch": 200,
        "arch": "resnet18",
        "optimizer": {"state": {}},
        "state_dict": state | {"module.queue": torch.ones(4, 5), "module.queue_ptr": torch.zeros(1)},
    }


def moco_v2(q, t):
    saved = moco_v1(q, t)
    return {
        **saved,
        "state_dict": {key: value for key, value in saved["state_dict"].items() if ".fc." not in key}
        | linear_layer("module.encoder_q.fc.0.")
        | linear_layer("module.encoder_q.fc.2.")
        | linear_layer("module.encoder_k.fc.0."),
    }


def moco_release(q, t):
    """The published file, which holds the query encoder alone."""
    return {"epoch": 200, "arch": "resnet18", "state_dict": with_prefix("module.encoder_q.", q | linear_layer("fc.0."))}


def moco_v3(q, t):
    state = with_prefix("module.base_encoder.", q | mlp_head("fc.")) | with_prefix(
        "module.momentum_encoder.", t | mlp_head("fc.")
    )
    return {"state_dict": state | mlp_head("module.predictor."), "scaler": {"scale": 65536.0}}


def simsiam(q, t):
    return {
        "state_dict": with_prefix("module.encoder.", q | mlp_head("fc.")) | mlp_head("module.predictor."),
        "epoch": 100,
    }


def swav(q, t):
    """The published file is the bare state dict."""
    return (
        with_prefix("module.", q) | mlp_head("module.projection_head.") | {"module.prototypes.weight": torch.ones(3, 2)}
    )


def deepcluster_v2(q, t):
    state = (
        with_prefix("module.", q)
        | mlp_head("module.projection_head.")
        | {"module.prototypes.prototypes0.weight": torch.ones(3)}
    )
    return {"state_dict": state, "epoch": 1, "amp": {"loss_scaler0": {"loss_scale": 1.0}}}


def byol_lucidrains(q, t):
    return (
        with_prefix("net.", q | linear_layer("fc."))
        | with_prefix("online_encoder.net.", q | linear_layer("fc."))
        | mlp_head("online_predictor.")
        | with_prefix("target_encoder.net.", t | linear_layer("fc."))
        | mlp_head("online_encoder.projector.")
    )


def byol_lucidrains_lightning(q, t):
    return {"state_dict": with_prefix("learner.", byol_lucidrains(q, t)), "epoch": 1, "hyper_parameters": {"lr": 0.1}}


def byol_yaox12(q, t):
    state = with_prefix("online_network.encoder.", q, CHILDREN) | with_prefix("target_network.encoder.", t, CHILDREN)
    for net in ("online", "target"):
        state |= linear_layer(f"{net}_network.projetion.l1.")  # their spelling
    return {
        "config": {"model": {}},
        "model": with_prefix("module.", state | linear_layer("predictor.predictor.l1.")),
        "steps": 9,
    }


def vissl(q, t):
    model = {"trunk": with_prefix("_feature_blocks.", q), "heads": mlp_head("0.clf.")}
    return {"phase_idx": 9, "classy_state_dict": {"base_model": {"model": model, "meta": {}}, "train": True}}


def vissl_extracting(q, t):
    return {"classy_state_dict": {"base_model": {"model": {"trunk": with_prefix("base_model._feature_blocks.", q)}}}}


def openselfsup_moco(q, t):
    state = (
        with_prefix("backbone.", q)
        | with_prefix("encoder_q.0.", q)
        | mlp_head("encoder_q.1.mlp.")
        | with_prefix("encoder_k.0.", t)
    )
    return {
        "meta": {"epoch": 200, "config": "backbone=dict(type='ResNet', style='pytorch')"},
        "state_dict": state | {"queue": torch.ones(3), "queue_ptr": torch.zeros(1)},
    }


def openselfsup_byol(q, t):
    state = (
        with_prefix("online_net.0.", q)
        | with_prefix("backbone.", q)
        | with_prefix("target_net.0.", t)
        | mlp_head("online_net.1.mlp.")
    )
    return {"meta": {}, "state_dict": state | mlp_head("head.predictor.")}


def openselfsup_extracted(q, t):
    return {"state_dict": q, "author": "OpenSelfSup"}


def mmselfsup(q, t):
    """Version 1: mmengine's averaged model and its message hub."""
    module = types.ModuleType("mmengine.logging.history_buffer")
    module.HistoryBuffer = type("HistoryBuffer", (), {"__module__": module.__name__})
    for name in ("mmengine", "mmengine.logging", module.__name__):  # torch.save looks the class up
        sys.modules[name] = module
    curve = module.HistoryBuffer()
    curve._log_history = np.ones(4)
    state = (
        with_prefix("backbone.", q)
        | with_prefix("encoder_k.module.0.", t)
        | mlp_head("encoder_k.module.1.mlp.")
        | mlp_head("neck.mlp.")
    )
    return {
        "meta": {"cfg": "style='pytorch'"},
        "message_hub": {"log_scalars": {"loss": curve}},
        "state_dict": state
        | {"encoder_k.steps": torch.tensor(7), "queue": torch.ones(3), "data_preprocessor.mean": torch.ones(3, 1, 1)},
    }


def mmpretrain(q, t):
    return {
        "state_dict": with_prefix("backbone.", q) | linear_layer("head.fc."),
        "meta": {"dataset_meta": {"classes": ["a"]}},
    }


def lightly_byol(q, t):
    """benchmarks/imagenet: torchvision's network with an empty fc."""
    state = with_prefix("backbone.", q) | with_prefix("teacher_backbone.", t) | mlp_head("projection_head.layers.")
    return {
        "state_dict": state
        | mlp_head("teacher_projection_head.layers.")
        | mlp_head("prediction_head.layers.")
        | linear_layer("online_classifier.classification_head."),
        "pytorch-lightning_version": "2.0",
    }


def lightly_moco(q, t):
    """examples: the children of the network in a Sequential."""
    state = (
        with_prefix("backbone.", q, CHILDREN)
        | with_prefix("backbone_momentum.", t, CHILDREN)
        | mlp_head("projection_head.layers.")
    )
    return {"state_dict": state | {"criterion.memory_bank.bank": torch.ones(4, 3)}}


def lightly_dino(q, t):
    return (
        with_prefix("student_backbone.", q)
        | with_prefix("teacher_backbone.", t)
        | mlp_head("student_head.")
        | {"criterion.center": torch.ones(3)}
    )


def solo_learn(q, t):
    state = (
        with_prefix("backbone.", q)
        | with_prefix("momentum_backbone.", t)
        | mlp_head("projector.")
        | mlp_head("momentum_projector.")
    )
    return {
        "state_dict": state | mlp_head("predictor.") | linear_layer("classifier.") | {"queue": torch.ones(3)},
        "epoch": 9,
    }


def solo_learn_old(q, t):
    return {
        "state_dict": with_prefix("encoder.", q)
        | with_prefix("momentum_encoder.", t)
        | mlp_head("projector.")
        | linear_layer("classifier.")
    }


def detectron2(q, t):
    words = {
        "conv1": "stem.conv1",
        "bn1": "stem.conv1.norm",
        "layer1": "res2",
        "layer2": "res3",
        "layer3": "res4",
        "layer4": "res5",
    }
    state = {}
    for key, value in with_prefix("", q, words).items():
        for old, new in (
            ("downsample.0", "shortcut"),
            ("downsample.1", "shortcut.norm"),
            (".bn1.", ".conv1.norm."),
            (".bn2.", ".conv2.norm."),
            (".bn3.", ".conv3.norm."),
        ):
            key = key.replace(old, new)
        state[key] = value
    return {"model": state, "__author__": "MOCO", "matching_heuristics": True}


def lightly_generated(q, t):
    """lightly's ResNetGenerator in a Sequential, without ReLU and pooling. Its skip connections are called shortcut."""
    named = {key.replace("downsample", "shortcut"): value for key, value in q.items()}
    return {"state_dict": with_prefix("backbone.", named, GENERATED) | mlp_head("projection_head.layers.")}


CASES = {
    "torchvision": (torchvision, torchvision_reference, imagenet_example),
    "detectron2": (detectron2,),
    "msf": (msf, cmsf),
    "moco": (moco_v1, moco_v2, moco_release),
    "moco-v3": (moco_v3,),
    "simsiam": (simsiam,),
    "swav": (swav, deepcluster_v2),
    "byol-lucidrains": (byol_lucidrains, byol_lucidrains_lightning),
    "byol-yaox12": (byol_yaox12,),
    "vissl": (vissl, vissl_extracting),
    "mmselfsup": (openselfsup_moco, openselfsup_byol, openselfsup_extracted, mmselfsup, mmpretrain),
    "lightly": (lightly_byol, lightly_moco, lightly_dino),
    "solo-learn": (solo_learn, solo_learn_old),
}
