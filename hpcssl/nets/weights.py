"""This project's format of exported weights: a safetensors file that says what it holds.

Keys are ``backbone.<torchvision name>``. The header carries the architecture, the normalization, the image size, the
run's fingerprint and the step, so that no reader guesses an architecture from key names. Reading is strict: a missing
or unused key is an error that shows both lists. (The MSF release copied the keys that fitted and printed the others,
so that its linear evaluation ran on a random backbone without an error.) A checksum in the header is verified.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from hpcssl import files
from hpcssl.errors import EvalError
from hpcssl.nets import resnet, tensor_file
from hpcssl.nets.resnet import Arch
from hpcssl.nets.tensor_file import DamagedFileError

FORMAT = "hpcssl-weights-1"
"""Name and version of the format, in the header."""
PREFIX = "backbone."
"""Prefix of all keys."""
FIELDS = ("format", "arch", "mean", "std", "size", "fingerprint", "step", "method")
"""Entries of the header."""
COUNTER_SUFFIX = "num_batches_tracked"
"""Last word of the keys of norm layers' batch counters. Nothing reads them, and not every project keeps them."""
WHOLE_IMAGE_MAX_SIZE = 64
"""Largest side in pixels for which an evaluation uses the whole image. Larger images are center-cropped."""


def resized_side(size: int) -> int:
    """Return the short side in pixels to which the evaluations resize an image before its center crop of ``size``."""
    return round(size * 256 / 224) if size > WHOLE_IMAGE_MAX_SIZE else size


def save(
    path: Path | str,
    backbone: nn.Module,
    arch: Arch,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    size: int,
    fingerprint: str,
    step: int | None,
    method: str,
) -> str:
    """Write a backbone atomically. The same weights give the same bytes.

    Args:
        path: The file to write.
        backbone: The backbone, on any device.
        arch: Its architecture.
        mean: Mean per RGB channel on the scale 0-1, subtracted from its input.
        std: Standard deviation per RGB channel on the scale 0-1.
        size: Side of the images in pixels.
        fingerprint: The run's fingerprint; empty for other projects' encoders.
        step: Training step; None for other projects' encoders.
        method: Name of the method.

    Returns:
        The file's sha256, in hexadecimal.
    """
    tensors = {PREFIX + name: value for name, value in backbone_tensors(backbone).items()}
    tensor_file.write(
        Path(path),
        tensors,
        {
            "format": FORMAT,
            "arch": arch.to_json(),
            "mean": json.dumps([float(x) for x in mean]),
            "std": json.dumps([float(x) for x in std]),
            "size": str(int(size)),
            "fingerprint": fingerprint,
            "step": "" if step is None else str(int(step)),
            "method": method,
        },
    )
    return files.sha256_of_file(path)


def load(path: Path | str) -> tuple[nn.Module, dict[str, Any]]:
    """Read a file that ``save`` wrote. Keys and shapes must be exactly those of the architecture.

    Args:
        path: The file.

    Returns:
        The backbone, on the CPU, in eval mode and frozen; and its header: ``arch`` (``Arch``), ``mean`` and ``std``
        (lists of float), ``size`` (int), ``step`` (int, or None), ``fingerprint``, ``method`` and ``format`` (str).

    Raises:
        EvalError: If the file is damaged, has another format, or its keys or shapes are not those of its architecture.
    """
    tensors, raw = _read(path)
    meta = _parse_header(path, raw)
    backbone = resnet.build(meta["arch"])
    expected = {PREFIX + name: value for name, value in backbone_tensors(backbone).items()}
    missing, unused = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or unused:
        raise EvalError(
            f"weights {path}",
            got=f"missing keys {shorten_list(missing)} and unused keys {shorten_list(unused)}",
            expected=f"exactly the {len(expected)} keys of {meta['arch'].arch}",
            fix="name a file that `hpcssl export` wrote",
        )
    wrong_shapes = [
        f"{name} {list(tensors[name].shape)} instead of {list(expected[name].shape)}"
        for name in sorted(expected)
        if tensors[name].shape != expected[name].shape
    ]
    if wrong_shapes:
        raise EvalError(
            f"weights {path}",
            got=shorten_list(wrong_shapes),
            expected=f"the shapes of {meta['arch'].arch}",
            fix="name a file of this architecture",
        )
    # batch counters are not stored, but load_state_dict requires them
    backbone.load_state_dict(backbone.state_dict() | {n.removeprefix(PREFIX): t for n, t in tensors.items()})
    return backbone.eval().requires_grad_(False), meta


def backbone_tensors(backbone: nn.Module) -> dict[str, Tensor]:
    """The tensors of a backbone's state dict, without the batch counters of its norm layers."""
    return {n: t for n, t in backbone.state_dict().items() if not n.endswith(COUNTER_SUFFIX)}


def _read(path: Path | str) -> tuple[dict[str, Tensor], dict[str, str]]:
    path = Path(path)
    if not path.is_file():
        raise EvalError(
            f"weights {path}",
            got="no such file",
            expected="a .safetensors file of this project",
            fix="look into RUN/weights, or write one with `hpcssl export`",
        )
    try:
        return tensor_file.read(path)
    except (DamagedFileError, OSError) as error:
        raise EvalError(
            f"weights {path}",
            got=str(error),
            expected="an undamaged .safetensors file of this project",
            fix="restore it from a copy, or export it again (pickles are not opened); to export the last step of a run "
            "again, remove its done.json and run the training command once more",
        ) from error


def _parse_header(path: Path | str, raw: Mapping[str, str]) -> dict[str, Any]:
    if raw.get("format") != FORMAT or any(name not in raw for name in FIELDS):
        raise EvalError(
            f"weights {path}",
            got=f"the header {dict(sorted(raw.items()))}"[:300],
            expected=f"the format {FORMAT} with " + ", ".join(FIELDS[1:]),
            fix="export the weights with `hpcssl export`",
        )
    try:
        return {
            "format": FORMAT,
            "arch": Arch.from_json(raw["arch"]),
            "mean": json.loads(raw["mean"]),
            "std": json.loads(raw["std"]),
            "size": int(raw["size"]),
            "step": int(raw["step"]) if raw["step"] else None,
            "fingerprint": raw["fingerprint"],
            "method": raw["method"],
        }
    except (ValueError, TypeError) as error:
        raise EvalError(
            f"weights {path}",
            got=f"an unreadable header ({error})",
            expected="the header that `hpcssl export` writes",
            fix="export the weights again with this version of hpcssl",
        ) from error


def shorten_list(words: Sequence[str], most: int = 8) -> str:
    """Join words for a message: ``[a, b]``, with ``and N more`` after the first ``most``."""
    rest = f" and {len(words) - most} more" if len(words) > most else ""
    return "[" + ", ".join(words[:most]) + "]" + rest
