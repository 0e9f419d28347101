"""One page about a run: scores, learning curves and nearest neighbors, in a single HTML file.

The file requests nothing: pictures and styles are part of it. It is readable on a phone and in dark mode.
"""

from __future__ import annotations

import base64
import html
import io
import re
from pathlib import Path
from typing import Any

from hpcssl import config, files
from hpcssl.attempts import group_by_attempt
from hpcssl.checkpoint.manager import checkpoint_digest
from hpcssl.data.reader import Reader
from hpcssl.errors import EvalError, HpcsslError
from hpcssl.evals.frozen.knn_options import ONE_LABEL
from hpcssl.methods.cmsf.options import LABELED_RULES
from hpcssl.results import curves, gallery
from hpcssl.results.columns import name_first_encoder
from hpcssl.results.curves import Points, RunGroup
from hpcssl.results.gallery import NeighborRows
from hpcssl.results.records import open_run
from hpcssl.run_dir import RunDir

CURVES = ("loss", "knn", "purity")
FIGURE = (4.4, 3.0)
"""Inches of a picture of a curve, at a text size of 10 points."""
SIDE = 96
"""Pixels of the side of an image."""
SCORES = {
    "knn1": ("1-NN", "share of validation images whose nearest training image has their label"),
    "knn20": ("20-NN", "the same, by a vote of the 20 nearest"),
    "one_label": ("one label", ONE_LABEL),
}
"""The k-NN scores that are shown: title and meaning."""

_STYLE = """
:root{color-scheme:light dark;--text:#1b1b1b;--back:#fff;--grid:#e2e2e2;--dim:#595959;--curve:#0072b2;--wrong:#b34700}
@media(prefers-color-scheme:dark){:root{--text:#e8e8e8;--back:#15171a;--grid:#3a3d42;--dim:#a8a8a8;--curve:#56b4e9;
--wrong:#e69f00}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1rem;max-width:62rem;font:16px/1.5 system-ui,sans-serif;color:var(--text);
background:var(--back)}
h1{font-size:1.5rem;line-height:1.2}h2{font-size:1.15rem;margin:2rem 0 .5rem}
p{max-width:44rem}small,figcaption,.dim{color:var(--dim)}code{overflow-wrap:anywhere}
table{border-collapse:collapse;width:100%}
th,td{text-align:left;vertical-align:top;padding:.35rem .75rem .35rem 0;border-bottom:1px solid var(--grid)}
td.number,th.number{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.curves{display:grid;gap:1rem;grid-template-columns:repeat(auto-fit,minmax(min(100%,19rem),1fr))}
figure{margin:0}svg{width:100%;height:auto;display:block}svg text{fill:currentColor}
.row{display:grid;grid-template-columns:repeat(9,minmax(0,1fr));gap:2px;margin:0 0 .4rem;max-width:44rem}
.row img{width:100%;aspect-ratio:1;display:block;border:3px solid transparent;image-rendering:pixelated}
.row img.query{border-color:var(--text)}.row img.same{border-color:var(--curve)}
.row img.other{border:3px dashed var(--wrong)}
"""


def write_html(folder: Path | str, path: Path | str) -> Path:
    """Write the page of a run.

    Args:
        folder: The run folder.
        path: The file.

    Returns:
        The path.

    Raises:
        EvalError: The folder is not that of a run, or it has not trained yet.
    """
    run = open_run(folder)
    read = curves.read_curves(run)
    drawn = {name: draw_svg(name, read[name]) for name in CURVES if name in read}
    if not drawn:
        raise EvalError(
            f"run folder {run.root}",
            got="a journal without steps",
            expected="a run that has trained",
            fix="write the page after its first steps",
        )
    recipe = config.read_yaml(run.config)
    title = f"{recipe.get('name', '')}: {run.root.name}"
    body = [
        f"<h1>{html.escape(title)}</h1>",
        f"<p>{html.escape(_describe_recipe(recipe))}</p>",
        *_attempts(run),
        *_scores(run, recipe),
        "<h2>Learning curves</h2><div class=curves>",
        *(
            f"<figure role=img aria-label='{html.escape(curves.AXES[name])} by epoch'>{svg}</figure>"
            for name, svg in drawn.items()
        ),
        "</div>",
        *_neighbors(run),
    ]
    text = (
        "<!doctype html><html lang=en><head><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width,initial-scale=1'>"
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>\n<body>"
    )
    files.atomic_write(Path(path), text + "\n".join(body) + "</body></html>\n")
    return Path(path)


