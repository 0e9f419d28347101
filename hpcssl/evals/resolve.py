"""From names to values: the options and shard sets of an evaluation, and the weights files that it scores."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hpcssl import config
from hpcssl.data.cache import open_shard_set
from hpcssl.data.shards import ShardSet
from hpcssl.errors import ConfigError
from hpcssl.evals.registry import get_evaluation
from hpcssl.evals.renames import OPTION_RENAMES
from hpcssl.nets.run_weights import find_weights
from hpcssl.run_dir import RunDir

ROLES = ("train", "val", "test")


def resolve_evaluation(
    name: str,
    recipe: Mapping[str, Any],
    *,
    train: ShardSet | Path | str | None = None,
    val: ShardSet | Path | str | None = None,
    overrides: config.Overrides = (),
) -> tuple[dict[str, Any], dict[str, ShardSet]]:
    """Return the option values and the opened shard sets of an evaluation under a recipe.

    Args:
        name: The evaluation.
        recipe: Recipe as nested plain values; may be empty.
        train: Training shards instead of the recipe's: a folder, an address, or a set that is open already.
        val: Validation shards instead of the recipe's, likewise.
        overrides: Options as ``key=value`` or as a dict, on top of the recipe's section ``evals.NAME``.

    Returns:
        The option values that differ from the defaults, and the shard sets under ``train`` and ``val``. For an
        evaluation with data sets of its own, the shard sets are under ``SET/train``, ``SET/val`` and ``SET/test``.

    Raises:
        ConfigError: Unknown evaluation or option, or no shards named.
        DataError: Shards that cannot be opened.
    """
    evaluation = get_evaluation(name)
    data, evals = recipe.get("data") or {}, recipe.get("evals") or {}
    options = config.merge(evals.get(name) or {}, config.read_overrides(overrides))
    resolved = load_options(name, options)
    if evaluation.open_sets is not None:
        if any(isinstance(source, ShardSet) or source for source in (train, val)):
            raise ConfigError(
                f"evaluation {name}",
                got="--train or --val",
                expected="data sets named by the options root and sets",
                fix="set root=FOLDER, and sets=dtd+pets to choose among the data sets in it",
            )
        own = evaluation.open_sets(resolved)
        return options, {f"{one}/{role}": opened for one, parts in own.items() for role, opened in parts.items()}
    named = {"train": train, "val": val}
    return options, {role: _open(name, role, source, data) for role, source in named.items()}


def load_options(name: str, values: Mapping[str, Any]) -> Any:
    """Return the typed options of an evaluation. Raises ``ConfigError`` for unknown keys and invalid values."""
    schema, renames = get_evaluation(name).options, OPTION_RENAMES.get(name)
    return config.load(schema, values, where=f"options of {name}", renames=renames)


def split_by_row(
    name: str, options: dict[str, Any], sets: dict[str, ShardSet]
) -> list[tuple[dict[str, Any], dict[str, ShardSet]]]:
    """Return the option values and shard sets of each result row, given those of ``resolve_evaluation``.

    The options of a row name its data set, and not the folder of the data sets, which does not decide the scores.
    """
    if get_evaluation(name).open_sets is None:
        return [(options, sets)]
    names = dict.fromkeys(key.split("/")[0] for key in sets)
    return [(options | {"sets": one, "root": ""}, {role: sets[f"{one}/{role}"] for role in ROLES}) for one in names]


def check_sets(name: str, options: dict[str, Any], sets: dict[str, ShardSet]) -> None:
    """Raise ``EvalError`` if the sets of ``resolve_evaluation`` cannot be scored."""
    for _, parts in split_by_row(name, options, sets):
        check_row_sets(name, parts)


def check_row_sets(name: str, sets: Mapping[str, ShardSet]) -> None:
    """Raise ``EvalError`` if the sets of one result row cannot be scored."""
    for role, data in sets.items():
        if role != "train":
            get_evaluation(name).check(sets["train"], data)


def select_weights(run: RunDir, recipe: Mapping[str, Any], step: int | str) -> list[Path]:
    """Return the weights files that an evaluation of a run scores.

    Args:
        run: The run folder.
        recipe: The recipe as nested plain values.
        step: See ``find_weights``. With ``last``, the weights of step 0 come first, unless the recipe sets
            ``evals.baseline: false``.
    """
    chosen, initial = find_weights(run, step), run.weights_at(0)
    baseline = (recipe.get("evals") or {}).get("baseline", True)
    if step == "last" and baseline and initial.exists() and initial != chosen:
        return [initial, chosen]
    return [chosen]


def _open(name: str, role: str, source: ShardSet | Path | str | None, data: Mapping[str, Any]) -> ShardSet:
    """Open the shards that ``source`` names, or else the recipe's section ``data``."""
    if isinstance(source, ShardSet):
        return source
    source = source or data.get(role)
    if not source:
        raise ConfigError(
            f"evaluation {name}, {role} shards",
            got="no folder",
            expected=f"a folder that hpcssl-shard wrote, or its address, from --{role} or the recipe's data.{role}",
            fix=f"add --{role} SHARDS",
        )
    return open_shard_set(
        source,
        stage=data.get("stage_dir", ""),
        key=f"--{role} of an evaluation",
        stall_s=data.get("stall_timeout_seconds", 60.0),
        tries=data.get("download_attempts", 5),
    )
