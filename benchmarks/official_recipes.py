"""Packaged recipes as shipped, next to the training code of their authors.

Only sizes are changed: a small backbone and small heads, 32 images per step, a bank of 64, and groups of the norms in
proportion. Rates are those that the recipe has at its own batch. Augmentations are not
compared: both sides get the same tensors.

Beside the clones of ``official_methods``, folders of these are needed: open-mmlab-OpenSelfSup at the parent of 34a5455
(it has the config of BYOL), open-mmlab-mmcv at v1.0.5, and NVIDIA-apex at a commit that has apex/parallel/LARC.py. The
main branch of facebookresearch-moco is empty now; 7397dfe has the code.
"""

from __future__ import annotations

import runpy
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from benchmarks import official_methods as methods
from benchmarks.official_code import Clone, OfficialRun, StandIn, stub
from benchmarks.official_methods import BEFORE, EMA, PURITY, TIES, Case
from hpcssl.optim.build import batch_factor
from hpcssl.train import recipe
from hpcssl.train.train_state import TrainState

RECIPE_STEPS_PER_EPOCH = 2
"""Steps per epoch: few, so that a comparison of 30 steps reaches beyond a warm-up of ten epochs."""
BATCH, BANK = 32, 64


def shrink(name: str) -> list[str]:
    """Return the overrides that make a packaged recipe small and leave its rates as they are."""
    shipped = recipe.compose(name)
    factor = batch_factor(shipped.optim, shipped.optim.batch)
    overrides = [
        "model.arch=resnet_tiny",
        "model.stem=small",
        "views.size=16",
        "views.crops.size=8",
        f"optim.batch={BATCH}",
        "optim.lr_scaling=none",
        f"optim.lr={shipped.optim.lr * factor!r}",
        f"schedule.warmup_lr={shipped.schedule.warmup_lr * factor!r}",
        f"schedule.final_lr={shipped.schedule.final_lr * factor!r}",
        f"bank.size={BANK}",
        "machine.channels_last=false",
        "model.projector.out=32",
        "model.predictor.out=32",
    ]
    if shipped.model.norm == "ghost":
        group = shipped.model.norm_group_size * BATCH // shipped.optim.batch
        overrides.append(f"model.norm_group_size={max(2, group)}")
    return overrides


# -- OpenSelfSup ------------------------------------------------------------------------------------------------------


class _Features(nn.Module):
    """Our small backbone with the interface of a backbone of OpenSelfSup: a list with one map of features."""

    def __init__(self, **_):
        super().__init__()
        self.body = StandIn().body

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.body(x)[:, :, None, None]]

    def init_weights(self, **_) -> None:
        pass


class _AnyBatchNorm(nn.BatchNorm2d):
    """In place of SyncBatchNorm, which refuses tensors of a CPU: one process has the whole batch."""

    def _check_input_dim(self, x: Tensor) -> None:
        pass

    def _specify_ddp_gpu_num(self, _count: int) -> None:
        pass


def _build(cfg: dict, registry: object, default_args: dict | None = None) -> object:
    options = (default_args or {}) | cfg
    return registry.get(options.pop("type"))(**options)


