"""The commands that lead on from one that has ended, as words."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hpcssl.inference import embeddings, onnx_file
from hpcssl.nets import importers
from hpcssl.nets.importers import WeightsSource
from hpcssl.nets.run_weights import find_run


def embed_command(run: Path, images: Path) -> list[str | Path]:
    """Return the command that writes the features of images by the encoder of a run, in a format that works here.

    Args:
        run: The run folder.
        images: The images.
    """
    return ["hpcssl", "embed", "--run", run, images, "--to", f"{run.resolve().name}{embeddings.default_suffix()}"]


def export_commands(metadata: Mapping[str, Any]) -> list[str | Path]:
    """Return the command that writes the encoder of a file of features as ONNX; nothing where packages lack for it.

    Args:
        metadata: The record of the file.
    """
    if any(importlib.util.find_spec(name) is None for name in onnx_file.PACKAGES):
        return []
    path = Path(metadata["weights"])
    run = find_run(path)
    if run is not None and metadata["step"] is not None:
        encoder: list[str | Path] = ["--run", run.root, "--step", str(metadata["step"])]
        name = run.root.resolve().name
    else:
        encoder, name = ["--weights", path], path.stem
    choices = dict(metadata["weights_options"])
    words: list[str | Path] = ["hpcssl", "export", *encoder, "--layout", "onnx", "--to", f"{name}.onnx"]
    for field, value in choices.items():
        if value is not None:
            option = "from" if field == "layout" else field
            words += [f"--{option}", ",".join(map(str, value)) if isinstance(value, list) else str(value)]
    return words


def load_commands(source: WeightsSource | Path, target: Path, layout: str) -> list[str]:
    """Return a command that loads an exported file by the library that it is for; nothing for other layouts.

    Args:
        source: The weights that were exported.
        target: The file or folder that was written.
        layout: Its layout.
    """
    if layout == "hf":
        code = (
            f"import timm; print(timm.create_model({json.dumps(f'local-dir:{target}')}, pretrained=True).num_features)"
        )
        return ["python", "-c", code]
    if layout != "onnx":
        return []
    size = importers.load(source)[1]["size"]
    code = (
        "import numpy, onnxruntime; "
        f"session = onnxruntime.InferenceSession({json.dumps(str(target))}); "
        f'images = numpy.random.rand(2, 3, {size}, {size}).astype("float32"); '
        'print(session.run(None, {"images": images})[0].shape)'
    )
    return ["python", "-c", code]
