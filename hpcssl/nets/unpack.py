"""What others' weights files hold, read without executing any of it."""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from hpcssl.errors import EvalError

_NUMPY = [f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")]
HARMLESS = ("argparse.Namespace", "pathlib.PosixPath", "numpy.ndarray", "numpy.dtype", *_NUMPY,
            "mmengine.logging.history_buffer.HistoryBuffer")
"""Classes that stand beside the tensors in others' checkpoints (options, scores, curves). They are not executed:
``_Ignored`` stands in for each."""


class _Ignored:
    """Takes the place of an object that nobody reads."""

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __setstate__(self, state):
        pass


def read(path: Path | str) -> Mapping:
    """What a .pth, .pt, .ckpt, .tar, .torch or .safetensors file holds, on the CPU, without executing anything.

    Raises ``EvalError``: no such file, damaged, or with objects that are neither tensors nor ``HARMLESS``.
    """
    path = Path(path)
    if not path.is_file():
        raise EvalError(f"weights {path}", got="a folder" if path.is_dir() else "no such file",
                        expected="a weights file",
                        mend="look into RUN/weights, or name another project's checkpoint file")
    if path.stat().st_size == 0:
        raise EvalError(f"weights {path}", got="an empty file", expected="a weights file",
                        mend="copy or download it again")
    if is_safetensors(path):
        try:
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        except (SafetensorError, OSError) as error:
            raise EvalError(f"weights {path}", got=f"a file that safetensors cannot read ({error})",
                            expected="a whole .safetensors file", mend="copy or download it again") from error
    try:
        with (torch.serialization.safe_globals([(_Ignored, name) for name in HARMLESS]),
              warnings.catch_warnings(action="ignore")):  # of scripted files, which are refused below
            # mapped: a bank or an optimiser beside the encoder may be larger than the memory
            tree = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path) or None)
    except pickle.UnpicklingError as error:
        raise _refused(path, error) from error
    except (RuntimeError, OSError, EOFError, ValueError, LookupError, TypeError, AttributeError, AssertionError,
            SafetensorError) as error:  # torch hands a file of that name to safetensors
        raise EvalError(f"weights {path}", got=f"a file that torch cannot read ({_line(error)})",
                        expected="a whole checkpoint written by torch.save, or a .safetensors file",
                        mend="copy or download it again; a scripted model must be saved as its state_dict()") from error
    if not isinstance(tree, Mapping):
        raise EvalError(f"weights {path}", got=f"a {type(tree).__name__}", expected="a dictionary of tensors",
                        mend="save the network's state_dict()")
    return tree


def _refused(path: Path, error: pickle.UnpicklingError) -> EvalError:
    names = re.findall(r"GLOBAL ([\w.]+)", str(error))
    if not names:
        return EvalError(f"weights {path}", got="a file that is no checkpoint of torch",
                         expected="one written by torch.save, or a .safetensors file", mend="check the path")
    return EvalError(f"weights {path}", got=f"an object of {names[0]}, which reading would execute",
                     expected="tensors and plain values",
                     mend="where the file is trusted and its project installed, load it there, and torch.save its "
                          "state_dict alone")


def is_safetensors(path: Path | str) -> bool:
    with open(path, "rb") as file:
        head = file.read(9)
    return len(head) == 9 and head[8:] == b"{" and int.from_bytes(head[:8], "little") < 100_000_000


def _line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200]
