"""Load encoders: this project's own files, and checkpoints of other projects.

A file is read without executing it, its keys are compared with every row of ``layouts``, the architecture is derived
from the shapes, and the load is strict: missing keys, and keys of the encoder that are not used, are an error that
shows both lists.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from hpcssl import files
from hpcssl.errors import ConfigError, EvalError, suggest
from hpcssl.nets import recognize, resnet, run_weights, unpack, weights
from hpcssl.nets.layouts import BY_NAME

LOG = logging.getLogger("hpcssl")


@dataclass(frozen=True)
class WeightsSource:
    """A weights file, and how to read it where the file itself does not say.

    Attributes:
        path: The file.
        layout: Name of the file's layout, ``hpcssl`` or one of ``layouts.BY_NAME``; None to recognize it.
        encoder: ``online`` or ``target``; None for the one that the layout's paper evaluates.
        mean: Mean per RGB channel on the scale 0-1; None for the file's or the layout's own.
        std: Standard deviation per RGB channel on the scale 0-1; None for the file's or the layout's own.
        size: Side of the images in pixels; None for the file's or the layout's own.

    Raises:
        ConfigError: If a value is unknown or out of its range.
    """

    path: Path | str
    layout: str | None = None
    encoder: str | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    size: int | None = None

    def __post_init__(self) -> None:
        known = ("hpcssl", *BY_NAME)
        if self.layout is not None and self.layout not in known:
            raise ConfigError(
                "layout of the weights",
                got=repr(self.layout),
                expected="a known layout",
                fix=suggest(self.layout, known),
            )
        if self.encoder not in (None, "online", "target"):
            raise ConfigError(
                "encoder of the weights",
                got=repr(self.encoder),
                expected="online or target",
                fix=suggest(self.encoder, ("online", "target")),
            )
        for name in ("mean", "std"):
            value = getattr(self, name)
            low = 0.0 if name == "mean" else 1e-6
            if value is not None and (len(value) != 3 or not all(low <= x <= 1 for x in value)):
                raise ConfigError(
                    f"{name} of the weights",
                    got=list(value),
                    expected="three numbers on the scale 0-1",
                    fix=f"set {name} to three numbers such as 0.5,0.5,0.5; divide values on the scale 0-255 by 255",
                )
        if self.size is not None and self.size < 1:
            raise ConfigError(
                "size of the weights",
                got=self.size,
                expected="a side in pixels",
                fix="set size to 224 or another number of pixels",
            )

    @classmethod
    def coerce(cls, source: WeightsSource | Path | str) -> WeightsSource:
        """Turn a path into a source that takes everything from the file. A source is returned as it is."""
        return source if isinstance(source, WeightsSource) else cls(source)

    @property
    def uses_defaults(self) -> bool:
        """Whether everything is taken from the file."""
        return self == WeightsSource(self.path)

    @property
    def sha256(self) -> str:
        """Identity of the features: the file's sha256, combined with this source's choices where it has any."""
        digest = files.sha256_of_file(self.path)
        if self.uses_defaults:
            return digest
        choices = [digest, self.layout, self.encoder, self.mean, self.std, self.size]
        return hashlib.sha256(json.dumps(choices).encode()).hexdigest()


def load(source: WeightsSource | Path | str) -> tuple[nn.Module, dict[str, Any]]:
    """Load the encoder of any known file.

    Args:
        source: A file of this project, or of another project with one of ``layouts``.

    Returns:
        The backbone, on the CPU, in eval mode and frozen; and a header as ``weights.load`` gives it. For another
        project's encoder, ``format`` and ``method`` are the layout's name, ``step`` is None and ``fingerprint`` empty.

    Raises:
        EvalError: If the file cannot be read, has no known layout or several, keys are missing or unused, or the
            architecture is unknown.
    """
    source = WeightsSource.coerce(source)
    if _is_own_file(source.path) or source.layout == "hpcssl":
        if source.layout not in (None, "hpcssl") or source.encoder == "target":
            raise EvalError(
                f"weights {source.path}",
                got="a file of this project, which holds one encoder",
                expected=f"a file of {source.layout}" if source.layout else "a file with a target encoder",
                fix="leave --layout and --encoder out",
            )
        backbone, meta = weights.load(source.path)
    else:
        backbone, meta = _load_foreign(source)
    choices = {"mean": source.mean and list(source.mean), "std": source.std and list(source.std), "size": source.size}
    return backbone, meta | {name: value for name, value in choices.items() if value is not None}


def load_backbone(
    path: Path | str,
    layout: str | None = None,
    encoder: str | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    size: int | None = None,
    step: int | str = "last",
) -> tuple[nn.Module, Callable[..., Tensor]]:
    """Load a frozen backbone for use, and the transform of its input.

    The transform is the evaluations' center crop. It resizes the short side to 256/224 of the size (for sizes up to 64
    pixels, to the size itself), takes the center, and normalizes as the encoder was trained.

    Example::

        import torch
        from PIL import Image
        from hpcssl import load_backbone

        backbone, transform = load_backbone("runs/msf")  # or a weights file
        image = transform(Image.open("cat.jpg"))  # [3, S, S]
        features = backbone(image[None])  # [1, F]

    Args:
        path: A run folder; or a file of this project, or of another project with a known layout.
        layout: Name of the file's layout; None to recognize it.
        encoder: ``online`` or ``target``; None for the one that the layout's paper evaluates.
        mean: Mean per RGB channel on the scale 0-1; None for the file's own.
        std: Standard deviation per RGB channel on the scale 0-1; None for the file's own.
        size: Side of the images in pixels; None for the file's own.
        step: Which weights of a run folder: ``last`` (of a finished training, else the newest export), ``first``, or a
            number.

    Returns:
        The backbone, on the CPU, in eval mode and frozen, which maps [B, 3, S, S] to [B, F]; and the transform, which
        maps a PIL image to [3, S, S].

    Raises:
        EvalError: If the file cannot be read as a known encoder (see ``load``), or the run has no weights of this step.
        ConfigError: If an argument is unknown or out of its range.
    """
    from torchvision.transforms import v2

    path = run_weights.resolve_weights(path, step)
    backbone, meta = load(WeightsSource(path, layout, encoder, mean, std, size))
    side = meta["size"]
    transform = v2.Compose(
        [
            v2.RGB(),
            v2.Resize(weights.resized_side(side)),
            v2.CenterCrop(side),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(meta["mean"], meta["std"]),
        ]
    )
    return backbone, transform


def _is_own_file(path: Path | str) -> bool:
    if not Path(path).is_file() or not unpack.is_safetensors(path):
        return False
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError):
        return False
    # by more than one entry, so that a damaged one does not turn the file into another project's
    return metadata.get("format", "").startswith("hpcssl") or len(metadata.keys() & weights.FIELDS) > 2


def _load_foreign(source: WeightsSource) -> tuple[nn.Module, dict[str, Any]]:
    content = unpack.read_checkpoint(source.path)
    match = recognize.find_match(content, f"weights {source.path}", source.layout, source.encoder)
    if match.layout.name == "mmselfsup" and re.search(r"style\W+caffe", str(content.get("meta", ""))):
        raise EvalError(
            f"weights {source.path}",
            got="a backbone of style caffe, whose strides lie in other layers",
            expected="style pytorch, which has the same keys",
            fix="name a checkpoint of style pytorch",
        )
    arch = match.arch
    assert arch is not None  # a strict match has one
    with torch.device("meta"):
        backbone = resnet.build(arch)
    backbone = backbone.to_empty(device="cpu")
    # batch counters are not taken from the file, but load_state_dict requires them
    counters = {
        name: torch.zeros_like(value)
        for name, value in backbone.state_dict().items()
        if name.endswith(weights.COUNTER_SUFFIX)
    }
    backbone.load_state_dict(counters | match.tensors)
    spec = match.input_spec
    mean, std = spec.normalization
    LOG.info(
        "%s: using the %s encoder of layout %s, %s with the %s stem; images of %d pixels, mean %s, std %s.",
        source.path,
        match.encoder,
        match.layout.name,
        arch.arch,
        spec.stem,
        source.size or spec.size,
        source.mean or mean,
        source.std or std,
    )
    return backbone.eval().requires_grad_(False), {
        "format": match.layout.name,
        "arch": arch,
        "mean": list(mean),
        "std": list(std),
        "size": spec.size,
        "step": None,
        "fingerprint": "",
        "method": match.layout.name,
    }
