"""Learning curves of one or several runs as pictures: one per quantity, and one with all of them.

Runs that differ only in the seed are one line, their mean, in a band of one sample deviation. The colors are those of
Okabe and Ito, which are distinct for people with any color vision; line styles and markers differ too.
"""

from __future__ import annotations

import io
import logging
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from hpcssl import config, files
from hpcssl.errors import EvalError
from hpcssl.results.records import open_runs, result_keys
from hpcssl.run_dir import RunDir

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LOG = logging.getLogger("hpcssl")

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*", "h")
"""As many as make the first 44 pairs of line style and marker different."""
_JOURNAL = ("loss", "spread", "purity", "lr", "images_per_s")
_SCALARS = {"epoch": float, **dict.fromkeys(_JOURNAL, float | str)}  # a text: "nan", "inf"
WINDOWS = 100  # a noisy curve is averaged over windows of 1/WINDOWS of its steps

AXES = {
    "loss": "training loss",
    "knn": "k-NN top-1 (%)",
    "spread": "spread (0 collapsed, 1 even)",
    "purity": "same-label neighbors (%)",
    "lr": "learning rate",
    "images_per_s": "images per second",
}
LIMITS = {"spread": (0, 1), "purity": (0, 100), "lr": (0, None), "images_per_s": (0, None)}
_NOISY = ("loss", "spread", "purity")


Points = tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]
"""Epochs, and the values there."""
Curves = dict[str, dict[str, Points]]
"""Points by quantity and line, such as 20-NN; the line is '' if there is only one."""


@dataclass(frozen=True)
class RunGroup:
    """Runs that differ only in the seed.

    Attributes:
        label: Name for the legend.
        curves: The points of each run, by quantity and line.
        runs: The run folders.
    """

    label: str
    curves: dict[str, dict[str, list[Points]]]
    runs: tuple[RunDir, ...] = ()


def draw_curves(runs: Sequence[Path | str], folder: Path | str) -> list[Path]:
    """Draw ``curves.png`` and one picture of every quantity that the runs have logged.

    Args:
        runs: Run folders.
        folder: Folder for the pictures.

    Returns:
        The pictures.

    Raises:
        EvalError: A path is not a run folder, or no run has logged a step.
    """
    opened = open_runs(runs)
    curves = {run: read_curves(run) for run in opened}
    for run in opened:
        if not curves[run]:
            LOG.warning("%s has no steps yet.", run.root)
    if not any(curves.values()):
        raise EvalError(
            f"run folder {opened[0].root}",
            got="a journal without steps",
            expected="a run that has trained",
            fix="draw it after its first steps",
        )
    groups = group_by_seed({run: lines for run, lines in curves.items() if lines})
    logged = [name for name in AXES if any(name in group.curves for group in groups)]
    return [
        _draw_picture(Path(folder) / f"{stem}.png", groups, names)
        for stem, names in (("curves", logged), *((name, [name]) for name in logged))
    ]


# -- reading ------------------------------------------------------------------------------------------------


def group_by_seed(curves: dict[RunDir, Curves]) -> list[RunGroup]:
    """Group the curves of runs that differ only in the seed, in the order of the runs."""
    runs_by_key: dict[str, list[RunDir]] = {}
    for run in curves:
        recipe = config.read_yaml(run.config)
        trained_on = run.data.read_text() if run.data.exists() else ""
        key = config.fingerprint(result_keys(recipe) | {"name": recipe.get("name"), "on": trained_on})
        runs_by_key.setdefault(key, []).append(run)
    groups = []
    for label, members in zip(_labels(list(runs_by_key.values())), runs_by_key.values(), strict=True):
        joined: dict[str, dict[str, list[Points]]] = {}
        for run in members:
            for name, lines in curves[run].items():
                for line, points in lines.items():
                    joined.setdefault(name, {}).setdefault(line, []).append(points)
        groups.append(RunGroup(label, joined, tuple(members)))
    return groups


def _labels(groups: Sequence[Sequence[RunDir]]) -> list[str]:
    """Label groups by their run, or by their recipe for several seeds; by the path if labels would repeat."""
    namings: tuple[Callable[[RunDir], str], ...] = (
        lambda run: config.read_yaml(run.config).get("name", ""),
        lambda run: run.root.name,
        lambda run: str(run.root),
    )
    for naming in namings:
        labels = [
            ", ".join(dict.fromkeys(map(naming, group))) + f" (mean ± deviation of {len(group)} seeds)"
            if len(group) > 1
            else group[0].root.name
            for group in groups
        ]
        if len(set(labels)) == len(labels):
            return labels
    return [", ".join(str(run.root) for run in group) for group in groups]


def read_curves(run: RunDir) -> Curves:
    """Read the curves of a run from its journal and its k-NN results; empty for a run without steps."""
    journal = [line for line in files.read_lines(run.journal, {"step": int}, _SCALARS) if not line.get("eval")]
    if not journal:
        return {}
    per_epoch = _steps_per_epoch(journal)
    curves: Curves = {}
    for name in _JOURNAL:
        points = [(line["step"] / per_epoch, _to_float(line[name])) for line in journal if name in line]
        if points:
            epochs, values = np.array(points).T
            curves[name] = {
                "": _smooth(epochs, 100 * values if name == "purity" else values)
                if name in _NOISY
                else (epochs, values)
            }
    knn = _read_knn(run, per_epoch)
    return curves | ({"knn": knn} if knn else {})


