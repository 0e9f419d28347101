"""The one exported format: a safetensors file that says what it is.

Keys are ``backbone.<torchvision name>``; the header carries architecture, normalisation, image size, the
run's fingerprint and the step, so that nobody guesses an architecture from key names. Reading is strict: a
missing or unused key is an error that shows both lists. (The MSF release copied what fitted and printed the
rest: its linear evaluation ran on a silently random backbone.)
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from hpcssl import files
from hpcssl.errors import EvalError
from hpcssl.nets import resnet
from hpcssl.nets.resnet import Arch

FORMAT = "hpcssl-weights-1"
PREFIX = "backbone."
FIELDS = ("format", "arch", "mean", "std", "size", "fingerprint", "step", "method")
COUNTERS = "num_batches_tracked"
"""Of training batches, in norm layers: nothing reads them, and not every project keeps them."""
WHOLE_UP_TO = 64
"""Pixels a side up to which an evaluation looks at the whole image, and not at its centre."""


def pack(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file as bytes, the same bytes for the same content.

    The library writes its metadata in the order of a randomly seeded hash map; here the header is sorted.
    """
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    body = safetensors.torch.save(plain, dict(metadata))
    size = int.from_bytes(body[:8], "little")
    header = json.loads(body[8:8 + size])
    header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8, as the format asks
    return len(text).to_bytes(8, "little") + text + body[8 + size:]


def save(path: Path | str, backbone: nn.Module, arch: Arch, *, mean: Sequence[float], std: Sequence[float],
         size: int, fingerprint: str, step: int | None, method: str) -> str:
    """Write the backbone atomically; the same weights give the same bytes. Returns the file's sha256.

    ``mean`` and ``std`` are per RGB channel on the scale 0-1, ``size`` the side of the views in pixels; ``step`` is
    None where another project trained.
    """
    tensors = {PREFIX + name: value for name, value in state_of(backbone).items()}
    body = pack(tensors, {
        "format": FORMAT, "arch": arch.to_json(), "mean": json.dumps([float(x) for x in mean]),
        "std": json.dumps([float(x) for x in std]), "size": str(int(size)), "fingerprint": fingerprint,
        "step": "" if step is None else str(int(step)), "method": method})
    files.atomic_write(path, body)
    return files.digest(path)


def load(path: Path | str) -> tuple[nn.Module, dict]:
    """The backbone on the CPU, in eval mode and frozen, and its header: ``arch`` (Arch), ``mean`` and ``std`` (lists),
    ``size`` and ``step`` (ints; no step in others' encoders), ``fingerprint``, ``method``, ``format``. Strict.

    Raises ``EvalError`` for a file that is not ours, or whose keys or shapes are not the architecture's.
    """
    with _open(path) as file:
        meta = _meta(path, file.metadata() or {})
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    backbone = resnet.build(meta["arch"])
    wanted = {PREFIX + name: value for name, value in state_of(backbone).items()}
    missing, unused = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    if missing or unused:
        raise EvalError(f"weights {path}",
                        got=f"missing keys {some(missing)} and unused keys {some(unused)}",
                        expected=f"exactly the {len(wanted)} keys of {meta['arch'].arch}",
                        mend="name a file that `hpcssl export` wrote")
    wrong = [f"{name} {list(tensors[name].shape)} instead of {list(wanted[name].shape)}"
             for name in sorted(wanted) if tensors[name].shape != wanted[name].shape]
    if wrong:
        raise EvalError(f"weights {path}", got=some(wrong), expected=f"the shapes of {meta['arch'].arch}",
                        mend="name a file of this architecture")
    # buffers that count training batches are not stored; load_state_dict would ask for them
    backbone.load_state_dict(backbone.state_dict() | {n.removeprefix(PREFIX): t for n, t in tensors.items()})
    return backbone.eval().requires_grad_(False), meta


def state_of(backbone: nn.Module) -> dict[str, Tensor]:
    """The backbone's tensors without ``COUNTERS``."""
    return {n: t for n, t in backbone.state_dict().items() if not n.endswith(COUNTERS)}


def _open(path: Path | str):
    path = Path(path)
    if not path.is_file():
        raise EvalError(f"weights {path}", got="no such file", expected="a .safetensors file of this project",
                        mend="look into RUN/weights, or write one with `hpcssl export`")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise EvalError(f"weights {path}", got=f"a file that safetensors cannot read ({error})",
                        expected="a whole .safetensors file of this project",
                        mend="export it again with `hpcssl export` (pickles are not opened)") from error


def _meta(path: Path | str, raw: Mapping[str, str]) -> dict:
    if raw.get("format") != FORMAT or any(name not in raw for name in FIELDS):
        raise EvalError(f"weights {path}", got=f"the header {dict(sorted(raw.items()))}"[:300],
                        expected=f"the format {FORMAT} with " + ", ".join(FIELDS[1:]),
                        mend="export the weights with `hpcssl export`")
    try:
        return {"format": FORMAT, "arch": Arch.from_json(raw["arch"]), "mean": json.loads(raw["mean"]),
                "std": json.loads(raw["std"]), "size": int(raw["size"]),
                "step": int(raw["step"]) if raw["step"] else None, "fingerprint": raw["fingerprint"],
                "method": raw["method"]}
    except (ValueError, TypeError) as error:
        raise EvalError(f"weights {path}", got=f"a header that cannot be read ({error})",
                        expected="the header that `hpcssl export` writes",
                        mend="export the weights again with this version of hpcssl") from error


def some(words: list[str], most: int = 8) -> str:
    rest = f" and {len(words) - most} more" if len(words) > most else ""
    return "[" + ", ".join(words[:most]) + "]" + rest
