"""The summary of a page in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from hpcssl.methods.cmsf.options import LABELED_RULES
from hpcssl.report.facts import RunFacts, describe_lost
from hpcssl.results.columns import name_first_encoder

NO_LABELS = "Training used no labels: they only serve for the scores and frames below."


def summarize(runs: Sequence[RunFacts]) -> list[str]:
    """Describe runs in paragraphs of plain text."""
    if len(runs) == 1:
        return [describe_recipe(runs[0].recipe), " ".join(_describe_progress(runs[0])), *_describe_scores(runs[0])]
    states = Counter("finished" if r.is_finished else "not finished" if r.attempts else "not begun" for r in runs)
    recipes = Counter(str(run.recipe.get("name", "")) for run in runs)
    interruptions = sum(run.interruptions for run in runs)
    lost = describe_lost([attempt for run in runs for attempt in run.attempts])
    hours = sum(run.uptime.allocated for run in runs if run.uptime is not None) / 3600
    names = [f"{name} ({count})" if len(recipes) > 1 else name for name, count in recipes.items()]
    sentences = [
        f"{len(runs)} runs of {_list(names)}: {_list([f'{count} {state}' for state, count in states.items()])}.",
        f"Their jobs held their nodes for {hours:.3g} hours together, and were interrupted {_times(interruptions)}; "
        f"{_steps(lost)} computed again.",
    ]
    name = next((line for run in runs for line in run.curves.get("knn", {})), "")
    compared = [run for run in runs if name in run.curves.get("knn", {})]  # others have another number of neighbors
    scores = [(score, run.label) for run in compared if (score := run.last_value("knn", name)) is not None]
    if len(scores) > 1:
        best, worst = max(scores), min(scores)
        sentences.append(
            f"The last {name} accuracy is highest for {best[1]} ({best[0]:.1f} %) and lowest for {worst[1]} "
            f"({worst[0]:.1f} %)."
        )
    return [" ".join(sentences)]


def describe_recipe(recipe: dict[str, Any]) -> str:
    """Describe a recipe in a sentence, and whether its training uses labels."""
    model, optim, bank = (recipe.get(key) or {} for key in ("model", "optim", "bank"))
    method, schedule = (recipe.get(key) or {} for key in ("method", "schedule"))
    length = f"{schedule['steps']} steps" if schedule.get("steps") else f"{schedule.get('epochs', '?')} epochs"
    return (
        f"Method {method.get('name', '?')}, backbone {model.get('arch', '?')}, batch {optim.get('batch', '?')}, "
        f"{length}, memory bank of {bank.get('size', '?')} embeddings. "
        f"{'Training used labels.' if _uses_labels(method) else NO_LABELS}"
    )


def _uses_labels(method: dict[str, Any]) -> bool:
    return method.get("rule") in LABELED_RULES or (method.get("neighbors") or {}).get("rule") == "oracle"


def _describe_progress(run: RunFacts) -> list[str]:
    of = f" of {run.total}" if run.total else ""
    sentences = [f"The training {'finished' if run.is_finished else 'has done'} {run.step}{of} steps"]
    if run.attempts:
        sentences[0] += f" in {len(run.attempts)} attempt{'s' * (len(run.attempts) > 1)}"
    sentences[0] += "." if run.is_finished else f" ({run.state})."
    interrupted = {cause: count for cause, count in run.causes.items() if cause != "done"}
    if interrupted:
        causes = _list([f"{count} {cause}" for cause, count in interrupted.items()])
        sentences.append(
            f"It was interrupted {_times(run.interruptions)} ({causes}); {_steps(run.lost_text)} computed again."
        )
    if run.uptime is not None and run.uptime.step:
        sentences.append(
            f"It held its nodes for {_duration(run.uptime.allocated)}, of which {100 * run.uptime.share:.0f} % were "
            "spent in steps that counted."
        )
    if run.images_per_s is not None:
        sentences.append(f"Its median speed was {run.images_per_s:.4g} images per second.")
    first, last = _ends(run, "loss")
    if first is not None and last is not None:
        sentences.append(f"The loss went from {first:.4g} to {last:.4g}.")
    return sentences


def _describe_scores(run: RunFacts) -> list[str]:
    lines = run.curves.get("knn", {})
    sentences = []
    for name, (epochs, values) in lines.items():
        start = f"{name_first_encoder(run.recipe)} encoder" if epochs[0] == 0 else f"encoder of epoch {epochs[0]:.4g}"
        if len(values) == 1:
            sentences.append(f"{name} accuracy of the {start}: {values[0]:.1f} %.")
        else:
            verb = "rose" if values[-1] > values[0] else "fell" if values[-1] < values[0] else "stayed"
            sentences.append(
                f"{name} accuracy {verb} from {values[0]:.1f} % ({start}) to {values[-1]:.1f} % "
                f"(epoch {epochs[-1]:.4g})."
            )
    return [" ".join(sentences)] if sentences else []


def _ends(run: RunFacts, name: str) -> tuple[float | None, float | None]:
    points = run.curves.get(name, {}).get("")
    return (float(points[1][0]), run.last_value(name)) if points is not None else (None, None)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _steps(count: str) -> str:
    return "an unknown number of steps was" if count == "unknown" else f"{count} steps were"


def _times(count: int) -> str:
    return {0: "never", 1: "once", 2: "twice"}.get(count, f"{count} times")


def _list(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)