def _to_float(value: float | str) -> float:
    try:
        return float(value)
    except ValueError:
        return math.nan


def _steps_per_epoch(journal: Sequence[dict[str, Any]]) -> float:
    """Return the steps of an epoch. The ``epoch`` of a line is that before its step: step 1 has epoch 0.

    It is rounded to the whole number that it is, for runs of other lengths to have points at the same epochs.
    """
    last = journal[-1]
    return float(round((last["step"] - 1) / last["epoch"]) if last.get("epoch") else last["step"])


def _smooth(epochs: npt.NDArray[np.float64], values: npt.NDArray[np.float64]) -> Points:
    """Average windows of steps, at the last step of each; a value that is not finite makes a gap."""
    width = max(1, len(values) // WINDOWS)
    length = len(values) // width * width
    return epochs[:length].reshape(-1, width)[:, -1], values[:length].reshape(-1, width).mean(1)


def _read_knn(run: RunDir, per_epoch: float) -> dict[str, Points]:
    """Return 1-NN and the majority vote with the largest k; the weighted vote if only that has the largest k."""
    scores: dict[str, dict[int, float]] = {}
    for row in files.read_lines(run.eval_rows("knn"), {"metrics": dict, "step": int}):
        for metric, value in row["metrics"].items():
            if re.fullmatch(r"knn\d+(_weighted)?", metric) and isinstance(value, float | int):
                scores.setdefault(metric, {}).setdefault(row["step"], value)
    majority = sorted((name for name in scores if "weighted" not in name), key=_neighbor_count)
    weighted = sorted((name for name in scores if "weighted" in name), key=_neighbor_count)
    if weighted and (not majority or _neighbor_count(weighted[-1]) > _neighbor_count(majority[-1])):
        majority.append(weighted[-1])
    lines = {}
    for name in dict.fromkeys([*majority[-1:], *majority[:1]]):
        steps = sorted(scores[name])
        title = f"{_neighbor_count(name)}-NN" + (" weighted" if "weighted" in name else "")
        lines[title] = (np.array(steps) / per_epoch, np.array([scores[name][step] for step in steps]))
    return lines


def _neighbor_count(metric: str) -> int:
    return int(re.findall(r"\d+", metric)[0])


# -- drawing ------------------------------------------------------------------------------------------------


def _draw_picture(path: Path, groups: Sequence[RunGroup], names: Sequence[str]) -> Path:
    from matplotlib.figure import Figure  # without pyplot: no window system, no global state

    columns = min(2, len(names))
    rows = math.ceil(len(names) / columns)
    figure = Figure(figsize=(6.4 * columns, 4.0 * rows), layout="constrained", dpi=150)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for panel, name in zip(panels, names, strict=False):
        draw_panel(panel, groups, name)
    for panel in panels[len(names) :]:
        panel.set_axis_off()
    handles = {
        line.get_label(): line
        for panel in reversed(panels)
        for line in reversed(panel.get_lines())
        if not line.get_label().startswith("_")
    }
    handles = {group.label: handles[group.label] for group in groups if group.label in handles}
    label_columns = max(1, 70 * columns // (8 + max(map(len, handles))))
    figure.legend(handles.values(), handles, loc="outside upper center", ncols=label_columns, frameon=False)
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})
    files.atomic_write(path, out.getvalue())
    return path


def draw_panel(axes: Axes, groups: Sequence[RunGroup], name: str) -> None:
    """Draw one quantity, a key of ``AXES``, of all groups."""
    kinds: dict[str, Any] = {}  # legend of the k of k-NN lines: by style, in gray
    for i, group in enumerate(groups):
        for j, (kind, members) in enumerate(group.curves.get(name, {}).items()):
            epochs, mean, spread = average_members(members)
            color, style = COLORS[i % len(COLORS)], STYLES[(j if kind else i) % len(STYLES)]
            every = 1 if name == "knn" else max(1, len(epochs) // 6)  # a curve with hundreds of markers is a bar
            axes.plot(
                epochs,
                mean,
                color=color,
                linestyle=style,
                linewidth=1.6,
                label=group.label,
                marker=MARKERS[i % len(MARKERS)] if name == "knn" or len(groups) > 1 else None,
                markevery=(i % every, every),
                markersize=4,
                gid=f"line-{i}-{j}",
            )
            if len(members) > 1:
                axes.fill_between(epochs, mean - spread, mean + spread, color=color, alpha=0.18, linewidth=0)
            if kind:
                kinds.setdefault(kind, axes.plot([], [], color="0.35", linestyle=style)[0])
    axes.set_xlabel("epoch")
    axes.set_ylabel(AXES[name])
    axes.set_xlim(left=0)
    if name in LIMITS:
        axes.set_ylim(*LIMITS[name])
    if kinds:
        axes.legend(kinds.values(), kinds, frameon=False)
    axes.grid(color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def average_members(
    members: Sequence[Points],
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return the epochs that all members have, and their mean and sample deviation there."""
    shared = members[0][0]
    for epochs, _ in members[1:]:
        shared = np.intersect1d(shared, epochs)
    values = np.stack([values[np.isin(epochs, shared)] for epochs, values in members])
    return shared, values.mean(0), values.std(0, ddof=1) if len(members) > 1 else np.zeros(len(shared))
