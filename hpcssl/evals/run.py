"""One way to run every evaluation: by name, on exported weights and two shard folders, once.

A row says what was measured, of which weights, on which data, with which options and which code. It is appended to
``RUN/evals/NAME.jsonl``; asking for the same again gives back the row that is there. A new evaluation is one entry of
``EVALS`` and one field of ``EvalsOptions``.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import hpcssl
from hpcssl import config, files
from hpcssl.data.cache import opened
from hpcssl.data.shards import ShardSet
from hpcssl.errors import ConfigError, EvalError, nearest
from hpcssl.evals import detect, finetune, knn, linear, lowshot, svm, transfer
from hpcssl.evals.features import Encoder, FeatureOptions, Features, Union, extract
from hpcssl.evals.together import Stop, never
from hpcssl.files import RunDir
from hpcssl.world import World

log = logging.getLogger("hpcssl")


@dataclass(frozen=True)
class Evaluation:
    """An evaluation: its options and the function (Context) -> scores in percent, which is a collective.

    ``check``: refuses two sets that it cannot use; None asks for labels of the same classes (``check_labels``).
    ``split``: (options) -> the sets train, val and test of each of the data sets that it scores, by name, for one that
    has data of its own; each gets a row. ``total``: those rows -> scores over all of them, or None.
    """

    options: type
    run: Callable[[Context], dict[str, float]]
    check: Callable[[ShardSet, ShardSet], None] | None = None
    split: Callable[[FeatureOptions], dict[str, dict[str, ShardSet]]] | None = None
    total: Callable[[list[dict]], dict[str, float] | None] | None = None


@dataclass(kw_only=True)
class Context:
    """What an evaluation is given. ``state``: a file of its own that outlives a kill, or None; ``identity``: the
    sha256 of everything that decides the scores; ``closing``: closed when the evaluation ends, however it ends;
    ``details``: plain values for the row beside its scores, on rank 0; ``test``: of an evaluation with a ``split``.
    """

    options: FeatureOptions
    encoder: Encoder
    train: ShardSet
    val: ShardSet
    world: World
    stop: Stop
    identity: str
    test: ShardSet | None = None
    cache: Path | None = None
    state: Path | None = None
    threads: int = 1
    closing: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    details: dict = field(default_factory=dict)

    def features(self, data: ShardSet | Union) -> Features:
        if isinstance(data, Union):
            found = [self.features(part) for part in data.sets]
            return Features([part for f in found for part in f.parts], data.labels, data.classes)
        return extract(self.encoder, data, self.options, self.world, root=self.cache, threads=self.threads,
                       stop=self.stop)


def _check_several(train: ShardSet, val: ShardSet) -> None:
    check_labels(train, val, several=True)


EVALS: dict[str, Evaluation] = {
    "knn": Evaluation(knn.KnnOptions, knn.run),
    "linear": Evaluation(linear.LinearOptions, linear.run),
    "finetune": Evaluation(finetune.FinetuneOptions, finetune.run),
    "svm": Evaluation(svm.SvmOptions, svm.run, _check_several),
    "lowshot": Evaluation(lowshot.LowshotOptions, lowshot.run, _check_several),
    "transfer": Evaluation(transfer.TransferOptions, transfer.run, _check_several, transfer.split, transfer.total),
    "detect": Evaluation(detect.DetectOptions, detect.run, detect.check),
}


def evaluate(name: str, *, run: RunDir | None, weights: Path | str, train: ShardSet, val: ShardSet, world: World,
             test: ShardSet | None = None, options: dict | None = None, stop: Stop | None = None,
             threads: int | None = None, cache: bool = True) -> dict:
    """The row of one evaluation; computed, or found in the run folder. A collective.

    ``options``: values over the evaluation's defaults. ``run`` None: nothing is written, and a kill loses everything.
    ``threads``: loader threads of this process. ``cache`` False keeps the features out of the run folder.
    Raises ``ConfigError`` (name, options), ``EvalError``, and ``Stopped`` (exit code 75) after a request to stop.
    """
    if name not in EVALS:
        raise ConfigError("evaluation", got=repr(name), expected="a known evaluation", mend=nearest(name, EVALS))
    resolved = config.load(EVALS[name].options, options or {}, where=f"options of {name}")
    sets = {"train": train, "val": val} | ({"test": test} if test else {})
    _check(name, sets)
    began = time.monotonic()
    named = {f"{kind}_name": _called(data) for kind, data in sets.items()}
    encoder = Encoder.open(weights, world)
    identity = identity_of(name, resolved, sets, encoder.sha256)
    found = _found(run, name, identity, world)
    if found is not None:
        log.info("%s of step %d: done before, taken from %s", name, found["step"], run.eval_rows(name))
        return found
    world.mark("stage", patient=True)  # of a set at an address all shards may have to be fetched first
    sets = {kind: data.near() for kind, data in sets.items()}
    world.mark("evaluate")
    context = Context(options=resolved, encoder=encoder, **sets, world=world, stop=stop or never,
                      identity=identity, threads=threads or _threads(),
                      cache=run.features if run is not None and cache else None,
                      state=run.eval_state(name, identity) if run is not None else None)
    with context.closing:
        metrics = EVALS[name].run(context)
    row = {"eval": name, "identity": identity, "step": encoder.meta["step"], "weights": encoder.path.name,
           "weights_sha256": encoder.sha256, "fingerprint": encoder.meta["fingerprint"],
           "method": encoder.meta["method"], "arch": encoder.meta["arch"].arch,
           "options": config.as_dict(resolved), "metrics": metrics, "details": context.details,
           **{kind: data.digest for kind, data in sets.items()},
           **named,
           "world": world.size, "device": world.device.type, "seconds": round(time.monotonic() - began, 3),
           "commit": code_commit(run), "time": datetime.now(UTC).isoformat(timespec="seconds")}
    row = json.loads(world.tell(json.dumps(row) if world.main else None))
    if world.main and run is not None:
        files.append_line(run.eval_rows(name), row)
        context.state.unlink(missing_ok=True)
    return row


def evaluate_run(name: str, run: RunDir, world: World, *, train: Path | str | None = None,
                 val: Path | str | None = None, overrides: Sequence[str] = (), step: int | str = "last",
                 stop: Stop | None = None, threads: int | None = None) -> list[dict]:
    """Evaluate what a run folder holds: the weights of a step, and of step 0 where ``evals.baseline`` asks for it.

    Raises ``Stopped`` (exit code 75) after a request to stop: what is finished is kept.
    ``step``: ``last`` (of the finished training, else the newest there is), ``first``, or a number. Options: the
    recipe's ``evals.NAME``, then ``overrides`` as ``key=value``. Shards: the recipe's, unless given.
    """
    recipe = config.read_yaml(run.config) if run.config.exists() else {}
    options, sets = question(name, recipe, train=train, val=val, overrides=overrides)
    return [row for path in _chosen(run, recipe, step) for row in
            evaluate_sets(name, run=run, weights=path, world=world, options=options, sets=sets, stop=stop,
                          threads=threads)]


def evaluate_sets(name: str, *, run: RunDir | None, weights: Path | str, world: World, options: dict,
                  sets: dict[str, ShardSet], stop: Stop | None = None, threads: int | None = None) -> list[dict]:
    """The rows of one encoder for an answer of ``question``: one, or one per data set and one of them all."""
    rows = [evaluate(name, run=run, weights=weights, world=world, options=values, stop=stop, threads=threads, **parts)
            for values, parts in _parts(name, options, sets)]
    total = EVALS[name].total
    metrics = total(rows) if total else None
    if metrics:
        rows.append(_total(name, run, rows, metrics, world))
    return rows


def check_sets(name: str, options: dict, sets: dict[str, ShardSet]) -> None:
    """Raise ``EvalError`` where an answer of ``question`` cannot be scored."""
    for _, parts in _parts(name, options, sets):
        _check(name, parts)


def _check(name: str, parts: dict[str, ShardSet]) -> None:
    for kind, data in parts.items():
        if kind != "train":
            (EVALS[name].check or check_labels)(parts["train"], data)


def _parts(name: str, options: dict, sets: dict[str, ShardSet]) -> list[tuple[dict, dict[str, ShardSet]]]:
    """Options and sets of each row. A row's own say which data set it is, and not where it lies."""
    if EVALS[name].split is None:
        return [(options, sets)]
    names = dict.fromkeys(key.split("/")[0] for key in sets)
    return [(options | {"sets": one, "root": ""},
             {kind: sets[f"{one}/{kind}"] for kind in ("train", "val", "test")}) for one in names]


