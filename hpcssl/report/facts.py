"""What a page says about a run, read from its folder once."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hpcssl import config, files
from hpcssl.attempts import FIELDS, AttemptLines, group_by_attempt
from hpcssl.errors import ConfigError
from hpcssl.results import curves
from hpcssl.results.curves import Curves
from hpcssl.run_dir import RunDir
from hpcssl.timing.uptime import Uptime, last_written, measure_uptime, to_unix_time


@dataclass(frozen=True)
class AttemptFacts:
    """One attempt of a training.

    Attributes:
        number: Its number, from 1.
        first_step: The step that it continued from.
        last_step: The last step that it finished; None if that was not recorded.
        lost: Steps that the next attempt had to compute again; 0 for the last attempt, None if unknown.
        cause: Why it ended (see ``hpcssl.attempts``); empty without a recorded end.
        error: Its error or the signals that ended it; empty if there are none.
        began: When it began (Unix time); 0 if unknown.
        ended: When it ended; 0 if unknown.
        host: Where it ran.
        world: Number of its ranks; 0 if unknown.
    """

    number: int
    first_step: int
    last_step: int | None
    lost: int | None
    cause: str
    error: str
    began: float
    ended: float
    host: str
    world: int


@dataclass(frozen=True)
class RunFacts:
    """One run.

    Attributes:
        run: The folder.
        label: Its name on the page, which no other run of the page has.
        recipe: The resolved recipe.
        curves: Points by quantity and line; empty before the first step.
        attempts: The attempts of the training, oldest first.
        step: The last step that is known.
        total: Steps of the whole training; None if unknown.
        is_finished: Whether the training is finished.
        uptime: Where its time went; None before the first attempt.
        machinery: Software and hardware of the newest checkpoint; empty without one.
    """

    run: RunDir
    label: str
    recipe: dict[str, Any]
    curves: Curves
    attempts: list[AttemptFacts]
    step: int
    total: int | None
    is_finished: bool
    uptime: Uptime | None
    machinery: dict[str, Any] = field(default_factory=dict)

    @property
    def state(self) -> str:
        """``finished``, or what is known of a training that is not."""
        if self.is_finished:
            return "finished"
        if not self.attempts:
            return "not begun"
        cause = self.attempts[-1].cause
        return f"not finished, last end: {cause}" if cause else "no end recorded: it runs, or its end was lost"

    @property
    def causes(self) -> Counter[str]:
        """How often each cause has ended an attempt."""
        return Counter(attempt.cause for attempt in self.attempts if attempt.cause)

    @property
    def interruptions(self) -> int:
        """How many attempts ended before the training was finished."""
        return sum(count for cause, count in self.causes.items() if cause != "done")

    @property
    def lost_steps(self) -> int:
        """Steps that were computed again, as far as it is known."""
        return sum(attempt.lost or 0 for attempt in self.attempts)

    @property
    def lost_text(self) -> str:
        """``lost_steps``, as ``describe_lost`` puts it."""
        return describe_lost(self.attempts)

    def last_value(self, name: str, line: str = "") -> float | None:
        """The last point of a curve; None without one, or if it is not a number."""
        lines = self.curves.get(name, {})
        points = lines.get(line) or next(iter(lines.values()), None)
        value = float(points[1][-1]) if points is not None and len(points[1]) else math.nan
        return value if math.isfinite(value) else None

    @property
    def images_per_s(self) -> float | None:
        """Median of the training's speed; None if it was not logged."""
        points = self.curves.get("images_per_s", {}).get("")
        return float(np.nanmedian(points[1])) if points is not None else None


def describe_lost(attempts: Sequence[AttemptFacts]) -> str:
    """Steps that were computed again: ``N``, ``N or more`` where a last step was lost with its attempt, ``unknown``."""
    known = [attempt.lost for attempt in attempts if attempt.lost is not None]
    if len(known) == len(attempts):
        return f"{sum(known)}"
    return f"{sum(known)} or more" if sum(known) else "unknown"


