"""Checkpoints on disk: read, checked and found.

The manifest of a checkpoint says what its folder holds; a folder without a manifest is not a checkpoint.
``manager.py`` writes them.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from hpcssl import files
from hpcssl.config import fingerprint
from hpcssl.errors import ResumeError
from hpcssl.run_dir import RunDir

FOREIGN = "it was saved under another recipe"
"""Why ``latest_valid`` skips a whole checkpoint of another run."""
FORMAT, MANIFEST = 1, "manifest.json"
"""Version of the format, and name of the file that completes a checkpoint."""
_CHUNK_ENTRIES = 1 << 24  # entries that ``digest`` reads at a time
_MALFORMED = (ValueError, KeyError, TypeError, AttributeError, RecursionError)


class SavedCheckpoint:
    """A checkpoint on disk. Reads rows of tensors from whichever parts hold them.

    Args:
        folder: The folder of the checkpoint.
        manifest: Content of its ``manifest.json``.

    Attributes:
        step: Number of completed steps.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]):
        self.folder, self.manifest = folder, manifest
        self.step: int = manifest["step"]

    @classmethod
    def open(cls, folder: Path) -> SavedCheckpoint:
        """Read the manifest. The parts are not checked: see ``why_invalid``.

        Raises:
            OSError: If there is none (``FileNotFoundError``) or it cannot be read.
            ValueError, KeyError, TypeError, RecursionError: If it is malformed.
        """
        return cls(folder, json.loads((folder / MANIFEST).read_text()))

    @property
    def names(self) -> list[str]:
        """Names of the tensors, sorted."""
        return sorted(self.manifest["tensors"])

    def rows(self, name: str, first: int = 0, count: int | None = None) -> Tensor:
        """Read rows of a tensor, on the CPU.

        Args:
            name: Name of the tensor.
            first: Index of the first row.
            count: Number of rows; None for all to the end.
        """
        entry = self.manifest["tensors"][name]
        if not entry["shape"]:
            with self._part_reader(entry["pieces"][0][0]) as reader:
                scalar: Tensor = reader.get_tensor(name)
                return scalar
        last = entry["shape"][0] if count is None else first + count
        pieces = []
        for part, start, stop in _find_spans(entry):
            low, high = max(first, start), min(last, stop)
            if low < high:  # of hundreds of parts, a rank opens those with its own rows
                with self._part_reader(part) as reader:
                    pieces.append(reader.get_slice(name)[low - start : high - start])
        if not pieces:
            shape, dtype = self.shape_of_rows(name, first, 0)
            return torch.empty(shape, dtype=dtype)
        return torch.cat(pieces) if len(pieces) > 1 else pieces[0]

    def shape_of_rows(self, name: str, first: int = 0, count: int | None = None) -> tuple[torch.Size, torch.dtype]:
        """Shape and dtype of what ``rows`` returns, from the manifest."""
        entry = self.manifest["tensors"][name]
        shape, dtype = list(entry["shape"]), getattr(torch, entry["dtype"])
        if shape:
            last = shape[0] if count is None else min(shape[0], first + count)
            shape[0] = max(0, last - first)
        return torch.Size(shape), dtype

    def _part_reader(self, part: int) -> Any:
        return safetensors.safe_open(self.folder / self.manifest["parts"][part]["file"], framework="pt")

    def why_invalid(self) -> str | None:
        """Check format, manifest and the sha256 of every part.

        Returns:
            What is wrong (a missing, truncated or changed file), or None if the checkpoint is whole.

        Raises:
            OSError: If a file cannot be read.
        """
        body = {k: v for k, v in self.manifest.items() if k != "sha256"}
        if self.manifest.get("format") != FORMAT:
            return f"format {self.manifest.get('format')}, not {FORMAT}"
        if fingerprint(body) != self.manifest.get("sha256"):
            return "the manifest was changed"
        why = self.wrong_size()
        for part in self.manifest["parts"] if why is None else ():
            if files.sha256_of_file(self.folder / part["file"]) != part["sha256"]:
                return f"{part['file']} has another sha256 than the manifest"
        return why

    def wrong_size(self) -> str | None:
        """Check that every part exists and has the size that the manifest says. Raises ``OSError``.

        Returns:
            What is wrong, or None.
        """
        for part in self.manifest["parts"]:
            path = self.folder / part["file"]
            if not path.exists():
                return f"{part['file']} is missing"
            if path.stat().st_size != part["bytes"]:
                return f"{part['file']} has {path.stat().st_size} bytes, not {part['bytes']}"
        return None

    def digest(self) -> str:
        """One sha256 of the whole state: the same for the same state, whichever number of ranks saved it."""
        total = hashlib.sha256(
            json.dumps([self.step, self.manifest["numbers"], self.manifest["fingerprint"]], sort_keys=True).encode()
        )
        for name in self.names:
            entry = self.manifest["tensors"][name]
            total.update(json.dumps([name, entry["dtype"], entry["shape"]]).encode())
            for rows in self._chunks(name, entry["shape"]):
                raw = rows.contiguous().reshape(-1).view(torch.uint8).numpy()
                total.update(raw)  # type: ignore[arg-type]  # NumPy's stub has no buffer protocol
        return total.hexdigest()

    def _chunks(self, name: str, shape: list[int]) -> Iterator[Tensor]:
        """The rows of a tensor in chunks of a limited size."""
        step = max(1, _CHUNK_ENTRIES // max(1, math.prod(shape[1:])))
        for first in range(0, shape[0], step) if shape else (0,):
            yield self.rows(name, first, min(step, shape[0] - first) if shape else None)


def _find_spans(entry: dict[str, Any]) -> list[tuple[int, int, int]]:
    """(part, first row, row after the last one) of each piece of a tensor, in the order of rows."""
    pieces = sorted(entry["pieces"], key=lambda piece: int(piece[1]))
    stops = [start for _, start in pieces[1:]] + [entry["shape"][0]]
    return [(part, start, stop) for (part, start), stop in zip(pieces, stops, strict=True)]


def folders(run: RunDir) -> list[tuple[int, Path]]:
    """(step, folder) of everything in the run that has the name of a checkpoint, in ascending order of steps."""
    paths = run.checkpoints.glob("step-*") if run.checkpoints.is_dir() else []
    return sorted((int(p.name[5:]), p) for p in paths if p.name[5:].isdecimal())


def latest_valid(
    run: RunDir, recipe_fingerprint: str | None = None
) -> tuple[SavedCheckpoint | None, list[tuple[Path, str]]]:
    """Find the newest checkpoint that is whole.

    Args:
        run: The run folder.
        recipe_fingerprint: Fingerprint of the recipe that it should have been saved under; None for any. A checkpoint
            of another recipe is returned only if there is none of this one, so that the caller can compare the two.

    Returns:
        The checkpoint, or None; and the newer folders that were skipped, each with the reason.

    Raises:
        ResumeError: If the place of the checkpoints is a broken symlink (a disk that is not mounted), or not a folder.
    """
    skipped: list[tuple[Path, str]] = []
    place = run.checkpoints
    if not place.is_dir() and (place.is_symlink() or place.exists()):
        raise ResumeError(
            f"checkpoints {place}",
            got="a broken symlink" if place.is_symlink() else "something that is not a folder",
            expected="the folder in which this run saves",
            fix="mount its disk; or remove it, to start again from step 0",
        )
    foreign: tuple[SavedCheckpoint, int] | None = None  # the newest one of another recipe, and how many were skipped
    for step, folder in reversed(folders(run)):
        saved, why = _open_checked(step, folder)
        if saved is not None and recipe_fingerprint in (None, saved.manifest["fingerprint"]):
            return saved, skipped
        if saved is not None and foreign is None:
            foreign = saved, len(skipped)
        skipped.append((folder, why or FOREIGN))
    return (foreign[0], skipped[: foreign[1]]) if foreign else (None, skipped)


def _open_checked(step: int, folder: Path) -> tuple[SavedCheckpoint | None, str]:
    """The checkpoint in a folder; or None and what is wrong with it."""
    try:
        saved = SavedCheckpoint.open(folder)
    except FileNotFoundError:
        return None, "no manifest: the save was cut short"
    except (*_MALFORMED, OSError) as error:
        return None, f"the manifest cannot be read ({getattr(error, 'strerror', None) or type(error).__name__})"
    try:
        why = saved.why_invalid() or (None if saved.step == step else f"it is one of step {saved.step}")
    except _MALFORMED as error:
        return None, f"the manifest cannot be read ({type(error).__name__})"
    except OSError as error:
        return None, f"{Path(error.filename or folder).name} cannot be read ({error.strerror})"
    return (saved, "") if why is None else (None, why)


def has_expected_sizes(folder: Path) -> bool:
    """Whether a checkpoint looks whole by the sizes of its files, which is cheap: no part is read."""
    try:
        return SavedCheckpoint.open(folder).wrong_size() is None
    except (*_MALFORMED, OSError):
        return False


def describe_skipped(skipped: list[tuple[Path, str]]) -> str:
    """``no whole checkpoint``, followed by each folder that was skipped and the reason."""
    reasons = "; ".join(f"{folder.name}: {why}" for folder, why in skipped)
    return f"no whole checkpoint{' (' + reasons + ')' if reasons else ''}"
