"""A recipe: everything that determines a run, resolved once into a frozen value.

Sections are option classes that live beside the code they steer. ``method.name`` picks the method's own options
before the whole is typed. Everything but ``machine``, ``evals``, ``about`` and paths is *science*: it enters the
fingerprint, and a run continues only under the same one.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from hpcssl import config
from hpcssl.data.stream import check_address, is_remote
from hpcssl.errors import ConfigError, ResumeError, nearest
from hpcssl.methods import METHODS
from hpcssl.nets import norm, resnet
from hpcssl.nets.heads import HeadOptions
from hpcssl.nets.resnet import Arch
from hpcssl.optim.build import OptimOptions
from hpcssl.optim.schedule import ScheduleOptions, total_steps
from hpcssl.views.mix import MixOptions
from hpcssl.views.plan import ViewOptions


@dataclass(frozen=True, kw_only=True)
class AboutOptions:
    """What the recipe reproduces: shown by ``hpcssl recipes``, steers nothing."""

    title: str = ""
    published: dict[str, float] = field(default_factory=dict)
    source: str = ""


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """``train``, ``val``: shard folders, or addresses of them (``https://host/train``; ``data/stream.py``).

    ``stage``: a folder on node-local disk to which the training shards are copied and checked first, once per node;
    those of an address are fetched there before they are needed, and it must be named. ``stage_gb``: at most so many
    gigabytes of these are kept, those that ``window`` is done with leave first (0: all are kept). ``stall_seconds``: a
    transfer without a byte for so long is cut; each file is asked for ``tries`` times. ``window``: shards shuffled
    together, or ``all``. ``verify``: ``sizes`` of all shards are compared with the index before training, or with
    ``sha256`` every byte, at each attempt; staged ones that changed are copied anew. ``damaged_limit``: so many samples
    that cannot be decoded are replaced and named; one more ends the run. Each counts once, over all ranks and attempts
    (``damaged.jsonl`` of the run folder).
    """

    train: str = ""
    val: str = ""
    stage: str = ""
    stage_gb: float = 0.0
    stall_seconds: float = 60.0
    tries: int = 5
    window: str = "all"
    verify: str = "sizes"
    damaged_limit: int = 100

    @property
    def window_shards(self) -> int | str:
        """``window`` as ``data/order.py`` takes it. Raises ``ConfigError``."""
        if self.window != "all" and not (self.window.isdigit() and int(self.window) > 0):
            raise ConfigError("data.window", got=repr(self.window), expected="a number of shards from 1, or all",
                              mend="set data.window=all")
        return self.window if self.window == "all" else int(self.window)


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Backbone (``nets/resnet.py``), heads, and what batch norm sees.

    ``norm``: ``local`` to a rank, ``whole`` batch (synchronised), or ``ghost`` groups of ``norm_group`` samples.
    ``shuffle``: the target's images are dealt out to groups anew at each step (shuffle-BN). ``joint``: views of one
    size pass the norms together (``nets/pair.py``), as in SwAV's code.
    """

    arch: str = "resnet50"
    stem: str = "imagenet"
    zero_init_residual: bool = False
    projector: HeadOptions = field(default_factory=HeadOptions)
    predictor: HeadOptions = field(default_factory=HeadOptions)
    norm: str = "local"
    norm_group: int = 0
    norm_momentum: float = 0.1
    shuffle: bool = False
    joint: bool = False


@dataclass(frozen=True, kw_only=True)
class BankOptions:
    """``size`` rows; ``start`` random (as official code) or empty; ``placement`` replicated or sharded, which find
    the same neighbours."""

    size: int = 128_000
    start: str = "random"
    placement: str = "replicated"


@dataclass(frozen=True, kw_only=True)
class MachineOptions:
    """How a run is carried out, which must not change what it finds.

    ``devices`` cpu, gpu or auto. ``threads`` per process for arithmetic (0: 1 on a CPU, torch's choice beside a GPU),
    ``loader_threads`` per process. ``accumulate``: micro-batches per step. ``checkpoint_steps`` and
    ``checkpoint_minutes``: a save after so many steps or minutes (0: never by this clock); ``keep`` the last so many,
    ``keep_every`` n-th step for good. ``nonfinite_limit``: after so many steps in a row that were not finite the run
    goes back to its last good checkpoint and on past their batches, ``rollbacks`` times before it ends.
    ``check_replicas_steps``: every so many steps, and before each save, the ranks compare what they hold alike (0: only
    before a save). ``timeout_minutes``: for ranks to arrive, and for a collective. ``hang_minutes`` without progress of
    any rank (a fraction may be given; 0: never) end the attempt with the rank and the place that are to blame.
    ``log_samples`` writes the sample ids of every step. ``export_epochs``: weights are exported every so many epochs.
    """

    devices: str = "auto"
    threads: int = 0
    loader_threads: int = 1
    accumulate: int = 1
    channels_last: bool = True
    deterministic: bool = False
    checkpoint_steps: int = 0
    checkpoint_minutes: float = 15.0
    keep: int = 2
    keep_every: int = 0
    log_steps: int = 10
    log_samples: bool = False
    nonfinite_limit: int = 3
    rollbacks: int = 1
    check_replicas_steps: int = 100
    timeout_minutes: float = 30.0
    hang_minutes: float = 10.0
    export_epochs: int = 0


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The sections of a recipe. ``compose`` puts the method's own options in the place of ``method``."""

    name: str = ""
    about: AboutOptions = field(default_factory=AboutOptions)
    seed: int = 0
    data: DataOptions = field(default_factory=DataOptions)
    views: ViewOptions = field(default_factory=ViewOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    mix: MixOptions = field(default_factory=MixOptions)
    method: Any = None
    bank: BankOptions = field(default_factory=BankOptions)
    optim: OptimOptions = field(default_factory=OptimOptions)
    schedule: ScheduleOptions = field(default_factory=ScheduleOptions)
    evals: dict[str, Any] = field(default_factory=dict)
    machine: MachineOptions = field(default_factory=MachineOptions)

    @property
    def arch(self) -> Arch:
        return Arch(arch=self.model.arch, stem=self.model.stem, zero_init_residual=self.model.zero_init_residual)

    def science(self, data_digest: str, world_size: int) -> dict:
        """What a run's result depends on, as nested plain values; ``world_size`` turns ``local`` into a group size."""
        values = config.as_dict(self)
        for machinery in ("name", "about", "machine", "evals"):
            del values[machinery]
        values["data"] = {"train": data_digest, "window": self.data.window}
        del values["bank"]["placement"]
        micro = self.optim.batch // self.machine.accumulate
        values["model"]["norm"] = "groups"
        values["model"]["norm_group"] = norm.group_size(self.model.norm, global_batch=micro, world_size=world_size,
                                                        ghost=self.model.norm_group)
        return values


def names() -> list[str]:
    """Names of the packaged recipes."""
    return sorted(p.name.removesuffix(".yaml") for p in resources.files("hpcssl.recipes").iterdir()
                  if p.name.endswith(".yaml"))


def compose(name: str, overrides: list[str] | None = None) -> Recipe:
    """The recipe of this name, or of this YAML file, with ``key=value`` overrides. Raises ``ConfigError``."""
    values, asked = _read(name), config.read_overrides(list(overrides or []))
    length = asked.get("schedule")
    if isinstance(length, dict) and len(length.keys() & {"steps", "epochs"}) == 1:
        # a length replaces the recipe's, in whichever unit that was
        length.setdefault("epochs" if "steps" in length else "steps", None)
    recipe = typed(config.merge(values, asked), f"recipe {values['name']}")
    check(recipe)
    return recipe


def read(path: Path | str) -> Recipe:
    """A resolved recipe as a run folder stores it. Raises ``ResumeError`` where that is damaged."""
    try:
        recipe = typed(config.read_yaml(path), f"recipe file {path}")
        check(recipe)
    except ConfigError as error:
        raise ResumeError(error.what, got=error.got, expected="the recipe as this run's first attempt wrote it there",
                          mend="remove the file and give the same command again, with the run's recipe: its "
                               "checkpoints refuse any other") from error
    return recipe


def typed(values: dict, where: str) -> Recipe:
    """Nested plain values as a ``Recipe`` whose ``method`` has the class that ``method.name`` means."""
    section = values.get("method")
    chosen = section.get("name") if isinstance(section, dict) else None
    if chosen not in METHODS:
        raise ConfigError(f"{where}, key method.name", got=repr(chosen), expected="the name of a method",
                          mend=nearest(str(chosen), METHODS))
    options, _ = METHODS[chosen]
    schema = dataclasses.make_dataclass("Recipe", [("method", options, field(default_factory=options))],
                                        bases=(Recipe,), frozen=True, kw_only=True)
    return config.load(schema, values, where=where)


def _read(name: str) -> dict:
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise ConfigError(f"recipe file {name}", got="no such file", expected="a YAML file",
                              mend="check the path, or name a packaged recipe: `hpcssl recipes` lists them")
        values, called = config.read_yaml(path), path.stem
    elif name in names():
        with resources.as_file(resources.files("hpcssl.recipes") / f"{name}.yaml") as file:
            values, called = config.read_yaml(file), name
    else:
        raise ConfigError(f"recipe {name!r}", got="no recipe of this name",
                          expected="a packaged recipe or a .yaml file", mend=nearest(name, names()))
    base = values.pop("like", None)
    if base is not None:
        under = _read(str(base))
        under.pop("about", None)
        if "name" in values.get("method", {}):
            under.pop("method")  # another method's options would be unknown keys
        values = config.merge(under, values)
    return {"name": called} | {k: v for k, v in values.items() if k != "name"}


def check(recipe: Recipe) -> None:
    """Refuse values that no world size, data or device could make right. Raises ``ConfigError``."""
    _choice("model.norm", recipe.model.norm, norm.SCOPES)
    _choice("machine.devices", recipe.machine.devices, ("auto", "cpu", "gpu"))
    _choice("model.stem", recipe.model.stem, resnet.STEMS)
    _choice("model.arch", recipe.model.arch, resnet.NAMES)
    for key, value, least in (("optim.batch", recipe.optim.batch, 2), ("views.size", recipe.views.size, 8),
                              ("machine.accumulate", recipe.machine.accumulate, 1), ("bank.size", recipe.bank.size, 1),
                              ("machine.loader_threads", recipe.machine.loader_threads, 1),
                              ("machine.keep", recipe.machine.keep, 1),
                              ("machine.log_steps", recipe.machine.log_steps, 1),
                              ("machine.nonfinite_limit", recipe.machine.nonfinite_limit, 1),
                              ("machine.rollbacks", recipe.machine.rollbacks, 0),
                              ("machine.check_replicas_steps", recipe.machine.check_replicas_steps, 0)):
        if value < least:
            raise ConfigError(key, got=value, expected=f"{least} or more", mend=f"set {key}={least} or more")
    if not 0 <= recipe.machine.hang_minutes < float("inf"):
        raise ConfigError("machine.hang_minutes", got=recipe.machine.hang_minutes, expected="minutes, or 0 for never",
                          mend="set machine.hang_minutes=10")
    _check_data(recipe.data)
    if recipe.model.norm == "ghost" and recipe.model.norm_group < 2:
        raise ConfigError("model.norm_group", got=recipe.model.norm_group, expected="2 or more samples per ghost group",
                          mend="set model.norm_group, for example to 64")
    # a length was asked for, and is longer than its warm-up for some data set
    total_steps(recipe.schedule, 1 if recipe.schedule.steps else 10**9)
    if recipe.optim.batch % recipe.machine.accumulate:
        raise ConfigError("machine.accumulate", got=recipe.machine.accumulate,
                          expected=f"a divisor of optim.batch={recipe.optim.batch}",
                          mend="choose a number of micro-batches that divides the batch")


def _check_data(data: DataOptions) -> None:
    _choice("data.verify", data.verify, ("sizes", "sha256"))
    _ = data.window_shards
    for key, value, least in (("data.stage_gb", data.stage_gb, 0), ("data.stall_seconds", data.stall_seconds, 0.1),
                              ("data.tries", data.tries, 1), ("data.damaged_limit", data.damaged_limit, 0)):
        if not value >= least:
            raise ConfigError(key, got=value, expected=f"{least} or more", mend=f"set {key}={least} or more")
    for key, address in (("data.train", data.train), ("data.val", data.val)):
        if not is_remote(address):
            continue
        check_address(address, allow_pipe=key == "data.train", key=key)  # who may run a command is asked where it runs
        if not data.stage:
            raise ConfigError("data.stage", got=f"no folder, with {key} at an address", expected="a folder on each "
                              "node's own disk, where shards are kept", mend="add data.stage=FOLDER, such as /tmp")
    if data.stage_gb and not is_remote(data.train):
        raise ConfigError("data.stage_gb", got=f"{data.stage_gb:g} with data.train in a folder", expected="an address",
                          mend="leave it out: shards of a folder are staged whole, or read where they are")


def _choice(key: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(key, got=repr(value), expected="one of " + ", ".join(known), mend=nearest(str(value), known))
