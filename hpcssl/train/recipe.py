"""Recipes: everything that determines a run, resolved once into a frozen value.

A recipe is a YAML file of sections (``data``, ``model``, ``method``, ...). Each section is an option class that lives
beside the code it steers; ``method.name`` selects the option class of the ``method`` section. All keys but those of
``name``, ``about``, ``machine`` and ``evals``, and paths, are the *science* of a run: they enter its fingerprint, and a
run is only ever resumed with the same one.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from hpcssl import config
from hpcssl.errors import ConfigError, ResumeError, suggest
from hpcssl.methods import METHODS
from hpcssl.nets import norm
from hpcssl.nets.resnet import Arch
from hpcssl.optim.build import OptimOptions
from hpcssl.optim.schedule import ScheduleOptions
from hpcssl.train.checks.dependencies import check_dependencies
from hpcssl.train.checks.values import check_values
from hpcssl.train.options import RENAMES, AboutOptions, BankOptions, DataOptions, MachineOptions, ModelOptions
from hpcssl.views.mix import MixOptions
from hpcssl.views.plan import ViewOptions


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All sections of a recipe. ``from_values`` replaces the type of ``method`` by the method's own option class.

    Attributes:
        name: Name of the recipe: of the packaged one, or of the YAML file.
        about: What the recipe reproduces.
        seed: Seed of every random draw: initial weights, order of samples, augmentations, bank.
        data: Images, and how they reach the processes.
        views: Augmented views that are cut from each image.
        model: Backbone, heads and batch normalization.
        mix: Mixing of two images into one query (CutMix, mixup).
        method: Self-supervised method and its options; ``method.name`` selects it.
        bank: Memory bank of past embeddings.
        optim: Optimizer, batch size and precision.
        schedule: Length of the run, and the course of the learning rate.
        evals: Options of the evaluations, by evaluation. Keys that are left out have their defaults.
        machine: How the run is carried out, without effect on its result.
    """

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
        """The backbone's architecture, as it is stored in exported weights files."""
        return Arch(arch=self.model.arch, stem=self.model.stem, zero_init_residual=self.model.zero_init_residual)

    def science(self, data_digest: str, world_size: int) -> dict[str, Any]:
        """Return the values that a run's result depends on, as nested plain values.

        Args:
            data_digest: Digest of the training shards; it stands for their path.
            world_size: Number of processes, which turns ``model.norm=local`` into a group size.
        """
        values = config.as_dict(self)
        for section in ("name", "about", "machine", "evals"):
            del values[section]
        values["data"] = {"train": data_digest, "shuffle_window": self.data.shuffle_window}
        del values["bank"]["placement"], values["model"]["weights"]
        if not values["model"]["weights_sha256"]:  # random weights, as in all recipes before there was this key
            del values["model"]["weights_sha256"]
        micro_batch = self.optim.batch // self.machine.accumulation_steps
        values["model"]["norm"] = "groups"
        values["model"]["norm_group_size"] = norm.resolve_group_size(
            self.model.norm, global_batch=micro_batch, world_size=world_size, ghost=self.model.norm_group_size
        )
        return values


def names() -> list[str]:
    """Return the names of the packaged recipes, sorted."""
    files = resources.files("hpcssl.recipes").iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))


RecipeSource = str | os.PathLike[str] | Mapping[str, Any] | Recipe
"""What a recipe is composed from: see ``compose``."""


def compose(source: RecipeSource, overrides: config.Overrides = (), *, run_exists: bool = False) -> Recipe:
    """Compose a recipe from a packaged name, a YAML file or values, and from overrides.

    Args:
        source: Name of a packaged recipe, path of a ``.yaml`` file, a recipe, or nested values like those in a file.
        overrides: ``key=value`` strings, such as ``optim.lr=0.1``, or nested dicts. A length (``schedule.steps`` or
            ``schedule.epochs``) replaces the recipe's length, whichever unit that has.
        run_exists: Whether the recipe is that of a run that exists. It is compared with what the run recorded, and not
            held to the checks between keys, which may be newer than the run.

    Raises:
        ConfigError: An unknown recipe, key or value, or values that cannot work together.
    """
    values, changes = _read_source(source), config.read_overrides(overrides)
    RENAMES.check(changes, "overrides")
    length = changes.get("schedule")
    if isinstance(length, dict) and len(length.keys() & {"steps", "epochs"}) == 1:
        length.setdefault("epochs" if "steps" in length else "steps", None)
    recipe = from_values(config.merge(values, changes), f"recipe {values['name']}")
    check_values(recipe)
    if not run_exists:
        check_dependencies(recipe)
    return recipe


