"""Where other projects store a ResNet in their checkpoint files: one row per layout, with the code it was read from.

A row says under which keys of the file the state dict lies, which prefixes its encoders have, how its names become
torchvision's, and what else the state dict may hold. ``recognize.py`` applies the rows.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from hpcssl.nets.key_maps import (
    KeyMap,
    keep_names,
    rename_by_position,
    rename_detectron2,
    rename_generator,
    rename_sequential,
)

Normalization = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation per RGB channel, on the scale 0-1."""
IMAGENET: Normalization = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR10: Normalization = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


@dataclass(frozen=True)
class InputSpec:
    """The input that an encoder expects.

    Attributes:
        stem: The encoder's stem (``resnet.Arch``).
        normalization: Mean and standard deviation of the images.
        size: Side of the images in pixels.
    """

    stem: str
    normalization: Normalization
    size: int


@dataclass(frozen=True, kw_only=True)
class CheckpointLayout:
    """How one project stores an encoder.

    Attributes:
        names: Names of the layout for ``--layout``; the first one appears in messages.
        source: Repository, commit and file:line that this row was read from.
        locations: Paths of keys under which the state dict may lie; ``()`` is the file itself.
        encoders: Prefixes of each encoder's keys. The first encoder is the one that the paper evaluates.
        key_maps: How names may become torchvision's.
        other_keys: Pattern of the state dict's other keys, matched after the prefix and after DataParallel's
            ``module.``.
        recognizable: Whether keys alone identify the layout. If False, it must be named.
        imagenet_input: The input of encoders with a 7×7 stem.
        small_input: The input of encoders with a 3×3 stem.
        small_input_by_map: The same for encoders that one of ``key_maps`` reads, where it differs.
        pattern: ``other_keys``, compiled.
    """

    names: tuple[str, ...]
    source: str
    locations: tuple[tuple[str, ...], ...] = (("state_dict",),)
    encoders: dict[str, tuple[str, ...]]
    key_maps: tuple[KeyMap, ...] = (keep_names,)
    other_keys: str = r"fc\."
    recognizable: bool = True
    imagenet_input: InputSpec = InputSpec("imagenet", IMAGENET, 224)
    small_input: InputSpec = InputSpec("small", IMAGENET, 32)
    small_input_by_map: dict[KeyMap, InputSpec] = field(default_factory=dict)
    pattern: re.Pattern[str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "pattern", re.compile(self.other_keys))

    @property
    def name(self) -> str:
        """The first name, which appears in messages."""
        return self.names[0]


_ANYWHERE = ((), ("state_dict",), ("model",))

