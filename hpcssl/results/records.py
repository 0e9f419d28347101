"""Read run folders as records.

A *record* is one encoder of one run (the weights of one step) with all of its scores
on one pair of data sets. Runs that differ only in the seed give one more record, of means and deviations.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from hpcssl import config, files, published
from hpcssl.errors import ConfigError, EvalError
from hpcssl.evals.rows import ROW_FIELDS
from hpcssl.results import columns, compare, run_cost
from hpcssl.results.columns import Record
from hpcssl.results.seeds import average_over_seeds
from hpcssl.run_dir import RunDir, find_runs, open_run

LOG = logging.getLogger("hpcssl")

_IRRELEVANT_SECTIONS = ("name", "about", "seed", "machine", "evals")


def collect_records(runs: Sequence[Path | str]) -> list[Record]:
    """Read the records of runs.

    A record holds plain values under the names of the columns, and besides:

    - ``step``: optimizer step of the weights.
    - ``metrics``: scores in percent, by column.
    - ``published``: value and source by column, if the run reproduces the row of its recipe.
    - ``options``: fingerprint of the options of the evaluation, by column.
    - ``newest``: whether it is of the last step of the run.
    - ``differs``: its values of the keys in which runs of one recipe differ.
    - ``deviation`` and ``n``, only of a mean: deviation and number of seeds, by column.

    A run without results is left out, with a warning in the log.

    Args:
        runs: Run folders.

    Returns:
        The records in the order of the runs, by step; then the means over seeds.

    Raises:
        EvalError: A path is not a run folder, or no run has results.
    """
    opened = open_runs(runs)
    by_run = [(_read_run(run), config.flatten(result_keys(config.read_yaml(run.config)))) for run in opened]
    records = [record for own, _ in by_run for record in own]
    differing = compare.find_differing_keys([(own[0]["recipe"], values) for own, values in by_run if own])
    for own, values in by_run:
        for record in own:
            record["differs"] = {key: values[key] for key in differing if key in values}
    if not records:
        raise EvalError(
            f"run folder {opened[0].root}",
            got="no results yet",
            expected="rows in evals/NAME.jsonl",
            fix=f"`hpcssl eval knn --run {opened[0].root}` writes some",
        )
    return records + average_over_seeds(records)


def select_shown(records: Sequence[Record], *, steps: bool = False) -> list[Record]:
    """Select what a table shows: the encoder of step 0 and the newest one of each run.

    Args:
        records: The records.
        steps: Also select the encoders between them.
    """
    return [r for r in records if steps or r["newest"] or r["step"] == 0]


def open_runs(paths: Sequence[Path | str]) -> list[RunDir]:
    """Open run folders, each once. A folder with runs in it, such as that of a sweep, stands for these.

    Of several, a folder that is not a run is skipped with a warning in the log, since ``runs/*`` may hold shards.

    Args:
        paths: The folders.

    Raises:
        EvalError: A path is not a folder, or none is a run.
    """
    opened = []
    paths = [one for path in paths for one in ([run.root for run in find_runs(Path(path))] or [Path(path)])]
    for path in dict.fromkeys(Path(path).resolve() for path in paths):
        if len(paths) > 1 and path.is_dir() and not RunDir(path).config.exists():
            LOG.warning("%s is not a run folder and is skipped.", path)
        else:
            opened.append(open_run(path))
    return opened or [open_run(path) for path in paths]


def result_keys(recipe: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a resolved recipe that changes the result of a run, except the seed and the data folders."""
    values = {key: value for key, value in recipe.items() if key not in _IRRELEVANT_SECTIONS}
    values["data"] = {"shuffle_window": (values.get("data") or {}).get("shuffle_window")}
    values["bank"] = {key: value for key, value in (values.get("bank") or {}).items() if key != "placement"}
    # runs that started from random weights, and those of versions without these keys, are alike
    values["model"] = {
        key: value
        for key, value in (values.get("model") or {}).items()
        if key != "weights" and (key != "weights_sha256" or value)
    }
    return values


# -- one run ------------------------------------------------------------------------------------------------


def _read_run(run: RunDir) -> list[Record]:
    rows = [row for path in sorted(run.evals.glob("*.jsonl")) for row in files.read_lines(path, ROW_FIELDS)]
    rows = [row for row in rows if row["step"] is not None]  # those of other projects' encoders have none
    if not rows:
        LOG.warning("%s has no results yet.", run.root)
    recipe = config.read_yaml(run.config)
    records: list[Record] = []
    identities = set()
    changed = changed_keys(run, recipe) if rows else []
    cost = (*run_cost.rank_hours(run), run_cost.effective_share(run))
    for row in sorted(rows, key=lambda row: (row["step"], row["eval"] in columns.OWN_DATA, row["time"])):
        if row["identity"] in identities:  # two jobs ran the same evaluation at the same time
            continue
        identities.add(row["identity"])
        _merge_row(
            records,
            _describe_row(run, recipe, changed, cost, row),
            columns.scores_by_column(row),
            config.fingerprint(row["options"]),
        )
    trained_on = (files.read_record(run.data, {"train": str}) or {}).get("train")
    newest = max((record["step"] for record in records), default=0)
    for record in records:
        record["newest"] = record["step"] == newest
        if 0 < record["step"] < newest:
            record["rank·h"] = record["effective"] = ""  # the cost is of the whole training
        if record["encoder"] == "trained" and not record["changed"] and _has_published_size(record, recipe):
            scores = columns.published_scores(record["recipe"], recipe.get("about"))
            record["published"] = {
                column: scores[title]
                for column in record["metrics"]
                if (title := columns.strip_protocol(column)) in scores
                and (record["sets"][:1] == [trained_on] or not columns.needs_training_set(title))
            }
    return records


def _merge_row(records: list[Record], about: Record, metrics: dict[str, float], options: str) -> None:
    """Add scores to the record of the same encoder and data, or to a new one if its score there is another.

    Other options may have given that other score. An evaluation with data sets of its own goes to any record of the
    encoder.
    """
    for record in records:
        same = all(record[key] == about[key] for key in ("weights", "step")) and about["sets"] in ([], record["sets"])
        if same and all(record["metrics"].get(column, score) == score for column, score in metrics.items()):
            break
    else:
        records.append(record := about | {"metrics": {}, "options": {}})
    for column, score in metrics.items():
        record["metrics"].setdefault(column, score)
        record["options"].setdefault(column, options)
    record["data"] = record["data"] or about["data"]
    if about["commit"] not in record["commit"].split(", "):
        record["commit"] += ", " + about["commit"]


def _describe_row(
    run: RunDir, recipe: dict[str, Any], changed: list[str], cost: tuple[Any, ...], row: dict[str, Any]
) -> Record:
    """Return a record for a result row, without its scores. ``cost``: ranks, their hours, and the effective share."""
    world, hours, effective = cost
    done = (run.finished or {}).get("step")
    schedule, step, name = recipe.get("schedule") or {}, row["step"], recipe.get("name", "")
    later = "trained" if step == done else f"step {step}"
    length = schedule.get("epochs") or (f"{schedule['steps']} steps" if schedule.get("steps") else "")
    own_data = row["eval"] in columns.OWN_DATA
    return {
        "recipe": name,
        "encoder": columns.name_first_encoder(recipe) if step == 0 else later,
        "step": step,
        "method": row["method"],
        "arch": row["arch"],
        "data": "" if own_data else _data_name(row),
        "epochs": 0 if step == 0 else length,
        "batch": (recipe.get("optim") or {}).get("batch", ""),
        "changed": changed,
        "published": {},
        "seed": recipe.get("seed", 0),
        "world": world,
        "rank·h": 0.0 if step == 0 else hours,
        "effective": "" if step == 0 else effective,
        "run": _run_name(run.root),
        "weights": row["weights_sha256"][:12],
        "commit": row["commit"],
        "time": row["time"],
        "fingerprint": row["fingerprint"],
        "sets": [] if own_data else [row["train"], row["val"]],
        "result_fingerprint": config.fingerprint(result_keys(recipe) | {"name": name}),
    }


def _run_name(root: Path) -> str:
    """Return the name of a run folder; of one of a sweep, which is named by its values as those of others, with OUT."""
    return f"{root.absolute().parent.name}/{root.name}" if "=" in root.name else root.name


def _data_name(row: dict[str, Any]) -> str:
    """Return ``digits`` for digits/train and digits/val, both names if the parents differ, '' if there are none."""
    train, val = (Path(row.get(f"{kind}_name", "")) for kind in ("train", "val"))
    return str(train.parent) if train.parent == val.parent and train.name else f"{train}, {val}".strip("., ")


def _has_published_size(record: Record, recipe: dict[str, Any]) -> bool:
    """Return whether an epoch had as many batches as the training set of the published scores.

    A packaged recipe that was trained on other images reproduces no published row. A user's own recipe has its own
    training set, so this is not checked.
    """
    from hpcssl.train import recipe as recipes

    schedule, batch = recipe.get("schedule") or {}, (recipe.get("optim") or {}).get("batch")
    epochs = schedule.get("epochs")
    if record["recipe"] not in recipes.names():
        return True
    if not epochs or not batch:
        return False
    images = published.count_training_images(record["recipe"])
    steps = epochs * images // batch if schedule.get("fractional_epochs") else round(epochs * (images // batch))
    return bool(record["step"] == steps)


def changed_keys(run: RunDir, recipe: dict[str, Any]) -> list[str]:
    """Return ``key=value`` for what differs from the packaged recipe of that name; none for a user's own recipe."""
    from hpcssl.train import recipe as recipes

    name, values = recipe.get("name", ""), result_keys(recipe)
    origin = files.read_record(run.parent, {"path": str, "step": int, "changed": dict})
    # a branch without changes is what its parent would have become
    parent = [f"from {origin['path']}@{origin['step']}"] if origin and origin["changed"] else []
    if name not in recipes.names() or values == _packaged(name):
        return parent
    try:  # keys that are newer than the run get their defaults, which change nothing
        values = result_keys(config.as_dict(recipes.read(run.config)))
    except ConfigError as error:
        return [f"written by another version: {error.got}"]
    return parent + describe_changes(name, values)


def describe_changes(name: str, values: dict[str, Any]) -> list[str]:
    """Return ``key=value`` for each of the ``result_keys`` of a recipe that differs from the packaged recipe."""
    return [f"{key}={_lookup(values, key)}" for key in config.differing(values, _packaged(name))]


@cache
def _packaged(name: str) -> dict[str, Any]:
    from hpcssl.train import recipe as recipes

    return result_keys(config.as_dict(recipes.compose(name)))


def _lookup(values: Any, key: str) -> object:
    for part in key.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values
