"""Checkpoints as they lie on disk: read, checked, and found. The manifest says what a folder holds, and a folder
without one does not count; ``checkpoint.py`` writes them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import safetensors
import torch
from torch import Tensor

from hpcssl import files
from hpcssl.config import fingerprint
from hpcssl.errors import ResumeError
from hpcssl.files import RunDir

FORMAT, MANIFEST = 1, "manifest.json"
_UNREADABLE = (ValueError, KeyError, TypeError, AttributeError)


class Saved:
    """A checkpoint on disk. Reads rows of tensors from whichever parts hold them."""

    def __init__(self, folder: Path, manifest: dict):
        self.folder, self.manifest = folder, manifest
        self.step: int = manifest["step"]

    @classmethod
    def open(cls, folder: Path) -> Saved:
        return cls(folder, json.loads((folder / MANIFEST).read_text()))

    @property
    def names(self) -> list[str]:
        return sorted(self.manifest["tensors"])

    def rows(self, name: str, first: int = 0, count: int | None = None) -> Tensor:
        """Rows ``first`` to ``first + count`` of a tensor (all of them by default), on the CPU."""
        entry = self.manifest["tensors"][name]
        if not entry["shape"]:
            return self._piece(entry["pieces"][0][0], name)
        last = entry["shape"][0] if count is None else first + count
        found = []
        for part, start in entry["pieces"]:
            with self._reader(part) as reader:
                piece = reader.get_slice(name)
                stop = start + piece.get_shape()[0]
                low, high = max(first, start), min(last, stop)
                if low < high:
                    found.append(piece[low - start:high - start])
        if not found:
            return torch.empty(0, *entry["shape"][1:], dtype=getattr(torch, entry["dtype"]))
        return torch.cat(found) if len(found) > 1 else found[0]

    def _piece(self, part: int, name: str) -> Tensor:
        with self._reader(part) as reader:
            return reader.get_tensor(name)

    def _reader(self, part: int):
        return safetensors.safe_open(self.folder / self.manifest["parts"][part]["file"], framework="pt")

    def why_invalid(self) -> str | None:
        """What is wrong with it: a missing, truncated or changed part. None if it is whole. Raises ``OSError``."""
        body = {k: v for k, v in self.manifest.items() if k != "sha256"}
        if self.manifest.get("format") != FORMAT:
            return f"format {self.manifest.get('format')}, not {FORMAT}"
        if fingerprint(body) != self.manifest.get("sha256"):
            return "the manifest was changed"
        why = self.wrong_size()
        for part in self.manifest["parts"] if why is None else ():
            if files.digest(self.folder / part["file"]) != part["sha256"]:
                return f"{part['file']} has another sha256 than the manifest"
        return why

    def wrong_size(self) -> str | None:
        """Which part is missing or has another size than the manifest says. Raises ``OSError``."""
        for part in self.manifest["parts"]:
            path = self.folder / part["file"]
            if not path.exists():
                return f"{part['file']} is missing"
            if path.stat().st_size != part["bytes"]:
                return f"{part['file']} has {path.stat().st_size} bytes, not {part['bytes']}"
        return None

    def digest(self) -> str:
        """One sha256 of the whole state: the same for the same state saved by any number of ranks."""
        total = hashlib.sha256(json.dumps([self.step, self.manifest["numbers"], self.manifest["fingerprint"]],
                                          sort_keys=True).encode())
        for name in self.names:
            entry = self.manifest["tensors"][name]
            total.update(json.dumps([name, entry["dtype"], entry["shape"]]).encode())
            total.update(self.rows(name).contiguous().reshape(-1).view(torch.uint8).numpy())
        return total.hexdigest()


def folders(run: RunDir) -> list[tuple[int, Path]]:
    """(step, folder) of everything that looks like a checkpoint, ascending."""
    found = run.checkpoints.glob("step-*") if run.checkpoints.is_dir() else []
    return sorted((int(p.name[5:]), p) for p in found if p.name[5:].isdecimal())


def newest_valid(run: RunDir) -> tuple[Saved | None, list[tuple[Path, str]]]:
    """The newest whole checkpoint, and the newer ones that were passed over, with the reason. Raises ``ResumeError``
    where the folder of them is a link that leads nowhere (a disk that is not there now), or no folder."""
    skipped = []
    place = run.checkpoints
    if not place.is_dir() and (place.is_symlink() or place.exists()):
        raise ResumeError(f"checkpoints {place}", got="a link that leads to no folder" if place.is_symlink() else
                          "something that is no folder", expected="the folder that this run saves in",
                          mend="see whether its disk is there; or remove it to begin again from step 0")
    for step, folder in reversed(folders(run)):
        why = None
        try:
            saved = Saved.open(folder)
        except FileNotFoundError:
            why = "no manifest: the save was cut short"
        except (*_UNREADABLE, OSError) as error:
            why = f"the manifest cannot be read ({getattr(error, 'strerror', None) or type(error).__name__})"
        if why is None:
            try:
                why = saved.why_invalid() or (None if saved.step == step else f"it is one of step {saved.step}")
            except _UNREADABLE as error:
                why = f"the manifest cannot be read ({type(error).__name__})"
            except OSError as error:
                why = f"{Path(error.filename or folder).name} cannot be read ({error.strerror})"
        if why is None:
            return saved, skipped
        skipped.append((folder, why))
    return None, skipped


def has_sizes(folder: Path) -> bool:
    """Whether a checkpoint is whole as far as sizes tell, which costs no reading of its parts."""
    try:
        return Saved.open(folder).wrong_size() is None
    except (*_UNREADABLE, OSError):
        return False


def none_whole(skipped: list[tuple[Path, str]]) -> str:
    """``no whole checkpoint``, with each that was passed over and its reason."""
    reasons = "; ".join(f"{folder.name}: {why}" for folder, why in skipped)
    return f"no whole checkpoint{' (' + reasons + ')' if reasons else ''}"
