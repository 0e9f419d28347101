"""Read other projects' checkpoint files without executing anything in them."""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from hpcssl.errors import EvalError

_NUMPY = [f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")]
IGNORED_CLASSES = (
    "argparse.Namespace",
    "pathlib.PosixPath",
    "numpy.ndarray",
    "numpy.dtype",
    *_NUMPY,
    "mmengine.logging.history_buffer.HistoryBuffer",
)
"""Classes of objects that other projects store beside the tensors (options, scores, curves). They are not executed: a
placeholder replaces each object."""


class _Placeholder:
    """Takes the place of an object that nobody reads."""

    def __new__(cls, *args: object, **kwargs: object) -> _Placeholder:
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        pass


def read_checkpoint(path: Path | str) -> Mapping[Any, Any]:
    """Read a .pth, .pt, .ckpt, .tar, .torch or .safetensors file onto the CPU, without executing anything in it.

    Args:
        path: The file.

    Returns:
        Its content: a dictionary, possibly nested, of tensors and plain values.

    Raises:
        EvalError: If there is no such file, it is damaged, or it holds objects other than tensors, plain values and
            ``IGNORED_CLASSES``.
    """
    path = Path(path)
    if not path.is_file():
        raise EvalError(
            f"weights {path}",
            got="a folder" if path.is_dir() else "no such file",
            expected="a weights file",
            fix="look into RUN/weights, or name another project's checkpoint file",
        )
    if path.stat().st_size == 0:
        raise EvalError(
            f"weights {path}", got="an empty file", expected="a weights file", fix="copy or download it again"
        )
    content = _read_safetensors(path) if is_safetensors(path) else _read_pickle(path)
    if not isinstance(content, Mapping):
        raise EvalError(
            f"weights {path}",
            got=f"a {type(content).__name__}",
            expected="a dictionary of tensors",
            fix="save the network's state_dict()",
        )
    return content


def _read_safetensors(path: Path) -> Mapping[Any, Any]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError) as error:
        raise EvalError(
            f"weights {path}",
            got=f"a file that safetensors cannot read ({error})",
            expected="a complete .safetensors file",
            fix="copy or download it again",
        ) from error


def _read_pickle(path: Path) -> object:
    try:
        with (
            torch.serialization.safe_globals([(_Placeholder, name) for name in IGNORED_CLASSES]),
            warnings.catch_warnings(action="ignore"),  # about scripted models, which are refused below
        ):
            # mapped into memory: a bank or an optimizer beside the encoder may be larger than the memory
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path) or None)
    except pickle.UnpicklingError as error:
        raise _unpickling_error(path, error) from error
    except (
        RuntimeError,
        OSError,
        EOFError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        AssertionError,
        SafetensorError,  # torch passes files named .safetensors on to that library
    ) as error:
        raise EvalError(
            f"weights {path}",
            got=f"a file that torch cannot read ({_first_line(error)})",
            expected="a complete checkpoint written by torch.save, or a .safetensors file",
            fix="copy or download it again; a scripted model must be saved as its state_dict()",
        ) from error


def _unpickling_error(path: Path, error: pickle.UnpicklingError) -> EvalError:
    names = re.findall(r"GLOBAL ([\w.]+)", str(error))
    if not names:
        return EvalError(
            f"weights {path}",
            got="a file that is not a checkpoint of torch",
            expected="a file written by torch.save, or a .safetensors file",
            fix="check the path",
        )
    return EvalError(
        f"weights {path}",
        got=f"an object of {names[0]}, which reading would execute",
        expected="tensors and plain values",
        fix="if you trust the file, load it with its project installed, and torch.save only its state_dict",
    )


def is_safetensors(path: Path | str) -> bool:
    """Whether the file starts like a safetensors file: the size of its header, then the header's opening brace."""
    with open(path, "rb") as file:
        head = file.read(9)
    return len(head) == 9 and head[8:] == b"{" and int.from_bytes(head[:8], "little") < 100_000_000


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200]