def _total(name: str, run: RunDir | None, rows: list[dict], metrics: dict[str, float], world: World) -> dict:
    identity = config.fingerprint({"eval": name, "rows": [row["identity"] for row in rows]})
    found = _found(run, name, identity, world)
    if found is not None:
        return found
    over = {kind: config.fingerprint({"sets": [row[kind] for row in rows]}) for kind in ("train", "val", "test")}
    row = rows[0] | over | {f"{kind}_name": f"{len(rows)} sets" for kind in over} | {
        "identity": identity, "metrics": metrics, "details": {"rows": [row["identity"] for row in rows]},
        "options": rows[0]["options"] | {"sets": "+".join(row["options"]["sets"] for row in rows)},
        "seconds": round(sum(row["seconds"] for row in rows), 3),
        "time": datetime.now(UTC).isoformat(timespec="seconds")}
    row = json.loads(world.tell(json.dumps(row) if world.main else None))
    if world.main and run is not None:
        files.append_line(run.eval_rows(name), row)
    return row


def _found(run: RunDir | None, name: str, identity: str, world: World) -> dict | None:
    """The row that is there, as rank 0 sees it."""
    found = next((row for row in _rows(run, name) if row.get("identity") == identity), None)
    return json.loads(world.tell(json.dumps(found) if world.main else None))


