"""Following a run: its state in one record, and ``--wait`` with a progress bar."""

from __future__ import annotations

import json
import math
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from hpcssl.errors import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, ConfigError
from hpcssl.files import RunDir
from slurm import attempts, local, records, sched

POLL_S = 0.5
SLURM_POLL_S = 5.0  # the controller answers everybody's questions


@dataclass(frozen=True)
class Report:
    """One run as ``status`` shows it."""

    run: RunDir
    job: str
    state: str
    attempt: int
    step: int
    steps: int | None
    last: str
    evals: dict[str, str]
    note: str

    def line(self) -> str:
        """One record, plain and uncut."""
        words = [str(self.run.root), f"job={self.job}", f"state={self.state}", f"attempt={self.attempt}",
                 f"step={self.step}/{self.steps if self.steps is not None else '?'}"]
        words += [f"last={self.last}"] if self.last else []
        words += [f"{name}={state}" for name, state in self.evals.items()]
        return "\t".join(words + ([f"note={self.note}"] if self.note else []))


def state_of(run: RunDir, job: records.Job) -> sched.State:
    """The state of a job, wherever it runs; the run folder knows what SLURM has forgotten."""
    if job.local:
        state = local.ask(run, job)
        over = state.name == local.LOST and job.what == records.TRAIN and run.finished  # it outlived its supervisor
        return sched.State("COMPLETED", exit_code=EXIT_DONE) if over else state
    mine = [a for a in attempts.history(run, job.what) if a.job == job.job]
    if job.what != records.TRAIN and mine and mine[-1].cause == "done":
        return sched.State("COMPLETED", exit_code=EXIT_DONE)  # there may be many, and SLURM answers everybody
    state = sched.ask_quietly(job.job, job.cluster)
    if state.name != sched.GONE:
        return state
    if (job.what == records.TRAIN and run.finished) or (mine and mine[-1].cause == "done"):
        return sched.State("COMPLETED", exit_code=EXIT_DONE)
    note = "SLURM has forgotten it; submit again with the same command: it goes on"
    return sched.State(sched.GONE, note=note, exit_code=EXIT_FAILED)


def report(run: RunDir) -> Report:
    """The state of a run, from SLURM or /proc and the run folder. Imports no torch."""
    jobs = records.submitted(run)
    history = attempts.history(run)
    train = jobs.get(records.TRAIN)
    state = state_of(run, train) if train else sched.State("COMPLETED" if run.finished else "NONE")
    evals, notes, on_the_way = {}, [state.note], {}
    for name, job in jobs.items():
        if name == records.TRAIN:
            continue
        at = state_of(run, job)
        crashed = [a for a in attempts.history(run, name)[-1:] if a.job == job.job and a.crashed and not at.live]
        told = at.note or "".join(f"job {job.job} crashed: {a.error}; submit again to ask again" for a in crashed)
        notes.append(told and f"{name}: {told}")
        if job.beside:
            group = re.sub(r"@\d+", "@*", name, count=1)
            on_the_way.setdefault(group, Counter())[at.name] += 1
        else:
            evals[name] = f"{at.name}{f' ({at.reason})' if at.reason else ''} job {job.job}"
    evals |= {group: ", ".join(f"{n} {word}" for word, n in counts.items()) for group, counts in on_the_way.items()}
    crash = attempts.verdict(history)
    if history and not state.live and not crash.again and history[-1].crashed:
        notes.append(crash.why)
    notes.append("" if run.finished else attempts.stuck(history))
    shown = state.name if not state.reason else f"{state.name} ({state.reason})"
    return Report(run, train.job if train else "-", shown, history[-1].number if history else 0, step_of(run),
                  steps_of(run), _last(history), evals, "; ".join(n for n in notes if n))


def step_of(run: RunDir) -> int:
    return finished["step"] if (finished := run.finished) else attempts.reached(run)


