"""The model card of an exported encoder: README.md with the header that the Hugging Face hub reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import hpcssl
from hpcssl import config
from hpcssl.evals.rows import Row


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What the card states.

    Attributes:
        name: Name of the folder.
        meta: Header of the weights file.
        width: Number of features.
        weights_sha256: Digest of the weights file that was exported.
        model_sha256: Digest of ``model.safetensors``.
        data_sha256: Digest of the training shards; empty if it is not known.
        recipe: The recipe without private parts; empty if it is not known.
        rows: Result rows of these weights.
    """

    name: str
    meta: dict[str, Any]
    width: int
    weights_sha256: str
    model_sha256: str
    data_sha256: str
    recipe: dict[str, Any]
    rows: list[Row]


def format_card(facts: CardFacts) -> str:
    """Return the text of the card."""
    meta = facts.meta
    size, arch = meta["size"], meta["arch"].arch
    recipe = facts.recipe.get("name", "")
    step = "" if meta["step"] is None else f", step {meta['step']}"
    origin = f"with {meta['method']} (recipe {recipe}{step})" if recipe else f"with {meta['method']}{step}"
    return f"""---
{config.to_yaml(_header(facts)).rstrip()}
---

# {facts.name}

{arch} without a classifier, trained {origin} by hpcssl {hpcssl.__version__}.
It maps an image of {size} x {size} pixels to {facts.width} features. Choose a license before you publish it.

## Use

```python
import timm

model = timm.create_model("local-dir:{facts.name}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
features = model(transform(image)[None])  # [1, {facts.width}], for a PIL image in RGB
```

```python
from transformers import AutoImageProcessor, AutoModel

processor, model = AutoImageProcessor.from_pretrained("{facts.name}"), AutoModel.from_pretrained("{facts.name}").eval()
features = model(**processor(image)).pooler_output
```

Once it is uploaded, the name is `hf-hub:USER/{facts.name}` for timm and `USER/{facts.name}` for transformers.

## Scores

{_scores(facts.rows)}

## Origin

{_table(("what", "value"), _origin(facts))}
{_recipe(facts)}"""


def _header(facts: CardFacts) -> dict[str, Any]:
    method = facts.meta["method"]
    header: dict[str, Any] = {
        "library_name": "timm",
        "pipeline_tag": "image-feature-extraction",
        "tags": ["timm", "transformers", "image-feature-extraction", "self-supervised-learning", "hpcssl", method],
    }
    if facts.rows:
        header["model-index"] = [{"name": facts.name, "results": [_result(row) for row in facts.rows]}]
    return header


def _result(row: Row) -> dict[str, Any]:
    return {
        "task": {"type": "image-classification", "name": f"{row['eval']} evaluation"},
        "dataset": {"type": "image-folder", "name": _data_name(row), "revision": row["val"]},
        "metrics": [
            {"type": name, "name": f"{row['eval']} {name}", "value": round(value, 4)}
            for name, value in row["metrics"].items()
        ],
    }


def _scores(rows: list[Row]) -> str:
    if not rows:
        return "These weights have not been evaluated by hpcssl."
    cells = [
        (row["eval"], _data_name(row), name, f"{value:.2f}", f"`{row['identity'][:12]}`")
        for row in rows
        for name, value in row["metrics"].items()
    ]
    return "Scores are percentages.\n\n" + _table(("evaluation", "scored on", "metric", "score", "identity"), cells)


def _origin(facts: CardFacts) -> list[tuple[str, str]]:
    meta = facts.meta
    rows = [
        ("method", meta["method"]),
        ("step", "" if meta["step"] is None else str(meta["step"])),
        ("normalization", f"mean {meta['mean']}, std {meta['std']}, RGB on the scale 0-1"),
        ("sha256 of the exported weights file", f"`{facts.weights_sha256}`"),
        ("sha256 of model.safetensors", f"`{facts.model_sha256}`"),
        ("fingerprint of the run", f"`{meta['fingerprint']}`" if meta["fingerprint"] else ""),
        ("digest of the training shards", f"`{facts.data_sha256}`" if facts.data_sha256 else ""),
    ]
    return [(what, value) for what, value in rows if value]


def _recipe(facts: CardFacts) -> str:
    if not facts.recipe:
        return ""
    return f"\n## Recipe\n\n```yaml\n{config.to_yaml(facts.recipe).rstrip()}\n```\n"


def _data_name(row: Row) -> str:
    return str(row.get("val_name") or row["val"][:12])


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"