def _load(clone: Clone) -> SimpleNamespace:
    """Load models, optimizer and hooks of OpenSelfSup, and the schedule of mmcv; stubs are in place of the rest."""
    mmcv = Clone(clone.root.parent / "open-mmlab-mmcv")
    weights = mmcv.load("mmcv/cnn/utils/weight_init.py")
    registry_of_mmcv = SimpleNamespace(register_module=lambda *_, **__: lambda cls: cls)
    hook = mmcv.load("mmcv/runner/hooks/hook.py", stubs=_stubs("mmcv", utils={"Registry": lambda _: registry_of_mmcv}))
    nothing = dict.fromkeys(("MMDataParallel", "MMDistributedDataParallel", "is_module_wrapper"))
    stubs = _stubs(
        "mmcv",
        cnn=vars(weights),
        parallel=nothing | {"is_module_wrapper": lambda _: True},
        runner=dict.fromkeys(("DistSamplerSeedHook", "Runner", "obj_from_dict", "OptimizerHook")) | {"Hook": hook.Hook},
    )
    registry = clone.load("openselfsup/utils/registry.py", stubs=stubs)
    optimizers = clone.load("openselfsup/utils/optimizers.py")
    utils = {
        "Registry": registry.Registry,
        "build_from_cfg": _build,
        "print_log": lambda *_, **__: None,
        "get_root_logger": None,
        "optimizers": optimizers,
    }
    root = clone.root / "openselfsup"
    gather = clone.load("openselfsup/models/utils/gather_layer.py")
    norms = clone.load("openselfsup/models/utils/norm.py")
    norms.norm_cfg["SyncBN"] = ("bn", _AnyBatchNorm)
    stubs |= _stubs("openselfsup", utils=utils, datasets={"build_dataloader": None}, models={}, hooks={})
    stubs["openselfsup.models"].__path__ = [str(root / "models")]
    stubs["openselfsup.models.heads"] = stub("openselfsup.models.heads", __path__=[str(root / "models/heads")])
    stubs["openselfsup.models.utils"] = stub(
        "openselfsup.models.utils", GatherLayer=gather.GatherLayer, build_norm_layer=norms.build_norm_layer
    )
    found = SimpleNamespace()
    hooks = SimpleNamespace(HOOKS=SimpleNamespace(register_module=lambda cls: cls))
    stubs["openselfsup.hooks.registry"] = stub("openselfsup.hooks.registry", **vars(hooks))
    stubs["openselfsup.hooks"].__dict__.update(__path__=[], build_hook=None, DistOptimizerHook=None)
    found.models = clone.load_package(
        "openselfsup.models",
        ("registry", "builder", "necks", "heads.contrastive_head", "heads.latent_pred_head", "simclr", "byol"),
        stubs=stubs,
    )
    found.models["registry"].BACKBONES.get = {"ResNet": _Features}.get
    found.build_optimizer = clone.load("openselfsup/apis/train.py", stubs=stubs).build_optimizer
    found.byol_hook = clone.load_package("openselfsup.hooks", ("byol_hook",), stubs=stubs)["byol_hook"].BYOLHook
    found.rates = mmcv.load_package(
        "mmcv.runner.hooks",
        ("lr_updater",),
        stubs=_stubs("mmcv") | {"mmcv.runner.hooks.hook": stub("mmcv.runner.hooks.hook", **vars(hook))},
    )["lr_updater"].CosineAnnealingLrUpdaterHook
    clone.digests.update(mmcv.digests)
    return found


def _stubs(package: str, **modules: dict) -> dict:
    """Return stubs of a package and of modules in it."""
    found = {f"{package}.{name}": stub(f"{package}.{name}", **attributes) for name, attributes in modules.items()}
    return {package: stub(package, __path__=[], **{name: found[f"{package}.{name}"] for name in modules})} | found


def _open_self_sup(clone: Clone, training: TrainState, config_file: str, names: dict, slow: dict, more) -> OfficialRun:
    """Return a run from a config file: its model, optimizer, schedule and hooks, stepped as mmcv's Runner does.

    Args:
        clone: The clone of OpenSelfSup.
        training: Our run.
        config_file: The config, of which only widths, the batch's scale and the number of epochs are changed.
        names: Our prefixes of the parameters of the trained network, and theirs.
        slow: The same for the moving average.
        more: (model, loaded code) -> factor of the gradients, and further hooks.
    """
    code, ours = _load(clone), training.recipe
    config = runpy.run_path(str(clone.root / config_file))
    width = ours.model.projector
    sizes = {"in_channels": 128, "hid_channels": width.hidden[0], "out_channels": width.out}
    settings = config["model"]
    settings["neck"] |= sizes
    if "predictor" in settings["head"]:
        settings["head"]["predictor"] |= sizes | {"in_channels": width.out}
    model = _build(settings, code.models["registry"].MODELS)
    optimizer = code.build_optimizer(model, _ModelOptimizer(config["optimizer"]))
    factor, hooks = more(model, code)
    options = dict(config["lr_config"])
    options.pop("policy")
    runner = SimpleNamespace(
        model=SimpleNamespace(module=model),
        optimizer=optimizer,
        iter=0,
        epoch=0,
        max_epochs=config["total_epochs"],
        max_iters=config["total_epochs"] * training.steps_per_epoch,
        data_loader=range(training.steps_per_epoch),
    )
    hooks = [code.rates(**options), *hooks]
    hooks[0].before_run(runner)

    def epoch(number, loader):
        runner.epoch = number
        for hook in hooks:
            hook.before_train_epoch(runner)
        for images in loader:
            for hook in hooks:
                hook.before_train_iter(runner)
            loss = model(images)["loss"]
            optimizer.zero_grad()
            loss.backward()
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(factor)
            optimizer.step()
            for hook in hooks:
                hook.after_train_iter(runner)
            runner.iter += 1

    return OfficialRun(model, epoch, lambda batch: torch.stack(batch.images, 1), names, slow)


class _ModelOptimizer(dict):
    """The options of an optimizer, which ``build_optimizer`` copies."""

    def copy(self) -> dict:
        return dict(self)


