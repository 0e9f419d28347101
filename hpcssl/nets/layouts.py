"""Where other projects keep a ResNet inside their files: one row per layout, each with the lines it was read from.

A row says under which keys of the file the state dict lies, which prefixes its encoders have (first the one that the
project's own evaluation takes), how its names become torchvision's, and what else the state dict may hold. The rules
that apply a row are in ``importers.py``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache

import torch

from hpcssl.nets import resnet

NAME = re.compile(r"(conv1|bn1|layer[1-4]\.\d+\.(conv[123]|bn[123]|downsample\.[01]))"
                  r"\.(weight|bias|running_mean|running_var|num_batches_tracked)")
"""A torchvision ResNet's own key, without ``fc``."""
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR10 = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)

Form = Callable[[Sequence[str]], dict[str, str]]
"""(keys below the prefix, in the file's order) -> {key: torchvision's name} of those that it understands."""


@dataclass(frozen=True)
class Look:
    """What an encoder expects: its stem, the normalisation on the scale 0-1, and the side of the image in pixels."""

    stem: str
    colours: tuple[tuple[float, ...], tuple[float, ...]]
    size: int


def _each(rename: Callable[[str], str]) -> Form:
    return lambda keys: {key: name for key in keys if NAME.fullmatch(name := rename(key))}


def _children(**modules: str) -> Form:
    """Names of an ``nn.Sequential`` made of a ResNet's children: their numbers become the children's names."""
    known = {number.removeprefix("_"): name for number, name in modules.items()}

    def rename(key: str) -> str:
        number, dot, rest = key.partition(".")
        return known.get(number, number) + dot + rest.replace("shortcut.", "downsample.")
    return _each(rename)


def to_detectron2(name: str) -> str:
    """Detectron2's key of a torchvision ResNet's (tools/convert-torchvision-to-d2.py:43-52 at 02b5c4e2)."""
    name = name if name.startswith("layer") else f"stem.{name}"
    name = re.sub(r"layer(\d)", lambda m: f"res{int(m[1]) + 1}", name)
    name = re.sub(r"\bbn(\d)", r"conv\1.norm", name)
    return name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")


def _from_detectron2(key: str) -> str:
    key = key.removeprefix("stem.").replace("shortcut.norm", "downsample.1").replace("shortcut", "downsample.0")
    key = re.sub(r"\bconv(\d)\.norm", r"bn\1", key)
    return re.sub(r"^res(\d)", lambda m: f"layer{int(m[1]) - 1}", key)


def _in_order(keys: Sequence[str]) -> dict[str, str]:
    """Names by their place, for a file whose own are unknown: ResNet-50's order, and each key's last word must agree.
    """
    names = _names()
    if len(keys) != len(names):
        return {}
    pairs = dict(zip(keys, names, strict=True))
    return pairs if all(key.rpartition(".")[2] == name.rpartition(".")[2] for key, name in pairs.items()) else {}


@cache
def _names() -> list[str]:
    with torch.device("meta"):
        return list(resnet.build(resnet.Arch()).state_dict())