def missing(name: str, run: RunDir, *, train: Path | str | None = None, val: Path | str | None = None,
            overrides: Sequence[str] = (), step: int | str = "last") -> list[Path]:
    """The weights files for which ``evaluate_run``, asked the same, would find no row."""
    recipe = config.read_yaml(run.config)
    options, sets = question(name, recipe, train=train, val=val, overrides=overrides)
    asked = [(config.load(EVALS[name].options, values, where=f"options of {name}"), parts)
             for values, parts in _parts(name, options, sets)]
    known = {row.get("identity") for row in _rows(run, name)}
    return [path for path in _chosen(run, recipe, step)
            if any(identity_of(name, *one, files.digest(path)) not in known for one in asked)]


def question(name: str, recipe: dict, *, train: Path | str | None = None, val: Path | str | None = None,
             overrides: Sequence[str] = ()) -> tuple[dict, dict[str, ShardSet]]:
    """Option values and shard sets of an evaluation under a recipe (nested plain values).

    The sets are ``train`` and ``val``, or ``NAME/train``, ``NAME/val`` and ``NAME/test`` of an evaluation's own data.
    Raises ``ConfigError`` (name, options, no shards named) and ``DataError`` (shards that cannot be read).
    """
    if name not in EVALS:
        raise ConfigError("evaluation", got=repr(name), expected="a known evaluation", mend=nearest(name, EVALS))
    data, evals = recipe.get("data") or {}, recipe.get("evals") or {}
    options = config.merge(evals.get(name) or {}, config.read_overrides(list(overrides)))
    resolved = config.load(EVALS[name].options, options, where=f"options of {name}")
    if EVALS[name].split is not None:
        if train or val:
            raise ConfigError(f"evaluation {name}", got="--train or --val", expected="data sets by root and sets",
                              mend="root=FOLDER, and sets=dtd+pets to choose among those in it")
        return options, {f"{one}/{kind}": data for one, parts in EVALS[name].split(resolved).items()
                         for kind, data in parts.items()}
    folders = {"train": train or data.get("train"), "val": val or data.get("val")}
    for kind, folder in folders.items():
        if not folder:
            raise ConfigError(f"evaluation {name}, {kind} shards", got="none named and none in the recipe",
                              expected=f"a folder that hpcssl-shard wrote, by --{kind} or data.{kind}",
                              mend=f"add --{kind} SHARDS")
    how = {"stage": data.get("stage", ""), "stall_s": data.get("stall_seconds", 60.0), "tries": data.get("tries", 5)}
    return options, {kind: opened(folder, key=f"{kind} shards of an evaluation", **how)
                     for kind, folder in folders.items()}


