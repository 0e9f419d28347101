"""Checks of a recipe's values that hold for every data set, device and number of processes.

They are made whenever a recipe is composed or read from a run folder; ``dependencies`` has those for new runs only.
Option classes check their own keys when they are made. Here are the checks of sections whose classes have none.
``world_sizes`` checks the number of processes.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from hpcssl.data.address import check_address, check_stage_dir, is_remote
from hpcssl.data.native import selection as decoders
from hpcssl.distributed import kernel_choice
from hpcssl.errors import ConfigError, require_choice
from hpcssl.nets import norm, resnet
from hpcssl.optim import apex_sgd
from hpcssl.optim.schedule import total_steps
from hpcssl.train.options import DataOptions, MachineOptions

if TYPE_CHECKING:
    from hpcssl.train.recipe import Recipe

DEVICES = ("auto", "cpu", "gpu")
VERIFY = ("sizes", "sha256")
CHANGED = ("refuse", "warn")


def check_values(recipe: Recipe) -> None:
    """Refuse values that no number of processes, data set or device could make valid.

    Raises:
        ConfigError: Naming the first such key.
    """
    require_choice("model.norm", recipe.model.norm, norm.SCOPES)
    require_choice("model.norm_running", recipe.model.norm_running, norm.RUNNING)
    require_choice("model.stem", recipe.model.stem, resnet.STEMS)
    require_choice("model.arch", recipe.model.arch, resnet.ARCH_NAMES)
    require_choice("model.backbone_init", recipe.model.backbone_init, resnet.INITS[:2])
    _check_minimum("optim.batch", recipe.optim.batch, 2)
    _check_minimum("views.size", recipe.views.size, 8)
    _check_minimum("bank.size", recipe.bank.size, 1)
    _check_machine(recipe.machine)
    _check_data(recipe.data)
    if recipe.model.norm == "ghost" and recipe.model.norm_group_size < 2:
        raise ConfigError(
            "model.norm_group_size",
            got=recipe.model.norm_group_size,
            expected="2 or more samples per group, for model.norm=ghost",
            fix="set model.norm_group_size, for example to 64",
        )
    # A length is set, and there is a data set for which it is longer than the warm-up.
    total_steps(recipe.schedule, 1 if recipe.schedule.steps else 10**9)
    if recipe.optim.batch % recipe.machine.accumulation_steps:
        raise ConfigError(
            "machine.accumulation_steps",
            got=recipe.machine.accumulation_steps,
            expected=f"a divisor of optim.batch={recipe.optim.batch}",
            fix="choose a number of micro-batches that divides the batch",
        )


def _check_machine(machine: MachineOptions) -> None:
    require_choice("machine.devices", machine.devices, DEVICES)
    require_choice("machine.kernels", machine.kernels, kernel_choice.SETTINGS)
    require_choice("machine.decoder", machine.decoder, decoders.SETTINGS)
    require_choice("machine.fused", machine.fused, apex_sgd.SETTINGS)
    for key, minimum in (
        ("accumulation_steps", 1),
        ("loader_threads", 1),
        ("keep_checkpoints", 1),
        ("log_steps", 1),
        ("max_nonfinite_steps", 1),
        ("max_rollbacks", 0),
        ("replica_check_steps", 0),
    ):
        _check_minimum(f"machine.{key}", getattr(machine, key), minimum)
    for key, meaning, usual in (
        ("hang_minutes", "minutes, or 0 for never", 10),
        ("hang_factor", "a factor of 1 or more, or 0", 10),
        ("hang_floor_minutes", "minutes", 2),
    ):
        value = getattr(machine, key)
        if not 0 <= value < math.inf or (key == "hang_factor" and 0 < value < 1):
            raise ConfigError(f"machine.{key}", got=value, expected=meaning, fix=f"set machine.{key}={usual}")


def _check_data(data: DataOptions) -> None:
    require_choice("data.verify", data.verify, VERIFY)
    require_choice("data.changed", data.changed, CHANGED)
    _ = data.window_shards  # raises for what is not a window
    _check_minimum("data.stage_limit_gb", data.stage_limit_gb, 0)
    _check_minimum("data.stall_timeout_seconds", data.stall_timeout_seconds, 0.1)
    _check_minimum("data.download_attempts", data.download_attempts, 1)
    _check_minimum("data.max_damaged", data.max_damaged, 0)
    for key, address in (("data.train", data.train), ("data.val", data.val)):
        if not is_remote(address):
            continue
        # Only the kind of address is checked here; whether a shell command may run is decided where it would run.
        check_address(address, allow_pipe=key == "data.train", key=key)
        check_stage_dir(data.stage_dir, key)
    if data.stage_limit_gb and not is_remote(data.train):
        raise ConfigError(
            "data.stage_limit_gb",
            got=f"{data.stage_limit_gb:g}, with data.train in a folder",
            expected="an address",
            fix="leave it out: shards of a folder are staged completely, or read where they are",
        )


def _check_minimum(key: str, value: float, minimum: float) -> None:
    if not value >= minimum:
        raise ConfigError(key, got=value, expected=f"{minimum} or more", fix=f"set {key}={minimum} or more")