def draw_svg(name: str, lines: dict[str, Points]) -> str:
    """Draw one quantity as an SVG element to stand in an HTML page.

    Args:
        name: A key of ``curves.AXES``.
        lines: Epochs and values of each line.

    Returns:
        The element. Axes and text have ``currentColor``, grid lines ``var(--grid)``, and the curves ``var(--curve)``.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    figure = Figure(figsize=FIGURE, layout="constrained")
    group = RunGroup("", {name: {line: [points] for line, points in lines.items()}})
    curves.draw_panel(figure.subplots(), [group], name)
    out = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):  # ids that differ from figure to figure
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = out.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text[text.index("<svg") :], flags=re.DOTALL)
    # an SVG in HTML needs no namespaces, and has the size that the page gives it
    tag, rest = text.split(">", 1)
    text = re.sub(r' (?:xmlns(?::xlink)?|version|width|height)="[^"]*"', "", tag) + ">" + rest
    colors = {"#000000": "currentColor", "#595959": "currentColor", "#e6e6e6": "var(--grid)"}
    for old, new in (colors | {curves.COLORS[0].lower(): "var(--curve)"}).items():
        text = text.replace(old, new)
    return text


def _describe_recipe(recipe: dict[str, dict[str, Any]]) -> str:
    model, optim, bank = recipe["model"], recipe["optim"], recipe["bank"]
    method, schedule = recipe["method"], recipe["schedule"]
    length = f"{schedule['steps']} steps" if schedule.get("steps") else f"{schedule['epochs']} epochs"
    return (
        f"Method {method['name']}, backbone {model['arch']}, batch {optim['batch']}, {length}, memory bank of "
        f"{bank['size']} embeddings. {'Training used labels.' if _uses_labels(method) else _NO_LABELS}"
    )


_NO_LABELS = "Training used no labels: they only serve for the scores and frames below."


def _uses_labels(method: dict[str, Any]) -> bool:
    return method.get("rule") in LABELED_RULES or (method.get("neighbors") or {}).get("rule") == "oracle"


def _attempts(run: RunDir) -> list[str]:
    """How often the training was interrupted, and the digest of its final state."""
    lines = files.read_lines(run.attempts, {"event": str, "attempt": int})
    sentences = [
        f"attempt {attempt.start['attempt']} from step {attempt.start.get('first_step') or 0}: "
        f"{attempt.cause or 'no end recorded'}"
        for attempt in group_by_attempt(lines)
    ]
    parts = [f"<p>{html.escape('; '.join(sentences))}.</p>"] if sentences else []
    try:
        digest = checkpoint_digest(run)
    except HpcsslError:  # the checkpoints were deleted
        return parts
    return [*parts, f"<p class=dim>sha256 of the newest checkpoint's whole state: <code>{digest}</code></p>"]


def _scores(run: RunDir, recipe: dict[str, Any]) -> list[str]:
    rows = sorted(files.read_lines(run.eval_rows("knn"), {"metrics": dict, "step": int}), key=lambda row: row["step"])
    if not rows:
        return []
    last = rows[-1]
    alike = [row for row in rows if all(row.get(key) == last.get(key) for key in ("options", "train", "val"))]
    first = alike[0]
    shown = [first, last] if first is not last else [last]
    head = [f"step {row['step']}" if row["step"] else name_first_encoder(recipe) for row in shown]
    cells = [
        f"<tr><td>{title}<br><small>{meaning}</small></td>"
        + "".join(f"<td class=number>{row['metrics'][name]:.1f} %</td>" for row in shown)
        + "</tr>"
        for name, (title, meaning) in SCORES.items()
        if name in first["metrics"] and name in last["metrics"]
    ]
    titles = "".join(f"<th class=number>{title}</th>" for title in head)
    return [f"<h2>Nearest-neighbor scores</h2><table><tr><th></th>{titles}</tr>", *cells, "</table>"]


def _neighbors(run: RunDir) -> list[str]:
    """Images with their nearest neighbors; a sentence without labels, a validation set or weights."""
    try:
        rows = gallery.find_neighbors(run, gallery.QUERIES, gallery.NEIGHBORS)
    except HpcsslError as error:
        return [f"<h2>Nearest neighbors</h2><p class=dim>Not shown: {html.escape(f'{error.what}: {error.got}')}.</p>"]
    return _draw_neighbors(rows)


def _draw_neighbors(shown: NeighborRows) -> list[str]:
    same, sets = shown.is_same_label, shown.sets
    lines = [
        "<h2>Nearest neighbors</h2>",
        f"<p>Left: a validation image. Beside it: the {shown.neighbors.shape[1]} training images that the encoder of "
        f"step {shown.step} finds most similar, the nearest first. {int(same.sum())} of {same.size} have the label of "
        "the image (solid frame); the others have a dashed frame.</p>",
    ]
    with Reader(sets["val"]) as val, Reader(sets["train"]) as train:
        for row, query in enumerate(shown.queries.tolist()):
            label = sets["val"].classes[sets["val"].labels[query]]
            images = [_image(val, query, "query", f"image of class {label}")]
            for column, neighbor in enumerate(shown.neighbors[row].tolist()):
                name = sets["train"].classes[sets["train"].labels[neighbor]]
                kind = "same" if same[row, column] else "other"
                text = f"neighbor {column + 1}: class {name}, cosine {shown.similarity[row, column]:.3f}"
                images.append(_image(train, neighbor, kind, text))
            lines.append(f"<div class=row>{''.join(images)}</div>")
    return lines


def _image(reader: Reader, index: int, kind: str, text: str) -> str:
    out = io.BytesIO()
    gallery.read_square(reader, index, SIDE).save(out, "PNG")
    source = "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()
    return f'<img class={kind} src="{source}" alt="{html.escape(text)}" title="{html.escape(text)}">'