def identity_of(name: str, options: object, sets: dict[str, ShardSet], weights_sha256: str) -> str:
    """sha256 of everything that decides the scores."""
    return config.fingerprint({"eval": name, "options": config.as_dict(options), "weights": weights_sha256,
                               **{kind: data.digest for kind, data in sets.items()}})


def _chosen(run: RunDir, recipe: dict, step: int | str) -> list[Path]:
    """The weights of a step; for the last one, those of step 0 before it, unless the recipe wants no baseline."""
    chosen, first = weights_of(run, step), run.weights_at(0)
    baseline = (recipe.get("evals") or {}).get("baseline", True)
    return [first, chosen] if step == "last" and baseline and first.exists() and first != chosen else [chosen]


def weights_of(run: RunDir, step: int | str = "last") -> Path:
    """The weights file of a step of the run. Raises ``EvalError`` naming the steps there are."""
    there = sorted(run.weights.glob("step-*.safetensors"))
    if not str(step).isdigit() and step not in ("first", "last"):
        raise ConfigError("--step", got=repr(step), expected="last, first or a step's number", mend="--step last")
    if step == "first":
        wanted = run.weights_at(0)
    elif step != "last":
        wanted = run.weights_at(int(step))
    elif (finished := run.finished) is not None:
        wanted = run.weights_at(finished["step"])
    else:
        wanted = there[-1] if there else run.weights_at(0)
    if not wanted.exists():
        steps = ", ".join(str(int(path.stem.removeprefix("step-"))) for path in there)
        raise EvalError(f"weights of {run.root}", got=f"no {wanted.name}",
                        expected=f"one of the steps {steps}" if steps else "a run that has been started",
                        mend="name one of these steps" if steps else "check --run, or start `hpcssl train`")
    return wanted


def _called(data: ShardSet) -> str:
    """The last two names of a set's folder, such as ``imagenet/train``, for tables."""
    return "/".join(str(data.root).rstrip("/").split("/")[-2:])


def code_commit(run: RunDir | None = None) -> str:
    """The commit of the code that runs: of the code frozen at submit, else of the checkout, else the version."""
    package = Path(hpcssl.__file__).resolve().parent
    if run is not None and (run.code / "COMMIT").exists() and package.is_relative_to(run.code.resolve()):
        return (run.code / "COMMIT").read_text().strip()
    if not (package.parent / ".git").exists():  # installed: a .git further up would be somebody else's
        return f"v{hpcssl.__version__}"
    try:
        said = subprocess.run(["git", "-C", str(package), "describe", "--always", "--dirty", "--abbrev=12",
                               "--exclude=*"], check=True, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return f"v{hpcssl.__version__}"
    return said.stdout.strip()


def _rows(run: RunDir | None, name: str) -> list[dict]:
    return [] if run is None else files.read_lines(run.eval_rows(name))


def _threads() -> int:
    """Loader threads: this process's share of the cores it may use."""
    return max(1, len(os.sched_getaffinity(0)) // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def check_labels(train: ShardSet, val: ShardSet, *, several: bool = False) -> None:
    """Raise ``EvalError`` unless both sets are labelled, with the same classes. ``several``: images of several classes
    at once will do."""
    for data in (train, val):
        if len(data) == 0:
            raise EvalError(f"shard folder {data.root}", got="no samples", expected="at least one",
                            mend="name another folder, or write the shards again")
        if data.targets is not None and not several:
            raise EvalError(f"shard folder {data.root}", got="images of several classes at once",
                            expected="one class for each image", mend="svm, lowshot and transfer take such a set")
        if data.targets is None and (data.labels < 0).any():
            raise EvalError(f"shard folder {data.root}", got=f"{int((data.labels < 0).sum())} images without a label",
                            expected="a label for each image", mend="write the shards again from class folders")
    if train.classes != val.classes:
        differ = sorted(set(train.classes) ^ set(val.classes))[:3]
        raise EvalError(f"classes of {val.root}", got=f"{len(val.classes)} classes, other ones (such as {differ})",
                        expected=f"the {len(train.classes)} classes of {train.root}",
                        mend="name the training and validation shards of one data set")
