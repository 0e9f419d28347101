"""The evaluations of a run: how they are written, and which of them are due.

``--evals knn,linear:protocol=moco,transfer:sets=dtd+pets``: commas between evaluations, a colon before each option of
one. ``train=`` and ``val=`` name shards other than the recipe's. Brackets and quotes protect commas and colons:
``knn:k=[1,20]``, the same as ``knn:k=1+20``.

A job is called by the same text; ``knn@220:k=[1,20]`` scores the weights of step 220, beside the training that goes
on (``--eval-every``). Which of these are due is never stored: it follows from the weights that lie in the run folder,
the plan in ``chain.json`` and the jobs in ``jobs.jsonl``, so a kill at any moment loses none. What the training could
not submit is made up for by the evaluation of the last weights, which waits in the queue from the beginning.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from hpcssl import config
from hpcssl.errors import ConfigError, SubmitError
from hpcssl.files import RunDir, atomic_write, read_record
from slurm import attempts, records, watch
from slurm.cluster import Profile

SHARDS = ("train", "val")
"""Keys of an entry that are no options of the evaluation: folders, as ``hpcssl eval`` takes them."""
_MEND = "write NAME or NAME:key=value:key=value, such as knn,linear:protocol=msf (quotes protect , and :)"


@dataclass(frozen=True)
class Entry:
    """One evaluation as asked for. ``words``: its key=value, sorted. ``step`` None: the last weights, and step 0."""

    name: str
    words: tuple[str, ...] = ()
    step: int | None = None

    def __str__(self) -> str:
        return ":".join([self.name if self.step is None else f"{self.name}@{self.step}", *self.words])

    @property
    def overrides(self) -> list[str]:
        return [w for w in self.words if w.partition("=")[0] not in SHARDS]

    @property
    def shards(self) -> dict[str, str]:
        """Folders by ``train`` and ``val``, where they are named."""
        return config.read_overrides([w for w in self.words if w not in self.overrides])


def parse(text: str) -> list[Entry]:
    """The evaluations of ``--evals``. Raises ``ConfigError`` for what cannot be read; names are not looked up."""
    return [entry(part) for part in _split(text, ",") if part]


def entry(text: str) -> Entry:
    """One evaluation, as a person or ``str(Entry)`` wrote it."""
    head, *words = _split(text, ":")
    found = re.fullmatch(r"([A-Za-z_]\w*)(?:@(\d+))?", head)
    keys = [w.partition("=")[0] for w in words]
    bad = [w for w in words if not re.fullmatch(r"[A-Za-z_][\w.]*=.+", w)]
    twice = [w for w, key in zip(words, keys, strict=True) if keys.count(key) > 1]
    if not found or bad or twice or not text.isprintable():
        got = f"{bad[0]!r} in {text!r}" if bad else f"{' and '.join(twice)}" if twice else repr(text)
        raise ConfigError("option --evals", got=got, expected="names of evaluations, each option once", mend=_MEND)
    return Entry(found[1], tuple(sorted(words)), None if found[2] is None else int(found[2]))


def write(run: RunDir, entries: dict[str, dict], *, last: int, kind: str, profile: Profile) -> None:
    """Store what is to be evaluated beside the training.

    ``entries``: by text, ``every`` (steps) and ``sbatch`` (its jobs' options). ``last``: the run's last step.
    """
    body = {"entries": entries, "last": last, "kind": kind, "profile": asdict(profile)}
    atomic_write(run.chain, json.dumps(body, indent=1) + "\n")


def read(run: RunDir) -> dict:
    """What ``write`` stored; no entries where it never did. Raises ``SubmitError`` where that is damaged."""
    if not run.chain.exists():
        return {"entries": {}, "last": 0}
    found = read_record(run.chain, "entries")
    if found is None:
        raise SubmitError(f"evaluations of the run, {run.chain}", got="a file that cannot be read",
                          expected="what hpcssl-submit wrote there", mend="remove it, and submit again with the run's "
                          "--evals: finished evaluations keep their rows")
    return found


def exported(run: RunDir) -> list[int]:
    """Steps whose weights lie in the run folder."""
    return sorted(int(p.stem.removeprefix("step-")) for p in run.weights.glob("step-*.safetensors"))


def beside(run: RunDir) -> list[Entry]:
    """Every evaluation of weights that the training has exported on its way, as the plan wants them."""
    plan = read(run)
    if not plan["entries"]:
        return []
    steps = [step for step in exported(run) if 0 < step < plan["last"]]
    return [replace(entry(text), step=step) for step in steps for text, how in plan["entries"].items()
            if step % how["every"] == 0]


def due(run: RunDir) -> list[Entry]:
    """Those of ``beside`` that no job was ever submitted for; none once the training was cancelled."""
    wanted = beside(run)
    jobs = records.submitted(run) if wanted else {}
    train = jobs.get(records.TRAIN)
    if train is not None and records.cancelled(run, train.job):
        return []
    return [e for e in wanted if str(e) not in jobs]


def jobs_of(run: RunDir, entries: list[Entry]) -> dict[str, dict]:
    """sbatch's options of the jobs of these entries of ``beside``, by what each job does."""
    plan = read(run)["entries"]
    return {str(e): plan[str(replace(e, step=None))]["sbatch"] for e in entries}


def left_over(run: RunDir, final: Entry) -> list[int]:
    """Steps that the evaluation of the last weights makes up for: exported on the way, and in nobody's hands. None
    for an evaluation of other weights.

    Not those whose job lives, was cancelled, or has crashed: whoever asks for these again submits again.
    """
    jobs, steps = records.submitted(run), []
    for e in beside(run):
        job = jobs.get(str(e))
        if replace(e, step=None) != final:
            continue
        if job is not None:
            past = attempts.history(run, job.what)
            if (past and past[-1].crashed) or records.cancelled(run, job.job) or watch.state_of(run, job).live:
                continue
        steps.append(e.step)
    return steps


def settled(e: Entry, kinds: dict[str, bool]) -> Entry:
    """The entry with ``a+b`` written as ``[a,b]`` where ``kinds`` says that an option is a list, and whole paths.

    A job works in another folder than the person who asked: ``train``, ``val`` and ``root`` become absolute, and so
    does every value with a slash that is a path here.
    """
    words = []
    for word in e.words:
        key, _, value = word.partition("=")
        plain = Path(value.strip("'\"")).expanduser()
        if kinds.get(key) and value[0] not in "['\"":
            value = f"[{','.join(value.split('+'))}]"
        elif key in (*SHARDS, "root") or (os.sep in value and plain.exists()):
            value = str(plain.absolute())
            value = f"'{value}'" if re.search(r"[^\w./+-]", value) else value
        words.append(f"{key}={value}")
    return replace(e, words=tuple(sorted(words)))


def _split(text: str, mark: str) -> list[str]:
    """Parts between marks that stand outside brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for c in text:
        if quote:
            quote = "" if c == quote else quote
        elif c in "'\"":
            quote = c
        else:
            depth += (c in "[{") - (c in "]}")
        if c == mark and depth == 0 and not quote:
            parts.append("")
        else:
            parts[-1] += c
    if depth or quote:
        raise ConfigError("option --evals", got=f"{text!r}, with an open bracket or quote",
                          expected="brackets and quotes in pairs", mend=_MEND)
    return [part.strip() for part in parts]