def simclr(clone: Clone, training: TrainState, _order: Tensor) -> OfficialRun:
    names = {
        "backbone.": "backbone.body.",
        "projector.0.": "neck.fc0.",
        "projector.1.": "neck.bn0.",
        "projector.3.": "neck.fc1.",
        "projector.4.": "neck.bn1.",
    }
    return _open_self_sup(
        clone, training, "configs/selfsup/simclr/r50_bs256_ep200.py", names, {}, lambda *_: (1 / 8, [])
    )


def byol(clone: Clone, training: TrainState, _order: Tensor) -> OfficialRun:
    def more(model: nn.Module, code: SimpleNamespace) -> tuple[float, list]:
        methods.split(training, model.online_net, model.target_net, model.head.predictor)
        return 1.0, [code.byol_hook(end_momentum=1.0)]

    names = {
        "backbone.": "online_net.0.body.",
        "projector.": "online_net.1.mlp.",
        "predictor.": "head.predictor.mlp.",
    }
    slow = {"backbone.": "target_net.0.body.", "projector.": "target_net.1.mlp."}
    side = _open_self_sup(clone, training, "configs/selfsup/byol/r50_bs4096_ep200.py", names, slow, more)
    side.loss_offset, side.average_after_step = 4.0, True
    return side


# -- the recipes ------------------------------------------------------------------------------------------------------

MSF_HEADS = ("model.projector.hidden=[256]", "model.predictor.hidden=[256]")
GPUS = "parts of the batch pass its networks one after the other, in place of several GPUs"
OSS = (
    "a commit that has the config: the parent of 34a5455",
    "mmcv 1.0.5, whose Runner is replaced by the loop over its hooks",
    "SyncBN of one process is plain batch norm",
)
RECIPES = {
    "msf_r50_ep200_128k": Case("", MSF_HEADS, "UMBCvision-MSF", methods.msf, (EMA, GPUS)),
    "cmsf_2q_r50_ep200_128k": Case("", MSF_HEADS, "UCDvision-CMSF", methods.two_queues, (EMA, BEFORE, GPUS)),
    "cmsf_km_r50_ep200_128k": Case(
        "",
        (*MSF_HEADS, "method.num_clusters=12"),
        "UMBCvision-CMSF",
        methods.clusters,
        (EMA, TIES, PURITY, GPUS, "its constructor names an undefined class: an alias is provided", "faiss on a CPU"),
    ),
    "cmsf_sup_r50_ep200": Case("", MSF_HEADS, "UCDvision-CMSF", methods.sup, (EMA, TIES, GPUS)),
    "cmsf_semi_r50_ep200": Case(
        "",
        (
            *MSF_HEADS,
            "method.pseudo_labels.labeled_fraction=0.5",
            "method.pseudo_labels.batch=16",
            "method.pseudo_labels.hidden=64",
            "method.pseudo_labels.threshold=0.3",
        ),
        "UCDvision-CMSF",
        methods.semi,
        (EMA, TIES, GPUS, "labels of half of the images, and a lower threshold, so that predictions count"),
    ),
    "moco_v2_r50_ep200": Case(
        "", ("model.projector.hidden=[128]",), "facebookresearch-moco", methods.moco, (EMA, GPUS)
    ),
    "simsiam_r50_ep100": Case(
        "",
        ("model.projector.hidden=[128,128]", "model.predictor.hidden=[16]"),
        "facebookresearch-simsiam",
        methods.simsiam,
        ("the untrained bias before its last norm is 0: it only shifts the running mean of that norm",),
    ),
    "swav_r50_ep100_mc": Case(
        "",
        ("model.projector.hidden=[64]", "method.prototypes=24", "method.freeze_steps=3"),
        "facebookresearch-swav",
        methods.swav,
        (GPUS, "its rates, which its main function computes, are computed here"),
        ("NVIDIA-apex",),
    ),
    "simclr_r50_ep200": Case(
        "",
        ("model.projector.hidden=[64]",),
        "open-mmlab-OpenSelfSup",
        simclr,
        (*OSS, "gradients of one process are divided by 8, as its gather does on 8 GPUs"),
        ("open-mmlab-mmcv",),
    ),
    "byol_r50_ep200": Case(
        "",
        # two images per group, as on 32 GPUs, would make rounding grow tenfold in every step
        ("model.projector.hidden=[64]", "model.predictor.hidden=[64]", "model.norm_group_size=16"),
        "open-mmlab-OpenSelfSup",
        byol,
        (
            *OSS,
            GPUS,
            "two GPUs in place of 32",
            "our loss, a sum of two squared distances, is its -2 cos - 2 cos plus 4",
        ),
        ("open-mmlab-mmcv",),
    ),
}
"""Packaged recipes whose original has public code."""
