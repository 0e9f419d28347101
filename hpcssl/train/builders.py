"""Builders of the objects that a training step uses: method, view plan, encoders and memory bank.

Each takes a checked recipe and refuses, with a ``ConfigError``, combinations of keys from different sections that
cannot work together.
"""

from __future__ import annotations

import torch
from torch import nn

from hpcssl import rng
from hpcssl.distributed.batch_layout import BatchLayout
from hpcssl.distributed.world import World
from hpcssl.errors import ConfigError
from hpcssl.memory.bank import Bank
from hpcssl.memory.columns import ColumnSpec
from hpcssl.methods import METHODS
from hpcssl.methods.base import BankSpec, Method
from hpcssl.nets import heads, norm, resnet
from hpcssl.nets.kernels import selection
from hpcssl.nets.kernels.constants import ZeroPool
from hpcssl.nets.pair import Encoder, EncoderPair
from hpcssl.train.recipe import Recipe
from hpcssl.views import mix
from hpcssl.views.augment import ViewSpec
from hpcssl.views.plan import View, ViewPlan, add_small_crops

_AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def build_method(recipe: Recipe) -> Method:
    """Build the recipe's method with its views; no network is built.

    Raises:
        ConfigError: The method's options or the names of the views' augmentations are not valid.
    """
    _, method_class = METHODS[recipe.method.name]
    method: Method = method_class(recipe.method, recipe.views)
    return method


def build_view_plan(recipe: Recipe, method: Method) -> ViewPlan:
    """Return the method's view plan with the recipe's small crops and mixed views added.

    Raises:
        ConfigError: The augmentation of the small crops is unknown.
    """
    return mix.add_mixed_views(add_small_crops(method.plan, recipe.views), recipe.mix)


def view_spec(number: int, view: View) -> ViewSpec:
    """Describe view ``number`` of a plan to the loader, which decodes and crops it."""
    return ViewSpec(name=f"{number}-{view.augment}", augment=view.augmentation, size=view.size, second=view.second)


def support_view_specs(method: Method, plan: ViewPlan) -> list[ViewSpec]:
    """Return how the images of a bank that is refilled at every step are cropped.

    They are cropped like the target views that the method keeps. The list is empty for methods that keep past
    embeddings instead.
    """
    if method.bank is None or method.bank.push != "refill":
        return []
    return [view_spec(view, plan.views[view]) for view in method.bank.views]


def state_dtype(recipe: Recipe) -> torch.dtype:
    """Return the dtype of weights, embeddings and bank rows: float64 for ``optim.precision=fp64``, else float32."""
    return torch.float64 if recipe.optim.precision == "fp64" else torch.float32


def image_dtype(recipe: Recipe, plan: ViewPlan, fast_views: bool) -> torch.dtype:
    """Return the dtype of augmented images.

    The first convolution rounds images to the type of autocast. The kernels of a GPU write that type at once, which
    gives the same bits and halves what is stored and shuffled; except where images are mixed before.
    """
    if fast_views and not plan.mixed:
        return _AUTOCAST_DTYPES.get(recipe.optim.precision, state_dtype(recipe))
    return state_dtype(recipe)


def build_encoders(
    recipe: Recipe, method: Method, plan: ViewPlan, world: World, layout: BatchLayout, group_size: int
) -> EncoderPair:
    """Build the online encoder with its heads, and the target encoder that the method asks for, in training mode.

    Args:
        recipe: Gives backbone, heads, precision and the seed of the initial weights.
        method: Says which predictor the online encoder has and where targets come from.
        plan: Its views decide whether a second encoder for a second modality is needed.
        world: The processes, and the device that the weights go to.
        layout: How the global batch is split.
        group_size: Samples of the global batch that share batch norm statistics.

    Raises:
        ConfigError: A key of the ``model`` or ``views`` section that this method cannot use, or
            ``machine.kernels=fast`` where the fast kernels cannot be used.
    """
    options = recipe.model
    fast, zeros = selection.use_fast_kernels(recipe.machine.kernels, world), ZeroPool()

    def norm_layer(channels: int, affine: bool = True) -> nn.Module:
        return norm.BatchNorm(
            channels,
            group=group_size,
            world=world,
            momentum=options.norm_momentum,
            affine=affine,
            running=options.norm_running,
            fast=fast,
            zeros=zeros,
        )

    def encoder(prefix: str, second: Encoder | None) -> Encoder:
        backbone = resnet.build(recipe.arch, norm_layer)
        projector = heads.build(resnet.feature_width(backbone), options.projector, norm_layer)
        predictor: nn.Module | None = None
        if method.heads.predictor == "mlp":
            predictor = heads.build(options.projector.out, options.predictor, norm_layer)
        elif method.heads.predictor == "prototypes":
            predictor = heads.Prototypes(options.projector.out, method.heads.prototypes)
        predictor_init = options.predictor.init if method.heads.predictor == "mlp" else "torch"
        for name, network, init in (
            ("backbone", backbone, options.backbone_init),
            ("projector", projector, options.projector.init),
            ("predictor", predictor, predictor_init),
        ):
            if network is not None:
                resnet.initialize(network, recipe.seed, prefix + name, init)
        return Encoder(backbone, projector, predictor, second, options.joint_forward)

    two_modalities = any(view.second for view in plan.views)
    check_model_options(recipe, method, two_modalities)
    online = encoder("", encoder("second.", None) if two_modalities else None).to(world.device, state_dtype(recipe))
    if recipe.machine.channels_last:
        online = online.to(memory_format=torch.channels_last)
    return EncoderPair(
        online, method.target_encoder, world, layout, _AUTOCAST_DTYPES.get(recipe.optim.precision)
    ).train()


