"""The score that a search maximizes: a column of ``hpcssl results``, read from the result rows of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hpcssl import config, files
from hpcssl.errors import ConfigError
from hpcssl.run_dir import RunDir
from slurm.submission import Submission

if TYPE_CHECKING:
    from hpcssl.train.recipe import Recipe

_PREFERRED = ("20-NN", "1-NN")
"""Columns that are the objective if none is named and they are available."""


@dataclass(frozen=True)
class Objective:
    """A score of runs.

    Attributes:
        column: Its column in ``hpcssl results``.
        evaluation: Name of the evaluation whose rows have it.
        what: Text of the evaluation job that computes it after the training; empty if only the online k-NN does.
        pruning: Column of the online k-NN by which runs are pruned; empty if the recipe has no online k-NN.
    """

    column: str
    evaluation: str
    what: str
    pruning: str = ""

    def read_score(self, run: RunDir) -> float | None:
        """Return the score of a finished run: that of its last step, or the newest one of the online k-NN.

        None before the training is finished, and while the score is missing.
        """
        finished = run.finished
        scores = _read_scores(run, self.evaluation, self.column) if finished else {}
        if not finished or not scores:
            return None
        return scores.get(finished["step"]) if self.what else scores[max(scores)]

    def read_intermediate(self, run: RunDir) -> dict[int, float]:
        """Return the scores of the online k-NN by training step, without that of step 0."""
        scores = _read_scores(run, "knn", self.pruning)
        return {step: score for step, score in sorted(scores.items()) if step > 0}


def find_objective(submission: Submission, name: str) -> Objective:
    """Return the objective of a search by the name of its column.

    Args:
        submission: One run of the search.
        name: The column; empty for the 20-NN accuracy if it is computed, else for the first column.

    Raises:
        ConfigError: No evaluation computes it, or there is none at all.
    """
    online = _list_online_columns(submission.recipe)
    sources = dict.fromkeys(online, ("knn", ""))
    for what, evaluation in submission.evaluations.items():
        columns = _list_columns(evaluation.request.name, evaluation.options, evaluation.sets)
        sources |= dict.fromkeys(columns, (evaluation.request.name, what))
    if not sources:
        raise ConfigError(
            "sweep with --sampler",
            got="no evaluation whose score is known before it ran",
            expected="a score to maximize",
            fix="add --evals knn, or evals.knn_every_epochs=10",
        )
    column = name or next(column for column in (*_PREFERRED, *sources) if column in sources)
    if column not in sources:
        raise ConfigError(
            "option --objective",
            got=repr(name),
            expected="a score of these runs, by its column in hpcssl results",
            fix=f"choose one of {', '.join(sources)}",
        )
    evaluation_name, what = sources[column]
    pruning = next((one for one in (column, *_PREFERRED, *online) if one in online), "")
    return Objective(column, evaluation_name, what, pruning)


def _read_scores(run: RunDir, evaluation: str, column: str) -> dict[int, float]:
    """The scores of a column by step; of several at one step the first."""
    from hpcssl.evals.rows import ROW_FIELDS
    from hpcssl.results.columns import scores_by_column

    scores: dict[int, float] = {}
    for row in files.read_lines(run.eval_rows(evaluation), ROW_FIELDS):
        if row["step"] is not None and (score := scores_by_column(row).get(column)) is not None:
            scores.setdefault(row["step"], score)
    return scores


def _list_online_columns(recipe: Recipe) -> list[str]:
    """The columns of the online k-NN of a recipe; none if it has no online k-NN."""
    from hpcssl.evals.online_knn import load_evals_section

    section = load_evals_section(recipe)
    return _list_columns("knn", config.as_dict(section.knn), {}) if section.knn_every_epochs else []


def _list_columns(name: str, options: dict[str, Any], sets: dict[str, Any]) -> list[str]:
    """The columns that an evaluation fills, as far as they are known before it ran."""
    from hpcssl.evals.resolve import load_options
    from hpcssl.results.columns import scores_by_column

    resolved = load_options(name, options)
    folder = str(sets["train"].root).rstrip("/").split("/")[-2:] if "train" in sets else []
    row = {
        "eval": name,
        "options": config.as_dict(resolved),
        "metrics": dict.fromkeys(_list_metrics(name, resolved), 0.0),
        "train_name": "/".join(folder),
    }
    return list(scores_by_column(row))


def _list_metrics(name: str, options: Any) -> Sequence[str]:
    """Names of the scores in the rows of an evaluation; none for evaluations whose data sets decide them."""
    from hpcssl.evals.frozen.knn import metric_names

    if name == "knn":
        return [*metric_names(options.resolve()), *(["one_label"] if options.one_label_draws else [])]
    if name == "lowshot":
        return [f"lowshot_k{k}" for k in options.shots]
    return {"linear": ("top1", "top5"), "finetune": ("top1", "top5"), "svm": ("svm_map",)}.get(name, ())