LAYOUTS: tuple[CheckpointLayout, ...] = (
    CheckpointLayout(
        names=("torchvision", "timm"),
        locations=_ANYWHERE,
        encoders={"online": ("", "module.")},
        source="torchvision 0.29 models/resnet.py:166-206, references/classification/train.py (model); timm 1.0.31 "
        "models/resnet.py (the same keys); moco 132aea9d main_lincls.py:393 and other classifiers (state_dict)",
    ),
    CheckpointLayout(
        names=("detectron2",),
        locations=(("model",),),
        encoders={"online": ("", "backbone.", "backbone.bottom_up.")},
        key_maps=(rename_detectron2,),
        other_keys=r"(stem\.)?fc\.|linear\.|proposal_generator\.|roi_heads\.|pixel_(mean|std)|fpn_",
        source="detectron2 02b5c4e2 tools/convert-torchvision-to-d2.py:43-55",
    ),
    CheckpointLayout(
        names=("moco", "moco-v1", "moco-v2"),
        other_keys=r"fc\.|encoder_[qk]\.|queue",
        encoders={"online": ("module.encoder_q.", "encoder_q."), "target": ("module.encoder_k.", "encoder_k.")},
        source="moco 132aea9d moco/builder.py:41-63, main_moco.py:393, main_lincls.py:254",
    ),
    CheckpointLayout(
        names=("msf", "cmsf"),
        locations=_ANYWHERE,
        # DataParallel wraps each encoder separately; self_supervised/eval_linear.py:102 evaluates encoder_q
        encoders={
            "online": ("encoder_q.module.", "encoder_q.", "module.encoder_q."),
            "target": ("encoder_t.module.", "encoder_t.", "module.encoder_t."),
        },
        other_keys=r"fc\.|encoder_[qt]\.|predict_q\.|mlp_head\.|classifier_q\.|(sup_)?(queue|labels)|gt_labels|"
        r"pseudo_labels|index_queue|pool",
        source="MSF 130191c4 train_msf.py:105-145,385-386; CMSF 7f40a519 "
        "self_supervised/train_cmsf_self.py:94-138,319, semi_supervised/pseudo_cmsf.py:34-104",
    ),
    CheckpointLayout(
        names=("moco-v3",),
        other_keys=r"fc\.|(base|momentum)_encoder\.|predictor\.",
        encoders={
            "online": ("module.base_encoder.", "base_encoder."),
            "target": ("module.momentum_encoder.", "momentum_encoder."),
        },
        source="moco-v3 c349e6e2 moco/builder.py:27-28,101-109, main_moco.py:310-315, main_lincls.py:181",
    ),
    CheckpointLayout(
        names=("simsiam",),
        encoders={"online": ("module.encoder.", "encoder.")},
        other_keys=r"fc\.|predictor\.",
        source="simsiam a7bc1772 simsiam/builder.py:24-36, main_simsiam.py:264, main_lincls.py:173",
    ),
    CheckpointLayout(
        # its extra padding layer plus padding 2 equals torchvision's padding of 3 (src/resnet50.py:157-177)
        names=("swav", "deepcluster-v2"),
        locations=((), ("state_dict",)),
        encoders={"online": ("module.", "")},
        other_keys=r"fc\.|projection_head\.|prototypes\.",
        source="swav 06b1b7cb src/resnet50.py:173-217, main_swav.py:241, eval_linear.py:154-157",
    ),
    CheckpointLayout(
        # the wrapped network is saved twice, as net and as online_encoder.net, with the same tensors
        names=("byol-lucidrains",),
        locations=_ANYWHERE,
        encoders={
            "online": ("online_encoder.net.", "learner.online_encoder.net."),
            "target": ("target_encoder.net.", "learner.target_encoder.net."),
        },
        other_keys=r"fc\.|(learner\.)?(net\.|(online|target)_encoder\.|online_predictor\.)",
        source="byol-pytorch 29931261 byol_pytorch/byol_pytorch.py:165-168,306-334, examples/lightning/train.py:39-44",
    ),
    CheckpointLayout(
        names=("byol-yaox12",),
        locations=(("model",),),
        key_maps=(rename_sequential,),
        encoders={
            "online": ("module.online_network.encoder.", "online_network.encoder."),
            "target": ("module.target_network.encoder.", "target_network.encoder."),
        },
        other_keys=r"(online|target)_network\.|predictor\.",
        source="BYOL-PyTorch edefc01a model/basic_modules.py:28 (children without fc), trainer/byol_trainer.py:129-136",
    ),
    CheckpointLayout(
        # the released file: its names are not published, and its own converter uses the order of its 318 tensors
        names=("byol-yaox12-release",),
        locations=(("online_backbone",),),
        encoders={"online": ("",)},
        key_maps=(keep_names, rename_sequential, rename_by_position),
        source="BYOL-PyTorch edefc01a readme.md:53-56, utils/load_and_convert.py:27-33",
    ),
    CheckpointLayout(
        # DeepMind's weights: torchvision's names with Haiku's SAME padding, which the keys do not show
        names=("byol-jax",),
        locations=((), ("state_dict",)),
        encoders={"online": ("",)},
        recognizable=False,
        imagenet_input=InputSpec("imagenet_same", IMAGENET, 224),
        source="byol-convert (ajtejankar) convert.py:24-110 (online_params), resnet.py:25-45 (padding)",
    ),
    CheckpointLayout(
        # the trunk; a momentum encoder is stored with the loss and not here
        names=("vissl",),
        locations=(("classy_state_dict", "base_model", "model", "trunk"), ("model_state_dict",)),
        encoders={
            "online": (
                "_feature_blocks.",
                "base_model._feature_blocks.",
                "trunk._feature_blocks.",
                "trunk.base_model._feature_blocks.",
            )
        },
        other_keys=r"fc\.|heads\.",
        source="vissl 09270ed2 vissl/models/trunks/resnext.py:144-157, vissl/models/base_ssl_model.py:414-417, "
        "extra_scripts/convert_vissl_to_torchvision.py:44-49",
    ),
    CheckpointLayout(
        names=("mmselfsup", "openselfsup", "mmpretrain"),
        encoders={
            "online": ("backbone.", "module.backbone.", ""),
            "target": (
                "encoder_k.0.",
                "encoder_k.module.0.",
                "target_net.0.",
                "target_net.module.0.",
                "momentum_encoder.module.0.",
            ),
        },
        other_keys=r"fc\.|neck\.|head\.|encoder_[qk]\.|online_net\.|target_net\.|momentum_encoder\.|(point_|memory_)?"
        r"(queue|bank)|feature_bank|data_preprocessor\.|target_generator\.|loss_fn\.",
        source="OpenSelfSup 1db69ece openselfsup/models/moco.py:42-46, byol.py:35-39, "
        "tools/extract_backbone_weights.py:22-27; mmselfsup db861f30 mmselfsup/models/algorithms/base.py:61, "
        "moco.py:65, byol.py:55; mmpretrain ee7f2e88 mmpretrain/models/selfsup/base.py:74",
    ),
    CheckpointLayout(
        # linear_eval.py and knn_eval.py evaluate `backbone`, which is the teacher in its DINO
        names=("lightly",),
        locations=((), ("state_dict",)),
        key_maps=(keep_names, rename_sequential, rename_generator),
        small_input_by_map={rename_generator: InputSpec("small_linear", IMAGENET, 32)},
        encoders={
            "online": ("backbone.", "model.backbone.", "student_backbone."),
            "target": ("backbone_momentum.", "momentum_backbone.", "teacher_backbone."),
        },
        other_keys=r"fc\.|(model\.)?((momentum|student|teacher)_)?(backbone|projection|prediction|head|prototypes|queues?|"
        r"online_classifier|(\w+_)?criterion|memory_bank)",
        source="lightly e8d317fc benchmarks/imagenet/resnet50/byol.py:27-34, dino.py:33-45, "
        "examples/pytorch/byol.py:28-60, lightly/models/resnet.py:162-240, "
        "docs/source/getting_started/benchmarks/cifar10_benchmark.py:298-301",
    ),
    CheckpointLayout(
        # main_linear.py:74-83: `backbone`, in older files `encoder`; CIFAR's stem pads by 2 (methods/base.py:199-202)
        names=("solo-learn",),
        encoders={"online": ("backbone.", "encoder."), "target": ("momentum_backbone.", "momentum_encoder.")},
        small_input=InputSpec("small_pad2", CIFAR10, 32),
        other_keys=r"fc\.|(momentum_)?(projector|predictor|classifier|backbone|encoder|head|prototypes)\d*\.|queue|knn\.|"
        r"dino_loss_func\.|whitening\.",
        source="solo-learn 9187ea39 solo/methods/base.py:191-217,643-653, main_linear.py:74-83, "
        "solo/data/pretrain_dataloader.py:207",
    ),
)
"""All layouts. Where several fit, they must give the same encoder."""

BY_NAME: dict[str, CheckpointLayout] = {name: layout for layout in LAYOUTS for name in layout.names}
"""Every layout by each of its names."""