def read_facts(run: RunDir, label: str) -> RunFacts:
    """Read a run folder.

    Args:
        run: The folder, which has a recipe.
        label: What the page calls the run.
    """
    recipe = config.read_yaml(run.config)
    read = curves.read_curves(run)
    lines = files.read_lines(run.attempts, {"event": str, "attempt": int}, FIELDS)
    attempts = _read_attempts(group_by_attempt(lines))
    done = run.finished
    journal = files.read_lines(run.journal, {"step": int}) if not done else []
    ends = [attempt.last_step or attempt.first_step for attempt in attempts[-1:]]
    step = int(done["step"]) if done else max([line["step"] for line in journal[-1:]] + ends, default=0)
    return RunFacts(
        run,
        label,
        recipe,
        read,
        attempts,
        step,
        step if done else _total_steps(recipe, read, step),
        done is not None,
        measure_uptime(run, last_written(run)),
        _read_machinery(run),
    )


def read_values(facts: RunFacts) -> dict[str, Any]:
    """The recipe as a flat dict by dotted key, without what the header says about its origin."""
    return config.flatten({key: value for key, value in facts.recipe.items() if key != "about"})


def name_runs(runs: list[RunDir]) -> list[str]:
    """Name runs by as many of the last parts of their paths as make the names differ."""
    for depth in range(1, max((len(run.root.parts) for run in runs), default=1) + 1):
        names = ["/".join(run.root.parts[-depth:]) for run in runs]
        if len(set(names)) == len(names):
            return names
    return [str(run.root) for run in runs]


def _read_attempts(groups: list[AttemptLines]) -> list[AttemptFacts]:
    attempts = []
    for k, group in enumerate(groups):
        first = int(group.start.get("first_step") or 0)
        steps = [end["last_step"] for end in group.ends if isinstance(end.get("last_step"), int)]
        last = steps[-1] if steps else None
        # one that never began has only the last step that was known: it resumed nothing, and lost nothing
        following = next((other.start for other in groups[k + 1 :] if not other.start.get("never_began")), None)
        resumed = None if following is None or group.start.get("never_began") else int(following.get("first_step") or 0)
        errors = [str(end.get("why") or ", ".join(map(str, end.get("signals") or ()))) for end in group.ends]
        world = group.start.get("world")
        attempts.append(
            AttemptFacts(
                int(group.start["attempt"]),
                first,
                last,
                0 if resumed is None else None if last is None else max(0, last - resumed),
                group.cause or "",
                next((error for error in reversed(errors) if error), ""),
                to_unix_time(group.start.get("began") or group.start.get("time")),
                max((to_unix_time(end.get("time")) for end in group.ends), default=0.0),
                str(group.start.get("host", "")),
                world if isinstance(world, int) else 0,
            )
        )
    return attempts


def _total_steps(recipe: dict[str, Any], read: Curves, step: int) -> int | None:
    """Steps of a training that is not finished: from the recipe, and from the length of its epochs so far."""
    schedule = recipe.get("schedule") or {}
    if schedule.get("steps"):
        return int(schedule["steps"])
    epochs = next((float(points[0][-1]) for name in ("lr", "loss") for points in read.get(name, {}).values()), 0.0)
    return round(step / epochs * float(schedule["epochs"])) if epochs and schedule.get("epochs") else None


def _read_machinery(run: RunDir) -> dict[str, Any]:
    for folder in sorted(run.checkpoints.glob("step-*"), reverse=True):
        manifest = files.read_record(folder / "manifest.json", {"machinery": dict})
        if manifest is not None:
            machinery: dict[str, Any] = manifest["machinery"]
            return machinery
    return {}


def has_readable_recipe(run: RunDir) -> bool:
    """Whether the recipe of a folder can be read; a folder that is being created has none yet."""
    try:
        config.read_yaml(run.config)
    except ConfigError:
        return False
    return True
