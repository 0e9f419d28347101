"""Encoders of other projects: which layout a file has, which architecture, and nothing left to chance.

A file is read without executing it (``weights_only``), its keys are held against every row of ``layouts``, the
architecture is read off the shapes, and the load is strict: missing keys, and keys of the encoder that nothing takes,
are an error that shows both lists.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from hpcssl import files
from hpcssl.errors import ConfigError, EvalError, nearest
from hpcssl.nets import recognise, resnet, unpack, weights
from hpcssl.nets.layouts import BY_NAME

log = logging.getLogger("hpcssl")


@dataclass(frozen=True)
class Source:
    """A weights file, and how to read it where the file does not say.

    ``layout``: a row of ``layouts`` by name; None recognises it. ``encoder``: ``online`` or ``target``; None takes the
    one that the layout's paper evaluates. ``mean`` and ``std`` per RGB channel on the scale 0-1, and ``size`` in pixels
    replace the file's or the layout's. Raises ``ConfigError``.
    """

    path: Path | str
    layout: str | None = None
    encoder: str | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    size: int | None = None

    def __post_init__(self):
        known = ("hpcssl", *BY_NAME)
        if self.layout is not None and self.layout not in known:
            raise ConfigError("layout of the weights", got=repr(self.layout), expected="a known layout",
                              mend=nearest(self.layout, known))
        if self.encoder not in (None, "online", "target"):
            raise ConfigError("encoder of the weights", got=repr(self.encoder), expected="online or target",
                              mend=nearest(self.encoder, ("online", "target")))
        for name in ("mean", "std"):
            value = getattr(self, name)
            low = 0.0 if name == "mean" else 1e-6
            if value is not None and (len(value) != 3 or not all(low <= x <= 1 for x in value)):
                raise ConfigError(f"{name} of the weights", got=list(value), expected="three numbers on the scale 0-1",
                                  mend=f"--{name} 0.5,0.5,0.5; divide values on the scale 0-255 by 255")
        if self.size is not None and self.size < 1:
            raise ConfigError("size of the weights", got=self.size, expected="a side in pixels", mend="--size 224")

    @classmethod
    def of(cls, source: Source | Path | str) -> Source:
        return source if isinstance(source, Source) else cls(source)

    @property
    def plain(self) -> bool:
        """Whether everything is left to the file."""
        return self == Source(self.path)

    @property
    def sha256(self) -> str:
        """Of the file; where something is chosen here, of the file's and the choices, which decide the features too."""
        digest = files.digest(self.path)
        if self.plain:
            return digest
        chosen = [digest, self.layout, self.encoder, self.mean, self.std, self.size]
        return hashlib.sha256(json.dumps(chosen).encode()).hexdigest()


def load(source: Source | Path | str) -> tuple[nn.Module, dict]:
    """``weights.load`` for any known file: our own, or one of ``layouts``. Strict.

    The header of another project's encoder has ``format`` foreign, ``method`` the layout's name, ``step`` None and an
    empty ``fingerprint``. Raises ``EvalError``: not a file that can be read, no known layout or several, keys missing
    or unused, another architecture.
    """
    source = Source.of(source)
    if _is_ours(source.path) or source.layout == "hpcssl":
        if source.layout not in (None, "hpcssl") or source.encoder == "target":
            raise EvalError(f"weights {source.path}", got="a file of this project, which holds one encoder",
                            expected=f"a file of {source.layout}" if source.layout else "one with a target encoder",
                            mend="leave --layout and --encoder out")
        backbone, meta = weights.load(source.path)
    else:
        backbone, meta = _foreign(source)
    chosen = {"mean": source.mean and list(source.mean), "std": source.std and list(source.std), "size": source.size}
    return backbone, meta | {name: value for name, value in chosen.items() if value is not None}


def load_backbone(path: Path | str, **choices) -> tuple[nn.Module, Callable]:
    """A frozen backbone in eval mode, and the transform that turns a PIL image into its input [3, S, S].

    ``path``: a file of this project or of another known one; ``choices``: the fields of ``Source``. The transform is
    the evaluations' centre crop: the short side to 256/224 of the size, for images of up to 64 pixels to the size
    itself, with the file's own normalisation. Raises ``EvalError`` and ``ConfigError``.
    """
    from torchvision.transforms import v2

    backbone, meta = load(Source(path, **choices))
    size = meta["size"]
    transform = v2.Compose([
        v2.RGB(), v2.Resize(round(size * 256 / 224) if size > weights.WHOLE_UP_TO else size), v2.CenterCrop(size),
        v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(meta["mean"], meta["std"])])
    return backbone, transform


def _is_ours(path: Path | str) -> bool:
    if not Path(path).is_file() or not unpack.is_safetensors(path):
        return False
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("format", "").startswith("hpcssl")
    except (SafetensorError, OSError):
        return False


def _foreign(source: Source) -> tuple[nn.Module, dict]:
    tree = unpack.read(source.path)
    match = recognise.find(tree, f"weights {source.path}", source.layout, source.encoder)
    if match.layout.name == "mmselfsup" and re.search(r"style\W+caffe", str(tree.get("meta", ""))):
        raise EvalError(f"weights {source.path}", got="a backbone of style caffe, whose blocks stride elsewhere",
                        expected="style pytorch, which has the same keys", mend="name a checkpoint of style pytorch")
    with torch.device("meta"):
        backbone = resnet.build(match.arch)
    backbone = backbone.to_empty(device="cpu")
    # the counters of training batches are not taken over; load_state_dict would ask for them
    counters = {name: torch.zeros_like(value) for name, value in backbone.state_dict().items()
                if name.endswith(weights.COUNTERS)}
    backbone.load_state_dict(counters | match.tensors)
    (mean, std), look = match.look.colours, match.look
    log.info("%s: %s of %s, %s with the %s stem; images of %d pixels, mean %s, std %s", source.path, match.encoder,
             match.layout.name, match.arch.arch, look.stem, source.size or look.size, source.mean or mean,
             source.std or std)
    return backbone.eval().requires_grad_(False), {
        "format": match.layout.name, "arch": match.arch, "mean": list(mean), "std": list(std), "size": look.size,
        "step": None, "fingerprint": "", "method": match.layout.name}
