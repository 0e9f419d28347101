"""Keys of a recipe whose valid values depend on other keys. They are checked where a recipe is composed.

A recorded recipe is not checked again: a run that exists goes on. docs/reference/checks.md lists all dependencies.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from hpcssl import config
from hpcssl.errors import ConfigError, require_choice
from hpcssl.memory import ring_buffer
from hpcssl.nets import resnet
from hpcssl.views.augment import AUGMENTATIONS

if TYPE_CHECKING:
    from hpcssl.train.recipe import Recipe

Rule = tuple[str, bool, str, str]
"""A key, whether its value can be used, what is expected, and a fix."""


def check_dependencies(recipe: Recipe) -> None:
    """Refuse values that other values of the recipe rule out.

    Raises:
        ConfigError: Naming the first such key.
    """
    require_choice("bank.placement", recipe.bank.placement, ring_buffer.PLACEMENTS)
    require_choice("bank.init", recipe.bank.init, ring_buffer.INITS)
    require_choice("views.crops.augment", recipe.views.crops.augment, ("", *AUGMENTATIONS))
    for rules in (_neighbor_rules, _view_rules, _model_rules, _schedule_rules, _machine_rules):
        for key, holds, expected, fix in rules(recipe):
            if not holds:
                raise ConfigError(key, got=config.lookup(recipe, key), expected=expected, fix=fix)


def _neighbor_rules(recipe: Recipe) -> Iterator[Rule]:
    """More neighbors than rows would be the whole bank: every query is then trained towards the same point."""
    method, size = recipe.method, recipe.bank.size
    keys = []
    if method.name in ("msf", "cmsf"):
        keys.append("method.k")
    if method.name == "cmsf" and method.rule in ("two_queues", "cross_modal"):
        keys.append("method.k_constraint")
    if method.name in ("nnclr", "nnsiam") and method.neighbors.rule != "self":
        keys.append("method.neighbors.k")
    for key in keys:
        fix = f"set {key}={min(size, 1 if key == 'method.neighbors.k' else 5)}"
        yield key, config.lookup(recipe, key) <= size, f"at most the rows of the memory bank, bank.size={size}", fix


def _view_rules(recipe: Recipe) -> Iterator[Rule]:
    views, crops, stride = recipe.views, recipe.views.crops, resnet.total_stride(recipe.arch)
    reason = f"the stride of {recipe.model.arch} with model.stem={recipe.model.stem}"
    yield "views.size", views.size >= stride, f"{stride} pixels or more, {reason}", f"set views.size={stride} or more"
    if crops.count:
        fix = f"set views.crops.size={max(stride, views.size // 2)}"
        yield "views.crops.size", crops.size >= stride, f"{stride} pixels or more, {reason}", fix
        expected = f"at most the size of the large views, views.size={views.size}"
        yield "views.crops.size", crops.size <= views.size, expected, fix
    fix = "set views.mean=[0.5,0.5,0.5]"
    yield "views.mean", all(0 <= x <= 1 for x in views.mean), "numbers on the scale 0-1 (divide those of 0-255)", fix
    fix = "set views.std=[0.5,0.5,0.5]"
    yield "views.std", all(0 < x <= 1 for x in views.std), "numbers above 0, up to 1 (divide those of 0-255)", fix


def _model_rules(recipe: Recipe) -> Iterator[Rule]:
    model = recipe.model
    yield "model.norm_momentum", 0 < model.norm_momentum <= 1, "above 0, up to 1", "set model.norm_momentum=0.1"
    for key in ("model.projector", "model.predictor"):
        head = config.lookup(recipe, key)
        yield f"{key}.hidden", all(n >= 1 for n in head.hidden), "widths of 1 or more", f"set {key}.hidden=[512]"
        yield f"{key}.out", head.out >= 1, "1 or more", f"set {key}.out=128"


def _schedule_rules(recipe: Recipe) -> Iterator[Rule]:
    schedule, peak = recipe.schedule, recipe.optim.lr
    for name in ("warmup_lr", "final_lr"):
        key, holds = f"schedule.{name}", getattr(schedule, name) <= peak
        yield key, holds, f"at most the peak rate, optim.lr={peak:g}", f"set {key}=0"
    if schedule.epochs is not None:
        length = schedule.epochs
        yield (
            "schedule.milestones",
            all(milestone < length for milestone in schedule.milestones),
            f"epochs before the end of the run, schedule.epochs={length}",
            _drop_milestones(schedule.milestones, length),
        )


def _drop_milestones(milestones: list[int], length: int) -> str:
    kept = ",".join(str(milestone) for milestone in milestones if milestone < length)
    return f"set schedule.milestones=[{kept}]" + ("" if kept else " schedule.shape=constant")


def _machine_rules(recipe: Recipe) -> Iterator[Rule]:
    machine = recipe.machine
    for name in ("threads", "checkpoint_steps", "checkpoint_minutes", "keep_every_steps", "export_epochs"):
        key, value = f"machine.{name}", getattr(machine, name)
        yield key, 0 <= value < math.inf, "0 or more", f"set {key}=0"
    holds = 0 < machine.timeout_minutes < math.inf
    yield "machine.timeout_minutes", holds, "minutes above 0", "set machine.timeout_minutes=30"
    holds = machine.kernels != "fast" or machine.devices != "cpu"
    yield "machine.kernels", holds, "auto or plain with machine.devices=cpu", "set machine.kernels=auto"
    if machine.fused == "apex":
        kind, precision, fix = recipe.optim.name, recipe.optim.precision, "set machine.fused=torch"
        yield "machine.fused", kind == "sgd", f"torch with optim.name={kind}: apex has SGD alone", fix
        yield "machine.fused", precision != "fp64", "torch with optim.precision=fp64", fix
        yield "machine.fused", machine.devices != "cpu", "torch with machine.devices=cpu", fix
    if machine.keep_every_steps:
        every = machine.checkpoint_steps
        yield (
            "machine.keep_every_steps",
            every > 0 and machine.keep_every_steps % every == 0,
            f"a multiple of machine.checkpoint_steps={every}" if every else "machine.checkpoint_steps with it",
            f"set machine.checkpoint_steps={machine.keep_every_steps}",
        )
