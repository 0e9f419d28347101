"""Learning curves of one or several runs as pictures: one per quantity, and all on one sheet.

Runs that differ in nothing but the seed are one line, their mean, in a band of one sample deviation. Colours are Okabe
and Ito's, which people with any colour vision tell apart; line styles and markers tell them apart without colours.
"""

from __future__ import annotations

import io
import logging
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hpcssl import config, files
from hpcssl.errors import EvalError
from hpcssl.files import RunDir
from hpcssl.results.records import open_runs, science

log = logging.getLogger("hpcssl")

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
WINDOWS = 100  # a noisy curve is averaged over 1/WINDOWS of its steps

AXES = {"loss": "training loss", "knn": "k-NN top-1 (%)", "spread": "spread of embeddings (0 collapsed, 1 even)",
        "purity": "neighbours with the query's label (%)", "lr": "learning rate"}
LIMITS = {"spread": (0, 1), "purity": (0, 100), "lr": (0, None)}
_NOISY = ("loss", "spread", "purity")


Points = tuple[np.ndarray, np.ndarray]  # epochs, and the values there
Curves = dict[str, dict[str, Points]]  # quantity -> line, such as 20-NN, or '' -> points


@dataclass(frozen=True)
class Group:
    """Runs that differ in the seed alone. ``curves``: quantity -> line -> the points of each run."""

    label: str
    curves: dict[str, dict[str, list[Points]]]


def draw(runs: Sequence[Path | str], folder: Path | str) -> list[Path]:
    """Write ``curves.png`` and a picture of each quantity there is; returns their paths. Raises ``EvalError``."""
    opened = open_runs(runs)
    curves = {run: curves_of(run) for run in opened}
    for run in opened:
        if not curves[run]:
            log.warning("%s has no steps yet", run.root)
    if not any(curves.values()):
        raise EvalError(f"run folder {opened[0].root}", got="a journal without steps",
                        expected="a run that has trained", mend="draw it once it has made its first steps")
    groups = _groups({run: found for run, found in curves.items() if found})
    there = [name for name in AXES if any(name in group.curves for group in groups)]
    return [_save(Path(folder) / f"{called}.png", groups, names)
            for called, names in (("curves", there), *((name, [name]) for name in there))]


# -- reading ------------------------------------------------------------------------------------------------


def _groups(curves: dict[RunDir, Curves]) -> list[Group]:
    together: dict[str, list[RunDir]] = {}
    for run in curves:
        recipe = config.read_yaml(run.config)
        trained_on = run.data.read_text() if run.data.exists() else ""
        key = config.fingerprint(science(recipe) | {"name": recipe.get("name"), "on": trained_on})
        together.setdefault(key, []).append(run)
    groups = []
    for label, members in zip(_labels(list(together.values())), together.values(), strict=True):
        joined: dict[str, dict[str, list]] = {}
        for run in members:
            for name, lines in curves[run].items():
                for line, points in lines.items():
                    joined.setdefault(name, {}).setdefault(line, []).append(points)
        groups.append(Group(label, joined))
    return groups


def _labels(groups: Sequence[Sequence[RunDir]]) -> list[str]:
    """The run's name, or its recipe's for several seeds; names in full where that would be the same twice."""
    for named in (lambda run: config.read_yaml(run.config).get("name", ""), lambda run: run.root.name,
                  lambda run: str(run.root)):
        labels = [", ".join(dict.fromkeys(map(named, group))) + f" (mean ± deviation of {len(group)} seeds)"
                  if len(group) > 1 else group[0].root.name for group in groups]
        if len(set(labels)) == len(labels):
            return labels
    return [", ".join(str(run.root) for run in group) for group in groups]


def curves_of(run: RunDir) -> Curves:
    """From the journal and the k-NN rows; nothing for a run without steps."""
    journal = [line for line in files.read_lines(run.journal, "step") if not line.get("eval")]
    if not journal:
        return {}
    per_epoch = _steps_per_epoch(journal)
    found = {}
    for name in ("loss", "spread", "purity", "lr"):
        points = [(line["step"] / per_epoch, float(line[name])) for line in journal if name in line]
        if points:
            epochs, values = np.array(points).T
            found[name] = {"": _smooth(epochs, 100 * values if name == "purity" else values)
                           if name in _NOISY else (epochs, values)}
    knn = _knn(run, per_epoch)
    return found | ({"knn": knn} if knn else {})


