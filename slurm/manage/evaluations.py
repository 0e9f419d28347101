"""The evaluations of a run: how they are written, and which of them are due.

``--evals knn,linear:protocol=moco,transfer:sets=dtd+pets`` has commas between evaluations and a colon before each
option. ``train=`` and ``val=`` name other shards than the recipe's. Commas and colons in brackets or quotes belong to
the value: ``knn:k=[1,20]``, which is the same as ``knn:k=1+20``.

The text of an evaluation is also the ``what`` of its job. ``knn@220:k=[1,20]`` scores the weights of step 220 while the
training continues (``--eval-every``). Which of these are due is stored nowhere: it follows from the weights in the run
folder, the plan in ``chain.json`` and the jobs in ``jobs.jsonl``, so that a kill at any moment loses none. What the
training could not submit is scored by the evaluation of the last weights, which is queued from the beginning.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from hpcssl import config
from hpcssl.errors import ConfigError, SubmitError
from hpcssl.files import read_record, write_record
from hpcssl.run_dir import RunDir
from hpcssl.storage.records import Fields
from slurm.backend.profiles import Profile
from slurm.log import attempts, job_log
from slurm.log.job_log import SbatchOptions
from slurm.manage import status

_PLAN_FIELDS: Fields = {"entries": dict[str, dict[str, Any]], "last": int, "kind": str, "profile": dict}
SHARD_KEYS = ("train", "val")
"""Keys of an evaluation that name shards, as the options ``--train`` and ``--val`` of ``hpcssl eval`` do."""
_FIX = "write NAME or NAME:key=value:key=value, such as knn,linear:protocol=msf (put values with , or : into quotes)"


@dataclass(frozen=True)
class EvalRequest:
    """One requested evaluation. ``str()`` gives its text, and ``parse_request`` reads it back.

    Attributes:
        name: Name of the evaluation.
        words: Its options and shards as ``key=value``, sorted.
        step: The step whose weights are scored; None for the last weights, and those of step 0.
    """

    name: str
    words: tuple[str, ...] = ()
    step: int | None = None

    def __str__(self) -> str:
        """Return the text of the evaluation, such as ``knn@220:k=[1,20]``."""
        return ":".join([self.name if self.step is None else f"{self.name}@{self.step}", *self.words])

    @property
    def overrides(self) -> list[str]:
        """Its options as ``key=value``."""
        return [word for word in self.words if word.partition("=")[0] not in SHARD_KEYS]

    @property
    def shards(self) -> dict[str, str]:
        """Shard folders by ``train`` and ``val``, if it names them."""
        return config.read_overrides([word for word in self.words if word not in self.overrides])

    @property
    def for_last_weights(self) -> EvalRequest:
        """The same evaluation of the last weights."""
        return replace(self, step=None)


def parse_requests(text: str) -> list[EvalRequest]:
    """Parse the value of ``--evals``. Names and options are not checked here.

    Raises:
        ConfigError: The text is malformed.
    """
    return [parse_request(part) for part in _split(text, ",") if part]


def parse_request(text: str) -> EvalRequest:
    """Parse one evaluation, as a user or ``str(EvalRequest)`` writes it.

    Raises:
        ConfigError: The text is malformed, or gives an option twice.
    """
    head, *words = _split(text, ":")
    match = re.fullmatch(r"([A-Za-z_]\w*)(?:@(\d+))?", head)
    keys = [word.partition("=")[0] for word in words]
    malformed = [word for word in words if not re.fullmatch(r"[A-Za-z_][\w.]*=.+", word)]
    repeated = [word for word, key in zip(words, keys, strict=True) if keys.count(key) > 1]
    if not match or malformed or repeated or not text.isprintable():
        got = f"{malformed[0]!r} in {text!r}" if malformed else " and ".join(repeated) or repr(text)
        raise ConfigError("option --evals", got=got, expected="names of evaluations, each option once", fix=_FIX)
    return EvalRequest(match[1], tuple(sorted(words)), None if match[2] is None else int(match[2]))


def check_period(epochs: int, length: float) -> None:
    """Check the value of ``--eval-every``.

    Args:
        epochs: Epochs between two concurrent evaluations; 0 for none.
        length: Length of the run in epochs.

    Raises:
        ConfigError: The run ends before the first of them.
    """
    if epochs > length:
        raise ConfigError(
            "option --eval-every",
            got=f"{epochs}, in a run of {length:g} epochs",
            expected="at most the length of the run",
            fix=f"--eval-every {int(length)}",
        )


def normalize(request: EvalRequest, is_list: Mapping[str, bool]) -> EvalRequest:
    """Return the same evaluation with lists in brackets and absolute paths, so that equal ones have one text.

    A job runs in another working directory than the user. So ``train``, ``val`` and ``root`` become absolute, and so
    does every value with a slash that is an existing path. The address of a shard folder stays as it is.

    Args:
        request: The evaluation as the user wrote it.
        is_list: By option, whether its value is a list. ``a+b`` then becomes ``[a,b]``.
    """
    from hpcssl.data.address import is_remote

    words = []
    for word in request.words:
        key, _, value = word.partition("=")
        path = Path(value.strip("'\"")).expanduser()
        if is_list.get(key) and value[0] not in "['\"":
            value = f"[{','.join(value.split('+'))}]"
        elif key in (*SHARD_KEYS, "root") or (os.sep in value and path.exists()):
            text = value.strip("'\"")
            value = text if key in SHARD_KEYS and is_remote(text) else str(path.absolute())
            value = f"'{value}'" if re.search(r"[^\w./+-]", value) else value
        words.append(f"{key}={value}")
    return replace(request, words=tuple(sorted(words)))


def write_plan(run: RunDir, entries: dict[str, dict[str, Any]], *, last: int, kind: str, profile: Profile) -> None:
    """Store which evaluations the training submits while it runs.

    Args:
        run: The run folder.
        entries: By the text of an evaluation: ``every`` (steps between two scored exports) and ``sbatch`` (options of
            its jobs).
        last: The last step of the training. Its weights are scored by the evaluations that wait for its end.
        kind: ``slurm`` or ``local``.
        profile: The cluster profile.
    """
    body = {"entries": entries, "last": last, "kind": kind, "profile": asdict(profile)}
    write_record(run.chain, body, indent=1)


def read_plan(run: RunDir) -> dict[str, Any]:
    """Return what ``write_plan`` stored; without entries if it stored nothing.

    Raises:
        SubmitError: The file is damaged.
    """
    if not run.chain.exists():
        return {"entries": {}, "last": 0}
    plan = read_record(run.chain, _PLAN_FIELDS)
    if plan is None:
        raise SubmitError(
            f"plan of evaluations {run.chain}",
            got="a file that cannot be read",
            expected="the file that hpcssl-submit wrote",
            fix="remove it, and submit again with the run's --evals: finished evaluations keep their rows",
        )
    return plan


def exported_steps(run: RunDir) -> list[int]:
    """Return the steps whose weights are in the run folder, in order."""
    return sorted(int(path.stem.removeprefix("step-")) for path in run.weights.glob("step-*.safetensors"))


def concurrent_requests(run: RunDir) -> list[EvalRequest]:
    """Return every evaluation of weights before the last step that the plan asks for and whose weights exist."""
    plan = read_plan(run)
    if not plan["entries"]:
        return []
    return [
        replace(parse_request(text), step=step)
        for step in exported_steps(run)
        if 0 < step < plan["last"]
        for text, entry in plan["entries"].items()
        if step % entry["every"] == 0
    ]


def due_requests(run: RunDir) -> list[EvalRequest]:
    """Return those of ``concurrent_requests`` that were never submitted; none once the training was cancelled."""
    requests = concurrent_requests(run)
    jobs = job_log.latest_jobs(run) if requests else {}
    train = jobs.get(job_log.TRAIN)
    if train is not None and job_log.is_cancelled(run, train.id):
        return []
    return [request for request in requests if str(request) not in jobs]


def get_sbatch_options(run: RunDir, requests: list[EvalRequest]) -> dict[str, SbatchOptions]:
    """Return the options of sbatch for evaluations of ``concurrent_requests``, by their text."""
    entries = read_plan(run)["entries"]
    return {str(request): entries[str(request.for_last_weights)]["sbatch"] for request in requests}


def remaining_steps(run: RunDir, final: EvalRequest) -> list[int]:
    """Return the steps that the evaluation of the last weights scores as well.

    These are steps of the plan that nobody else scores: not those whose job is active, was cancelled or has crashed,
    which are submitted again by submitting the run again.

    Args:
        run: The run folder.
        final: The evaluation of the last weights. For an evaluation of other weights there are no such steps.
    """
    jobs, steps = job_log.latest_jobs(run), []
    for request in concurrent_requests(run):
        if request.for_last_weights != final or request.step is None:
            continue
        job = jobs.get(str(request))
        if job is not None:
            history = attempts.read_attempts(run, job.what)
            has_crashed = bool(history) and history[-1].is_crash
            if has_crashed or job_log.is_cancelled(run, job.id) or status.query_job(run, job).is_active:
                continue
        steps.append(request.step)
    return steps


def _split(text: str, separator: str) -> list[str]:
    """Split at separators outside brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        else:
            depth += (character in "[{") - (character in "]}")
        if character == separator and depth == 0 and not quote:
            parts.append("")
        else:
            parts[-1] += character
    if depth or quote:
        raise ConfigError(
            "option --evals",
            got=f"{text!r}, with an open bracket or quote",
            expected="brackets and quotes in pairs",
            fix=_FIX,
        )
    return [part.strip() for part in parts]