def read(path: Path | str) -> Recipe:
    """Read a resolved recipe, as a run folder stores it.

    Raises:
        ResumeError: The file is damaged, or has keys or values that this version does not know.
    """
    try:
        recipe = from_values(config.read_yaml(path), f"recipe file {path}")
        check_values(recipe)
    except ConfigError as error:
        raise ResumeError(
            error.what,
            got=error.got,
            expected="the recipe as the run's first attempt wrote it",
            fix="remove the file and run the same command again, with the run's recipe: its checkpoints refuse any "
            "other",
        ) from error
    return recipe


def from_values(values: dict[str, Any], where: str) -> Recipe:
    """Convert nested plain values into a ``Recipe`` whose ``method`` has the option class of ``method.name``.

    Args:
        values: Sections by name; missing keys get their defaults.
        where: Name of the source, for error messages.

    Raises:
        ConfigError: An unknown key, a value of another type, or an unknown method.
    """
    RENAMES.check(values, where)
    section = values.get("method")
    method = section.get("name") if isinstance(section, dict) else None
    if method not in METHODS:
        raise ConfigError(
            f"{where}, key method.name",
            got=repr(method),
            expected="the name of a method",
            fix=suggest(str(method), METHODS),
        )
    options: type = METHODS[method][0]
    recipe: Recipe = config.load(_make_schema(options), values, where=where)
    return recipe


@functools.cache
def _make_schema(options: type) -> type:
    """The class of the recipes of a method, whose section ``method`` has the type ``options``."""
    return dataclasses.make_dataclass(
        "Recipe", [("method", options, field(default_factory=options))], bases=(Recipe,), frozen=True, kw_only=True
    )


def _read_source(source: RecipeSource) -> dict[str, Any]:
    """The values that ``compose`` starts from, as one nested dict with the recipe's ``name``."""
    if isinstance(source, Recipe):
        return config.as_dict(source)
    if isinstance(source, Mapping):
        values = config.merge(source)
        return _add_bases(values, str(values.get("name") or "custom"))
    return _read_with_bases(os.fspath(source))


def _read_with_bases(name: str) -> dict[str, Any]:
    """Read a recipe and the recipes that it is based on, as one nested dict with the recipe's ``name``."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise ConfigError(
                f"recipe file {name}",
                got="no such file",
                expected="a YAML file",
                fix="check the path, or name a packaged recipe (`hpcssl recipes` lists them)",
            )
        values, own_name = config.read_yaml(path), path.stem
    elif name in names():
        with resources.as_file(resources.files("hpcssl.recipes") / f"{name}.yaml") as file:
            values, own_name = config.read_yaml(file), name
    else:
        raise ConfigError(
            f"recipe {name!r}",
            got="no recipe of this name",
            expected="a packaged recipe or a .yaml file",
            fix=suggest(name, names()),
        )
    return _add_bases(values, own_name)


def _add_bases(values: dict[str, Any], own_name: str) -> dict[str, Any]:
    """Add the values of the recipes that ``values`` are based on, and the recipe's own ``name``."""
    RENAMES.check(values, f"recipe {own_name}")
    base = values.pop("base", None)
    if base is not None:
        base_values = _read_with_bases(str(base))
        base_about = base_values.pop("about", {})
        if isinstance(values.get("method"), dict) and "name" in values["method"]:
            base_values.pop("method", None)  # the keys of another method's options would be unknown
        elif isinstance(values.get("about"), dict) and values["about"]:
            inherited = [sentence for sentence in base_about.get("differs", []) if not _is_settled(sentence, values)]
            values["about"]["differs"] = [*inherited, *values["about"].get("differs", [])]
        values = config.merge(base_values, values)
    return {"name": own_name} | {key: value for key, value in values.items() if key != "name"}


def _is_settled(sentence: str, values: dict[str, Any]) -> bool:
    """Whether a recipe sets the key in parentheses at the end of a sentence of its base."""
    match = re.search(r"\(([a-z_.]+)\)\.$", sentence)
    if match is None:
        return False
    inner: Any = values
    for part in match[1].split("."):
        if not isinstance(inner, dict) or part not in inner:
            return False
        inner = inner[part]
    return True


def recipe_mismatch_error(what: str, ours: dict[str, Any], theirs: dict[str, Any]) -> ResumeError:
    """Return the error for a run that was started with other science; it names each key with both values.

    Args:
        what: The run folder or checkpoint, for the message.
        ours: Science of the recipe that was asked for (``Recipe.science``).
        theirs: Science of the recipe that the run was started with.
    """
    keys = config.differing(ours, theirs)
    values = ", ".join(f"{key}={config.lookup(ours, key)} (before: {config.lookup(theirs, key)})" for key in keys)
    fix = "give the old values, or start a new run with another --run folder"
    if keys == ["model.norm_group_size"]:
        size = theirs["model"]["norm_group_size"]
        fix = f"set model.norm=ghost model.norm_group_size={size}, the same groups on this number of processes"
    return ResumeError(
        what, got=f"a recipe that differs in {values}", expected="the recipe that the run was started with", fix=fix
    )