PLAIN: Form = _each(lambda key: key)
SEQUENTIAL: Form = _children(_0="conv1", _1="bn1", _4="layer1", _5="layer2", _6="layer3", _7="layer4")
GENERATOR: Form = _children(_0="conv1", _1="bn1", _2="layer1", _3="layer2", _4="layer3", _5="layer4")
"""lightly's ResNetGenerator. Its ReLU is no child, so that the Sequential trains and evaluates without the stem's."""
DETECTRON2: Form = _each(_from_detectron2)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One project's file.

    ``at``: the keys under which its state dict may lie, ``()`` being the file itself. ``encoders``: their prefixes;
    the first is the one the paper evaluates. ``beside``: a pattern of the other keys, matched after the prefix and
    after DataParallel's ``module.``. ``known`` False: the keys do not tell it from others, so it must be named.
    ``large`` and ``small``: what goes with a 7×7 and with a 3×3 stem, the latter also by form.
    ``read``: repository, commit, file:line.
    """

    names: tuple[str, ...]
    read: str
    at: tuple[tuple[str, ...], ...] = (("state_dict",),)
    encoders: dict[str, tuple[str, ...]]
    forms: tuple[Form, ...] = (PLAIN,)
    beside: str = r"fc\."
    known: bool = True
    large: Look = Look("imagenet", IMAGENET, 224)
    small: Look = Look("small", IMAGENET, 32)
    small_by: dict[Form, Look] = field(default_factory=dict)
    pattern: re.Pattern = field(init=False, repr=False)

    def __post_init__(self):
        object.__setattr__(self, "pattern", re.compile(self.beside))

    @property
    def name(self) -> str:
        return self.names[0]


ANYWHERE = ((), ("state_dict",), ("model",))

LAYOUTS = (
    Layout(
        names=("torchvision", "timm"), at=ANYWHERE, encoders={"online": ("", "module.")},
        read="torchvision 0.29 models/resnet.py:166-206, references/classification/train.py (model); timm 1.0.31 "
             "models/resnet.py (the same keys); moco 132aea9d main_lincls.py:393 and other classifiers (state_dict)"),
    Layout(
        names=("detectron2",), at=(("model",),), encoders={"online": ("", "backbone.", "backbone.bottom_up.")},
        forms=(DETECTRON2,), beside=r"(stem\.)?fc\.|linear\.|proposal_generator\.|roi_heads\.|pixel_(mean|std)|fpn_",
        read="detectron2 02b5c4e2 tools/convert-torchvision-to-d2.py:43-55"),
    Layout(
        names=("moco", "moco-v1", "moco-v2"), beside=r"fc\.|encoder_[qk]\.|queue",
        encoders={"online": ("module.encoder_q.", "encoder_q."), "target": ("module.encoder_k.", "encoder_k.")},
        read="moco 132aea9d moco/builder.py:41-63, main_moco.py:393, main_lincls.py:254"),
    Layout(
        names=("msf", "cmsf"), at=ANYWHERE,
        # DataParallel wraps each encoder on its own; self_supervised/eval_linear.py:102 takes encoder_q
        encoders={"online": ("encoder_q.module.", "encoder_q.", "module.encoder_q."),
                  "target": ("encoder_t.module.", "encoder_t.", "module.encoder_t.")},
        beside=r"fc\.|encoder_[qt]\.|predict_q\.|mlp_head\.|classifier_q\.|(sup_)?(queue|labels)|gt_labels|"
               r"pseudo_labels|index_queue|pool",
        read="MSF 130191c4 train_msf.py:105-145,385-386; CMSF 7f40a519 self_supervised/train_cmsf_self.py:94-138,319, "
             "semi_supervised/pseudo_cmsf.py:34-104"),
    Layout(
        names=("moco-v3",), beside=r"fc\.|(base|momentum)_encoder\.|predictor\.",
        encoders={"online": ("module.base_encoder.", "base_encoder."),
                  "target": ("module.momentum_encoder.", "momentum_encoder.")},
        read="moco-v3 c349e6e2 moco/builder.py:27-28,101-109, main_moco.py:310-315, main_lincls.py:181"),
    Layout(
        names=("simsiam",), encoders={"online": ("module.encoder.", "encoder.")}, beside=r"fc\.|predictor\.",
        read="simsiam a7bc1772 simsiam/builder.py:24-36, main_simsiam.py:264, main_lincls.py:173"),
    Layout(
        # its extra padding layer plus padding 2 is torchvision's 3 (src/resnet50.py:157-177)
        names=("swav", "deepcluster-v2"), at=((), ("state_dict",)), encoders={"online": ("module.", "")},
        beside=r"fc\.|projection_head\.|prototypes\.",
        read="swav 06b1b7cb src/resnet50.py:173-217, main_swav.py:241, eval_linear.py:154-157"),
    Layout(
        # the wrapped network is saved twice, as net and as online_encoder.net: one set of tensors
        names=("byol-lucidrains",), at=ANYWHERE,
        encoders={"online": ("online_encoder.net.", "learner.online_encoder.net."),
                  "target": ("target_encoder.net.", "learner.target_encoder.net.")},
        beside=r"fc\.|(learner\.)?(net\.|(online|target)_encoder\.|online_predictor\.)",
        read="byol-pytorch 29931261 byol_pytorch/byol_pytorch.py:165-168,306-334, examples/lightning/train.py:39-44"),
    Layout(
        names=("byol-yaox12",), at=(("model",),), forms=(SEQUENTIAL,),
        encoders={"online": ("module.online_network.encoder.", "online_network.encoder."),
                  "target": ("module.target_network.encoder.", "target_network.encoder.")},
        beside=r"(online|target)_network\.|predictor\.",
        read="BYOL-PyTorch edefc01a model/basic_modules.py:28 (children without fc), trainer/byol_trainer.py:129-136"),
    Layout(
        # the released file: its names are not published, its own converter goes by the order of its 318 tensors
        names=("byol-yaox12-release",), at=(("online_backbone",),), encoders={"online": ("",)},
        forms=(PLAIN, SEQUENTIAL, _in_order),
        read="BYOL-PyTorch edefc01a readme.md:53-56, utils/load_and_convert.py:27-33"),
    Layout(
        # DeepMind's weights: torchvision's names over Haiku's SAME padding, which the keys do not show
        names=("byol-jax",), at=((), ("state_dict",)), encoders={"online": ("",)}, known=False,
        large=Look("imagenet_same", IMAGENET, 224),
        read="byol-convert (ajtejankar) convert.py:24-110 (online_params), resnet.py:25-45 (padding)"),
    Layout(
        # the trunk; a momentum encoder, where there is one, lies with the loss and not here
        names=("vissl",), at=(("classy_state_dict", "base_model", "model", "trunk"), ("model_state_dict",)),
        encoders={"online": ("_feature_blocks.", "base_model._feature_blocks.", "trunk._feature_blocks.",
                             "trunk.base_model._feature_blocks.")},
        beside=r"fc\.|heads\.",
        read="vissl 09270ed2 vissl/models/trunks/resnext.py:144-157, vissl/models/base_ssl_model.py:414-417, "
             "extra_scripts/convert_vissl_to_torchvision.py:44-49"),
    Layout(
        names=("mmselfsup", "openselfsup", "mmpretrain"),
        encoders={"online": ("backbone.", "module.backbone.", ""),
                  "target": ("encoder_k.0.", "encoder_k.module.0.", "target_net.0.", "target_net.module.0.",
                             "momentum_encoder.module.0.")},
        beside=r"fc\.|neck\.|head\.|encoder_[qk]\.|online_net\.|target_net\.|momentum_encoder\.|(point_|memory_)?"
               r"(queue|bank)|feature_bank|data_preprocessor\.|target_generator\.|loss_fn\.",
        read="OpenSelfSup 1db69ece openselfsup/models/moco.py:42-46, byol.py:35-39, "
             "tools/extract_backbone_weights.py:22-27; mmselfsup db861f30 mmselfsup/models/algorithms/base.py:61, "
             "moco.py:65, byol.py:55; mmpretrain ee7f2e88 mmpretrain/models/selfsup/base.py:74"),
    Layout(
        # linear_eval.py and knn_eval.py take `backbone`, which in its DINO is the teacher
        names=("lightly",), at=((), ("state_dict",)), forms=(PLAIN, SEQUENTIAL, GENERATOR),
        small_by={GENERATOR: Look("small_linear", IMAGENET, 32)},
        encoders={"online": ("backbone.", "model.backbone.", "student_backbone."),
                  "target": ("backbone_momentum.", "momentum_backbone.", "teacher_backbone.")},
        beside=r"fc\.|(model\.)?((momentum|student|teacher)_)?(backbone|projection|prediction|head|prototypes|queues?|"
               r"online_classifier|(\w+_)?criterion|memory_bank)",
        read="lightly e8d317fc benchmarks/imagenet/resnet50/byol.py:27-34, dino.py:33-45, "
             "examples/pytorch/byol.py:28-60, lightly/models/resnet.py:162-240, "
             "docs/source/getting_started/benchmarks/cifar10_benchmark.py:298-301"),
    Layout(
        # main_linear.py:74-83: `backbone`, in older files `encoder`; CIFAR's stem pads by 2 (methods/base.py:199-202)
        names=("solo-learn",), encoders={"online": ("backbone.", "encoder."),
                                         "target": ("momentum_backbone.", "momentum_encoder.")},
        small=Look("small_pad2", CIFAR10, 32),
        beside=r"fc\.|(momentum_)?(projector|predictor|classifier|backbone|encoder|head|prototypes)\d*\.|queue|knn\.|"
               r"dino_loss_func\.|whitening\.",
        read="solo-learn 9187ea39 solo/methods/base.py:191-217,643-653, main_linear.py:74-83, "
             "solo/data/pretrain_dataloader.py:207"),
)

BY_NAME = {name: layout for layout in LAYOUTS for name in layout.names}