def _steps_per_epoch(journal: Sequence[dict]) -> float:
    """A line's ``epoch`` is that before its step: step 1 stands at 0."""
    last = journal[-1]
    return (last["step"] - 1) / last["epoch"] if last.get("epoch") else float(last["step"])


def _smooth(epochs: np.ndarray, values: np.ndarray) -> Points:
    """Means of neighbouring steps, at the last of them; what is not finite makes a gap."""
    width = max(1, len(values) // WINDOWS)
    whole = len(values) // width * width
    return epochs[:whole].reshape(-1, width)[:, -1], values[:whole].reshape(-1, width).mean(1)


def _knn(run: RunDir, per_epoch: float) -> dict[str, Points]:
    """1-NN and the majority vote of the most neighbours; the weighted vote where no majority voted."""
    scores: dict[str, dict[int, float]] = {}
    for row in files.read_lines(run.eval_rows("knn"), "metrics", "step"):
        for metric, value in row["metrics"].items():
            if re.fullmatch(r"knn\d+(_weighted)?", metric):
                scores.setdefault(metric, {}).setdefault(row["step"], value)
    majority = sorted((name for name in scores if "weighted" not in name), key=_neighbours)
    weighted = sorted((name for name in scores if "weighted" in name), key=_neighbours)
    if weighted and (not majority or _neighbours(weighted[-1]) > _neighbours(majority[-1])):
        majority.append(weighted[-1])
    lines = {}
    for name in dict.fromkeys([*majority[-1:], *majority[:1]]):
        steps = sorted(scores[name])
        title = f"{_neighbours(name)}-NN" + (" weighted" if "weighted" in name else "")
        lines[title] = (np.array(steps) / per_epoch, np.array([scores[name][step] for step in steps]))
    return lines


def _neighbours(metric: str) -> int:
    return int(re.search(r"\d+", metric)[0])


# -- drawing ------------------------------------------------------------------------------------------------


def _save(path: Path, groups: Sequence[Group], names: Sequence[str]) -> Path:
    from matplotlib.figure import Figure  # without pyplot: no window system, no global state

    columns = min(2, len(names))
    rows = math.ceil(len(names) / columns)
    figure = Figure(figsize=(6.4 * columns, 4.0 * rows), layout="constrained", dpi=150)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for panel, name in zip(panels, names, strict=False):
        _panel(panel, groups, name)
    for panel in panels[len(names):]:
        panel.set_axis_off()
    handles = {line.get_label(): line for panel in reversed(panels) for line in reversed(panel.get_lines())
               if not line.get_label().startswith("_")}
    handles = {group.label: handles[group.label] for group in groups if group.label in handles}
    abreast = max(1, 70 * columns // (8 + max(map(len, handles))))
    figure.legend(handles.values(), handles, loc="outside upper center", ncols=abreast, frameon=False)
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})
    files.atomic_write(path, out.getvalue())
    return path


def _panel(axes, groups: Sequence[Group], name: str) -> None:
    kinds = {}  # k of the k-NN lines: by style, in grey
    for i, group in enumerate(groups):
        for j, (kind, members) in enumerate(group.curves.get(name, {}).items()):
            epochs, mean, spread = _mean(members)
            colour, style = COLOURS[i % len(COLOURS)], STYLES[(j if kind else i) % len(STYLES)]
            axes.plot(epochs, mean, color=colour, linestyle=style, linewidth=1.6, label=group.label,
                      marker=MARKERS[i % len(MARKERS)] if name == "knn" else None, markersize=4)
            if len(members) > 1:
                axes.fill_between(epochs, mean - spread, mean + spread, color=colour, alpha=0.18, linewidth=0)
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


def _mean(members: Sequence[Points]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Epochs that all members have, their mean and sample deviation there."""
    shared = members[0][0]
    for epochs, _ in members[1:]:
        shared = np.intersect1d(shared, epochs)
    values = np.stack([values[np.isin(epochs, shared)] for epochs, values in members])
    return shared, values.mean(0), values.std(0, ddof=1) if len(members) > 1 else np.zeros(len(shared))