def compile_encoders(recipe: Recipe, pair: EncoderPair, world: World, group_size: int) -> bool:
    """Compile the residual blocks of the encoders if ``machine.compile`` asks for it. A collective.

    Returns:
        Whether they are compiled; see ``compiled.compile_blocks``.

    Raises:
        ConfigError: Groups of the norms span processes, so that a block would communicate within compiled code.
    """
    if not recipe.machine.compile:
        return False
    from hpcssl.nets.kernels import compiled  # imports torch's compiler, which takes seconds

    rows = recipe.optim.batch // recipe.machine.accumulation_steps // world.size
    if group_size > rows:
        raise ConfigError(
            "machine.compile",
            got=f"true, with norm groups of {group_size} images over processes of {rows}",
            expected="groups within a process",
            fix=f"set machine.compile=false, or model.norm=ghost model.norm_group_size={rows} or less",
        )
    return compiled.compile_blocks([n for n in (pair.online, pair.target) if n is not None], world)


def check_model_options(recipe: Recipe, method: Method, two_modalities: bool) -> None:
    """Refuse keys of the ``model`` and ``views`` sections that the method cannot use.

    Args:
        recipe: The recipe.
        method: Its method.
        two_modalities: Whether the view plan has views of a second modality.

    Raises:
        ConfigError: Naming the key.
    """
    if two_modalities and recipe.model.joint_forward:
        raise ConfigError(
            "model.joint_forward",
            got="true, with views of two modalities",
            expected="false, since each modality has an encoder of its own",
            fix="set model.joint_forward=false",
        )
    if recipe.model.shuffle_bn and method.target_encoder != "ema":
        raise ConfigError(
            "model.shuffle_bn",
            got=f"true, with method {recipe.method.name}",
            expected="false, unless the targets come from a moving average of the encoder",
            fix="set model.shuffle_bn=false",
        )
    if not two_modalities and (recipe.views.second_query or recipe.views.second_target):
        raise ConfigError(
            "views.second_query, views.second_target",
            got=f"a value, with method {recipe.method.name}",
            expected="no value, since the method has views of one modality",
            fix="leave both out, or set method.name=cmsf method.rule=cross_modal",
        )


def check_bank_size(recipe: Recipe, spec: BankSpec) -> None:
    """Check that the bank can hold a batch, and whole batches where it is refilled in batches.

    Raises:
        ConfigError: ``bank.size`` is smaller than the batch, or no multiple of it where it has to be.
    """
    size, batch = recipe.bank.size, recipe.optim.batch
    if size < batch:
        raise ConfigError(
            "bank.size", got=size, expected=f"at least the batch, {batch}", fix=f"set bank.size={batch} or more"
        )
    if spec.push == "refill" and size % batch:
        raise ConfigError(
            "bank.size",
            got=size,
            expected=f"a multiple of the batch of {batch}, since the bank is refilled in batches at every step",
            fix=f"set bank.size={-(-size // batch) * batch}",
        )


def build_bank(
    recipe: Recipe, spec: BankSpec | None, world: World, layout: BatchLayout, *, fill: bool = True
) -> Bank | None:
    """Build the memory bank that a method asks for, or return None for methods without one.

    Args:
        recipe: Its ``bank`` section gives size, first content and placement.
        spec: The columns that the method keeps.
        world: The processes.
        layout: How the global batch is split.
        fill: Whether to draw its random rows at once; see ``RingBuffer``.

    Raises:
        ConfigError: See ``check_bank_size``.
    """
    if spec is None:
        return None
    check_bank_size(recipe, spec)
    options = recipe.bank
    columns = {"key": ColumnSpec(recipe.model.projector.out), "index": ColumnSpec(), "label": ColumnSpec()}
    columns |= dict.fromkeys(spec.vectors, columns["key"])
    columns |= dict.fromkeys(spec.numbers, ColumnSpec())
    return Bank(
        options.size,
        columns,
        world,
        layout=layout,
        placement=options.placement,
        init=options.init,
        key=rng.key(recipe.seed, "bank"),
        dtype=state_dtype(recipe),
        fill=fill,
        # Certifying the neighbors makes a GPU wait for its host: only for runs that ask for equal bits.
        exact=True if recipe.machine.deterministic else None,
    )
