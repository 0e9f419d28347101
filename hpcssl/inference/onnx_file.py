"""Write an encoder as an ONNX file, and check it against PyTorch before the file gets its name."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hpcssl import files
from hpcssl.errors import ConfigError, EvalError
from hpcssl.nets import importers, resnet, weights
from hpcssl.nets.importers import WeightsSource

TOLERANCE = 1e-4
"""Largest difference between onnxruntime and PyTorch, relative to the largest feature."""
INPUT, OUTPUT = "images", "features"
_CHECKED_BATCHES = (1, 3)
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
"""What the export needs besides torch: the extra ``onnx``."""


class NormalizedEncoder(nn.Module):
    """A backbone with its normalization in front: images on the scale 0-1 in, features out.

    Args:
        backbone: Maps normalized images [B, 3, S, S] to features [B, D].
        mean: Mean per RGB channel on the scale 0-1.
        std: Standard deviation per RGB channel on the scale 0-1.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: nn.Module, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.backbone = backbone
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Compute features [B, D] of images [B, 3, S, S] on the scale 0-1."""
        features: Tensor = self.backbone((images - self.mean) / self.std)
        return features


def write_onnx(source: WeightsSource, target: Path) -> str:
    """Write the encoder as an ONNX file with the normalization inside.

    Input ``images``: fp32 [batch, 3, S, S], RGB on the scale 0-1, any batch, S as in the weights file. Output
    ``features``: fp32 [batch, D]. The normalization is part of the graph, because an encoder that gets images of
    another scale fails silently. Resize and crop are not; the file's metadata say how the evaluations do them.

    Args:
        source: The weights.
        target: The .onnx file.

    Returns:
        The file's sha256.

    Raises:
        ConfigError: A package is missing, or the target has another suffix.
        EvalError: The weights cannot be read, or onnxruntime computes other features.
    """
    if target.suffix != ".onnx":
        raise ConfigError(
            f"--to {target}",
            got=f"the suffix {target.suffix!r}",
            expected=".onnx",
            fix=f"--to {target.with_suffix('.onnx')}",
        )
    _require_packages()
    backbone, meta = importers.load(source)
    encoder = NormalizedEncoder(backbone, meta["mean"], meta["std"]).eval()
    content = _convert(encoder, meta, source)
    difference = measure_difference(content, encoder, meta["size"])
    if not difference <= TOLERANCE:
        raise EvalError(
            f"layout onnx, target {target}",
            got=f"features of onnxruntime that differ by {difference:.1e} of the largest one",
            expected=f"at most {TOLERANCE:g}",
            fix="try other versions of torch, onnxscript and onnxruntime; nothing was written",
        )
    files.atomic_write(target, content)
    return files.sha256_of_file(target)


def measure_difference(content: bytes, encoder: nn.Module, size: int) -> float:
    """Return the largest difference of the features of random images, relative to the largest feature.

    Args:
        content: The ONNX file.
        encoder: The module that it was written from.
        size: Side of the images in pixels.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    draw, worst = torch.Generator().manual_seed(0), 0.0
    for batch in _CHECKED_BATCHES:
        images = torch.rand(batch, 3, size, size, generator=draw)
        with torch.no_grad():
            expected = encoder(images)
        computed = torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0])
        if computed.shape != expected.shape:
            return float("inf")
        scale = float(expected.abs().max()) or 1.0
        difference = float((computed - expected).abs().max()) / scale
        worst = max(worst, difference if difference == difference else float("inf"))  # NaN differs from everything
    return worst


def _convert(encoder: nn.Module, meta: dict[str, Any], source: WeightsSource) -> bytes:
    size = meta["size"]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):  # the exporter reports its progress
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            encoder,
            (torch.zeros(2, 3, size, size),),
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes={"images": {0: torch.export.Dim("batch", min=1)}},
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    notes = {
        "producer": "hpcssl",
        "weights_sha256": source.sha256,
        "arch": meta["arch"].to_json(),
        "method": meta["method"],
        "step": "" if meta["step"] is None else str(meta["step"]),
        "input": f"RGB on the scale 0-1, {size} x {size} pixels",
        "normalization": f"inside: mean {meta['mean']}, std {meta['std']}",
        "resize": json.dumps(describe_resize(size)),
        "features": str(resnet.feature_width(encoder)),
    }
    del model.metadata_props[:]
    for key, value in sorted(notes.items()):
        entry = model.metadata_props.add()
        entry.key, entry.value = key, value
    content: bytes = model.SerializeToString(deterministic=True)
    return content


def describe_resize(size: int) -> dict[str, Any]:
    """How the evaluations turn an image into an input: short side in pixels, filter and center crop."""
    return {"short_side": weights.resized_side(size), "filter": "bilinear, antialiased", "center_crop": size}


def _require_packages() -> None:
    for name in PACKAGES:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ConfigError(
                "--layout onnx",
                got=f"no package {name} in this environment",
                expected=" and ".join(PACKAGES),
                fix="pip install 'hpcssl[onnx]'",
            ) from error
