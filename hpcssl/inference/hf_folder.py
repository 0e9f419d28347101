"""Write an encoder as a folder that timm and transformers load, with a model card.

Both libraries build timm's ResNet, which computes the same as torchvision's: timm by ``local-dir:FOLDER`` or, once the
folder is uploaded, ``hf-hub:NAME``; transformers as its ``TimmWrapperModel``. Neither has our stems for small images.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from hpcssl import config, files
from hpcssl.evals.registry import EVALS
from hpcssl.evals.rows import Row, read_rows
from hpcssl.inference.model_card import CardFacts, format_card
from hpcssl.nets import exporters, importers, resnet, tensor_file
from hpcssl.nets.importers import WeightsSource
from hpcssl.nets.run_weights import find_run
from hpcssl.run_dir import RunDir

_PRIVATE_SECTIONS = ("machine", "evals")  # of the recipe: where and how fast it ran, not what was trained
_PATHS = {"data": ("train", "val", "stage_dir"), "model": ("weights",)}  # of the machine, by section


def write_hf_folder(source: WeightsSource, target: Path) -> str:
    """Write ``README.md``, ``config.json``, ``model.safetensors`` and ``preprocessor_config.json``.

    For weights of a run there is also ``recipe.yaml``, without the paths of the machine, and the card has the scores
    that the run's evaluations gave these weights.

    Args:
        source: The weights.
        target: The folder; it must not exist.

    Returns:
        The sha256 of ``model.safetensors``.

    Raises:
        EvalError: The weights cannot be read, the folder exists, or it is a network that timm does not have.
    """
    backbone, meta = importers.load(source)
    exporters.check_architecture("hf", meta["arch"], fix="use --layout onnx, which takes every network")
    exporters.check_new_folder("hf", target)
    width = resnet.feature_width(backbone)
    settings = exporters.build_timm_config(meta, width)
    run = find_run(source.path)
    recipe = {} if run is None else _public_recipe(run)
    body = tensor_file.pack(_all_tensors(backbone), {"format": "pt"}, checksum=False)
    rows = [] if run is None else find_scores(run, source.sha256)
    with files.atomic_dir(target) as folder:
        (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
        (folder / "model.safetensors").write_bytes(body)
        (folder / "preprocessor_config.json").write_text(
            json.dumps({"image_processor_type": "TimmWrapperImageProcessor", **_processor(settings)}, indent=2) + "\n"
        )
        facts = CardFacts(
            name=target.name,
            meta=meta,
            width=width,
            weights_sha256=source.sha256,
            model_sha256=files.sha256_of_file(folder / "model.safetensors"),
            data_sha256="" if run is None else _data_digest(run),
            recipe=recipe,
            rows=rows,
        )
        (folder / "README.md").write_text(format_card(facts))
        if recipe:
            (folder / "recipe.yaml").write_text(config.to_yaml(recipe))
    return files.sha256_of_file(target / "model.safetensors")


def find_scores(run: RunDir, weights_sha256: str) -> list[Row]:
    """Return the result rows of a run that score these weights, by evaluation and then by age."""
    rows = [row for name in sorted(EVALS) for row in read_rows(run, name)]
    return [row for row in rows if row["weights_sha256"] == weights_sha256]


def _all_tensors(backbone: nn.Module) -> dict[str, Any]:
    """The whole state dict, with batch counters: transformers reports what is missing as newly initialized."""
    return {name: value.contiguous() for name, value in backbone.state_dict().items()}


def _processor(settings: dict[str, Any]) -> dict[str, Any]:
    """The part of timm's settings by which transformers prepares an image."""
    names = ("input_size", "mean", "std", "crop_pct", "crop_mode", "interpolation")
    prepared = {name: settings["pretrained_cfg"][name] for name in names}
    return {"architecture": settings["architecture"], "pretrained_cfg": prepared}


def _public_recipe(run: RunDir) -> dict[str, Any]:
    values = {name: value for name, value in config.read_yaml(run.config).items() if name not in _PRIVATE_SECTIONS}
    for section, paths in _PATHS.items():
        if isinstance(options := values.get(section), dict):
            values[section] = {name: value for name, value in options.items() if name not in paths}
    return values


def _data_digest(run: RunDir) -> str:
    record = files.read_record(run.data, {"train": str}) or {}
    return str(record.get("train", ""))