def steps_of(run: RunDir) -> int | None:
    """How many steps the run will have, from its recipe and the size of its data; None where that is unknown."""
    try:
        values = _yaml(run)
        schedule, batch = values.get("schedule") or {}, (values.get("optim") or {}).get("batch")
        if schedule.get("steps"):
            return int(schedule["steps"])
        index = json.loads((Path(values["data"]["train"]) / "index.json").read_text())
        samples = sum(shard["samples"] for shard in index["shards"])
        return math.floor(samples / batch) * int(schedule["epochs"])
    except (OSError, ValueError, KeyError, TypeError, ConfigError):
        return None


def wait(run: RunDir, say: Callable[[str], None], between: Callable[[], None] = lambda: None,
         jobs: Collection[records.Job] | None = None) -> int:
    """Follow jobs to their end, by default the run's newest of each kind; the training's exit code, or the first
    failed evaluation's. ``between`` is called between two looks at the training.
    """
    bar, told, code = _Bar(run, say), None, EXIT_DONE
    todo, seen = list(records.submitted(run).values() if jobs is None else jobs), set()
    before = {job.job for job in records.submitted(run).values()}
    while todo:
        job = todo.pop(0)
        what = job.what
        seen.add(job.job)
        while True:
            state = state_of(run, job)
            shown = f"{what} {job.job}: {state.name}" + (f" ({state.reason})" if state.reason else "")
            if shown != told:
                bar.say(shown + (f"; {state.note}" if state.note else ""))
                told = shown
            if what == records.TRAIN:
                bar.move()
                between()
            if not state.live and state.name != "UNKNOWN":
                break
            time.sleep(POLL_S if job.local else SLURM_POLL_S)
        if (next_ := records.successor(run, job)) is not None:
            todo.insert(0, next_)  # the same work goes on under another number
            continue
        if what == records.TRAIN:
            bar.close()
        code = code or _code(run, job, state)
        if not todo:  # what the training has submitted beside itself
            todo = [job for job in records.submitted(run).values() if job.beside and job.job not in seen
                    and (job.job not in before or state_of(run, job).live)]
    return code


class _Bar:
    """A tqdm bar on a terminal; elsewhere a plain line per attempt and per tenth of the way."""

    def __init__(self, run: RunDir, say: Callable[[str], None]):
        self.run, self._say, self._tenth, self._attempt, self._bar = run, say, -1, 0, None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=steps_of(run), unit="step", dynamic_ncols=True)

    def say(self, text: str) -> None:
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            self._say(text)

    def move(self) -> None:
        history = attempts.history(self.run)
        for k in range(self._attempt, len(history)):
            before = f" ({_last(history[:k])})" if k else ""
            self.say(f"attempt {history[k].number} starts at step {history[k].first_step}{before}")
        self._attempt = len(history)
        if not self._attempt:
            return
        step, total = step_of(self.run), steps_of(self.run)
        if self._bar is not None:
            self._bar.n, self._bar.total = step, total
            self._bar.set_postfix(_scalars(self.run), refresh=False)
            self._bar.refresh()
        elif total and step * 10 // total > self._tenth:
            self._tenth = step * 10 // total
            scalars = " ".join(f"{k} {v}" for k, v in _scalars(self.run).items())
            self.say(f"step {step} of {total} {scalars}".rstrip())

    def close(self) -> None:
        self.move()
        if self._bar is not None:
            self._bar.close()


def _scalars(run: RunDir) -> dict[str, str]:
    last = attempts.newest(run.journal)
    return {name: f"{last[name]:.4g}" for name in ("loss", "purity", "lr") if isinstance(last.get(name), float)}


def _code(run: RunDir, job: records.Job, state: sched.State) -> int:
    if job.what == records.TRAIN and run.finished:
        return EXIT_DONE
    if state.name == "COMPLETED":
        return EXIT_DONE
    if state.name == "CANCELLED":
        return EXIT_STOPPED
    return state.exit_code or EXIT_FAILED


def _last(history: list[attempts.Attempt]) -> str:
    closed = [a for a in history if a.cause]
    if not closed:
        return ""
    return closed[-1].cause + (f" ({closed[-1].error})" if closed[-1].error else "")


def _yaml(run: RunDir) -> dict:
    from hpcssl.config import read_yaml

    return read_yaml(run.config)
