"""Run folders as records.

A *record* is one encoder of one run (the weights of one step, or the untrained ones of step 0) with everything that
was measured of it on one pair of data sets. Runs that differ in nothing but the seed give one more record, of means
and deviations.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Sequence
from datetime import datetime
from functools import cache
from pathlib import Path

from hpcssl import config, files, published
from hpcssl.errors import ConfigError, EvalError
from hpcssl.files import RunDir
from hpcssl.results import columns

log = logging.getLogger("hpcssl")

_NO_SCIENCE = ("name", "about", "seed", "machine", "evals")


def collect(runs: Sequence[Path | str]) -> list[dict]:
    """Records of the runs in the order given, untrained first, then by step; then the means over seeds.

    A record holds plain values under the columns' names, ``step``, ``metrics`` (column -> percent), ``published``
    (column -> value and source, where the run is its recipe's row), ``asked`` (column -> fingerprint of the
    evaluation's options), and ``newest``: it is of the run's last step. A mean has ``deviation`` and ``n`` (column ->
    seeds) besides. A run without results is named in the log and left out.
    Raises ``EvalError`` for a path that is no run folder, and where no run has results.
    """
    opened = open_runs(runs)
    records = [record for run in opened for record in _of_run(run)]
    if not records:
        raise EvalError(f"run folder {opened[0].root}", got="no results yet", expected="rows in evals/NAME.jsonl",
                        mend=f"`hpcssl eval knn --run {opened[0].root}` writes some")
    return records + _over_seeds(records)


def shown(records: Sequence[dict], *, steps: bool = False) -> list[dict]:
    """What a table shows: the untrained and the newest encoder of each run; with ``steps`` those between as well."""
    return [r for r in records if steps or r["newest"] or r["step"] == 0]


def open_runs(paths: Sequence[Path | str]) -> list[RunDir]:
    """Each once. Of several, a folder that is no run (``runs/*`` may hold shards) is named in the log and left out.
    Raises ``EvalError`` for a path that is no folder, and where none is a run."""
    opened = []
    for path in dict.fromkeys(Path(path).resolve() for path in paths):
        if len(paths) > 1 and path.is_dir() and not RunDir(path).config.exists():
            log.warning("%s is no run folder", path)
        else:
            opened.append(open_run(path))
    return opened or [open_run(path) for path in paths]


def open_run(path: Path | str) -> RunDir:
    """Raises ``EvalError`` for a path that is no run folder."""
    run = RunDir(path)
    what = f"run folder {run.root}"
    if not run.root.is_dir():
        raise EvalError(what, got="no such folder", expected="the folder of a run",
                        mend="check the path: it is what --run named")
    if not run.config.exists():
        raise EvalError(what, got="no config.yaml in it", expected="the folder of a run",
                        mend="name the run folders themselves, such as runs/demo")
    return run


def science(recipe: dict) -> dict:
    """What of a resolved recipe changes a run's result, but for the seed and the data's place."""
    values = {key: value for key, value in recipe.items() if key not in _NO_SCIENCE}
    values["data"] = {"window": (values.get("data") or {}).get("window")}
    values["bank"] = {key: value for key, value in (values.get("bank") or {}).items() if key != "placement"}
    return values


# -- one run ------------------------------------------------------------------------------------------------


def _of_run(run: RunDir) -> list[dict]:
    rows = [row for path in sorted(run.evals.glob("*.jsonl"))
            for row in files.read_lines(path, "eval", "step", "metrics", "options", "identity", "time")]
    if not rows:
        log.warning("%s has no results yet", run.root)
    recipe = config.read_yaml(run.config)
    records: list[dict] = []
    seen, changed = set(), _changed(run, recipe) if rows else []
    for row in sorted(rows, key=lambda row: (row["step"], row["eval"] in columns.OWN_DATA, row["time"])):
        if row["identity"] in seen:  # two jobs measured the same at the same time
            continue
        seen.add(row["identity"])
        _place(records, _about(run, recipe, changed, row), columns.of_row(row), config.fingerprint(row["options"]))
    trained_on = (files.read_record(run.data, "train") or {}).get("train")
    newest = max((record["step"] for record in records), default=0)
    for record in records:
        record["newest"] = record["step"] == newest
        if 0 < record["step"] < newest:
            record["rank·h"] = ""  # the cost is of the whole training
        if record["encoder"] == "trained" and not record["changed"] and _of_that_size(record, recipe):
            known = columns.anchors(record["recipe"], recipe.get("about"))
            record["published"] = {
                column: known[title] for column in record["metrics"] if (title := columns.quantity(column)) in known
                and (record["sets"][:1] == [trained_on] or not columns.of_training_set(title))}
    return records


def _place(records: list[dict], about: dict, metrics: dict[str, float], options: str) -> None:
    """Into the record of the same encoder and data, unless other options have already given it another number there.

    What has data sets of its own goes to the encoder's record, whatever that one's are.
    """
    for record in records:
        same = all(record[key] == about[key] for key in ("weights", "step")) \
            and about["sets"] in ([], record["sets"])
        if same and all(record["metrics"].get(column, score) == score for column, score in metrics.items()):
            break
    else:
        records.append(record := about | {"metrics": {}, "asked": {}})
    for column, score in metrics.items():
        record["metrics"].setdefault(column, score)
        record["asked"].setdefault(column, options)
    record["data"] = record["data"] or about["data"]
    if about["commit"] not in record["commit"].split(", "):
        record["commit"] += ", " + about["commit"]


def _about(run: RunDir, recipe: dict, changed: list[str], row: dict) -> dict:
    done = (run.finished or {}).get("step")
    schedule, step, name = recipe.get("schedule") or {}, row["step"], recipe.get("name", "")
    trained = "trained" if step == done else f"step {step}"
    length = schedule.get("epochs") or (f"{schedule['steps']} steps" if schedule.get("steps") else "")
    world, hours = _cost(run)
    own = row["eval"] in columns.OWN_DATA
    return {"recipe": name, "encoder": "untrained" if step == 0 else trained, "step": step, "method": row["method"],
            "arch": row["arch"], "data": "" if own else _data(row), "epochs": 0 if step == 0 else length,
            "batch": (recipe.get("optim") or {}).get("batch", ""), "changed": changed,
            "published": {}, "seed": recipe.get("seed", 0), "world": world, "rank·h": 0.0 if step == 0 else hours,
            "run": run.root.name, "weights": row["weights_sha256"][:12], "commit": row["commit"],
            "time": row["time"], "fingerprint": row["fingerprint"], "sets": [] if own else [row["train"], row["val"]],
            "science": config.fingerprint(science(recipe) | {"name": name})}


def _data(row: dict) -> str:
    """``digits`` for digits/train and digits/val, both names where the parents differ; '' of rows that name none."""
    train, val = (Path(row.get(f"{kind}_name", "")) for kind in ("train", "val"))
    return str(train.parent) if train.parent == val.parent and train.name else f"{train}, {val}".strip("., ")


def _of_that_size(record: dict, recipe: dict) -> bool:
    """Whether an epoch took as many whole batches as the published rows' training set has. Whoever trains a packaged
    recipe on images of their own reproduces no row. A recipe of one's own has its own set."""
    from hpcssl.train import recipe as recipes

    epochs, batch = (recipe.get("schedule") or {}).get("epochs"), (recipe.get("optim") or {}).get("batch")
    if record["recipe"] not in recipes.names():
        return True
    return bool(epochs and batch) and record["step"] == round(epochs * (published.images_of(record["recipe"]) // batch))


def _changed(run: RunDir, recipe: dict) -> list[str]:
    """``key=value`` of what the run does otherwise than the packaged recipe of that name; none for one's own recipe."""
    from hpcssl.train import recipe as recipes

    name, ours = recipe.get("name", ""), science(recipe)
    if name not in recipes.names() or ours == _packaged(name):
        return []
    try:  # keys that are younger than the run have their defaults, under which nothing changes
        ours = science(config.as_dict(recipes.read(run.config)))
    except ConfigError as error:
        return [f"written by another version: {error.got}"]
    return [f"{key}={_at(ours, key)}" for key in config.differing(ours, _packaged(name))]


@cache
def _packaged(name: str) -> dict:
    from hpcssl.train import recipe as recipes

    return science(config.as_dict(recipes.compose(name)))


def _at(values: dict, key: str) -> object:
    for part in key.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values


def _cost(run: RunDir) -> tuple[int | str, float | str]:
    """Ranks of the last attempt, and hours times ranks over all attempts that wrote down their end."""
    world, hours, begun = "", 0.0, {}
    for line in files.read_lines(run.attempts, "event", "attempt", "time"):
        if line.get("event") == "start":
            begun[line["attempt"]] = line
            world = line.get("world", world)
        elif line.get("event") == "end" and line["attempt"] in begun:
            start = begun.pop(line["attempt"])
            hours += (_seconds(line["time"]) - _seconds(start["time"])) / 3600 * start.get("world", 1)
    # an attempt that was killed wrote no end: the cost is at least the rest
    return world, f"≥ {hours:.3g}" if begun else float(f"{hours:.3g}")


def _seconds(time: float | str) -> float:
    return datetime.fromisoformat(time).timestamp() if isinstance(time, str) else float(time)


# -- several seeds ------------------------------------------------------------------------------------------


def _over_seeds(records: list[dict]) -> list[dict]:
    """Mean and sample deviation of the scores that two or more seeds of one recipe have: same data, same options."""
    groups: dict[tuple, list[dict]] = {}
    for record in records:
        groups.setdefault((record["science"], record["step"], *record["sets"]), []).append(record)
    return [mean for group in groups.values() for mean in _means(group)]


def _means(group: list[dict]) -> list[dict]:
    scores: dict[tuple, dict] = {}  # (column, options) -> seed -> score
    for record in group:
        for column, score in record["metrics"].items():
            scores.setdefault((column, record["asked"][column]), {}).setdefault(record["seed"], score)
    layers: list[dict] = []  # a column that was measured under two sets of options stands in two records
    for (column, _), by_seed in scores.items():
        if len(by_seed) > 1:
            layer = next((layer for layer in layers if column not in layer), None)
            if layer is None:
                layers.append(layer := {})
            layer[column] = list(by_seed.values())
    names = list(dict.fromkeys(record["run"] for record in group))
    kept = ("recipe", "encoder", "step", "method", "arch", "data", "epochs", "batch", "changed", "newest", "sets")
    return [{key: group[0][key] for key in kept} | {
        "published": {column: value for r in group for column, value in r["published"].items() if column in layer},
        "seed": f"{len({r['seed'] for r in group})} seeds", "run": "mean of " + ", ".join(names),
        "metrics": {column: statistics.fmean(values) for column, values in layer.items()},
        "deviation": {column: statistics.stdev(values) for column, values in layer.items()},
        "n": {column: len(values) for column, values in layer.items()}} for layer in layers]
