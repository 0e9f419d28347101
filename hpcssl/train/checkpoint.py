"""Checkpoints: one safetensors part per rank and a JSON manifest, written beside the training.

``checkpoints/step-N/`` holds ``part-R.safetensors`` of every rank and, last of all, ``manifest.json``: a folder
without a manifest does not count. Tensors that all ranks hold alike are dealt out over the ranks' parts by size;
of a tensor whose rows are split over ranks each rank writes its own rows. So every tensor stands once, and loads on
any number of ranks. There is no pickle anywhere: what is not a tensor is JSON in the manifest.

A save copies the state to host memory and returns; a thread writes and fsyncs the part. The ranks learn through
the step's own agreement that all threads are done (``busy``), and rank 0 then writes the manifest. No collective
runs in a thread, where it could meet the training's own.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import threading
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from hpcssl import files
from hpcssl.config import fingerprint
from hpcssl.errors import ResumeError
from hpcssl.files import RunDir
from hpcssl.world import World

LOG = logging.getLogger("hpcssl")
FORMAT, MANIFEST = 1, "manifest.json"


@dataclass(frozen=True)
class Rows:
    """One tensor of the state as this rank holds it: rows ``first`` to ``first + len(local)`` of ``total``.

    ``total`` None: every rank holds the whole tensor, with equal bits.
    """

    local: Tensor
    first: int = 0
    total: int | None = None

    @property
    def shape(self) -> list[int]:
        return [self.total if self.total is not None else len(self.local), *self.local.shape[1:]] \
            if self.local.dim() else []


@dataclass(frozen=True)
class State:
    """Everything a run is at one step. ``numbers`` is JSON; ``science`` the fingerprinted part of the recipe."""

    step: int
    tensors: dict[str, Rows]
    numbers: dict
    fingerprint: str
    science: dict
    machinery: dict


class Store:
    """The checkpoints of one run. All ranks call its methods together, but for ``busy`` and ``failure``."""

    def __init__(self, run: RunDir, world: World, *, keep: int = 2, keep_every: int = 0):
        self.run, self.world, self.keep, self.keep_every = run, world, keep, keep_every
        self._thread: threading.Thread | None = None
        self._state: State | None = None
        self._part: dict | None = None
        self._error: str | None = None
        self.durable: int | None = None  # the step of the newest checkpoint known to be whole

    # -- writing --------------------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Whether this rank's part is still being written. No collective."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def saving(self) -> bool:
        """Whether a save was begun and not yet sealed by ``finish``."""
        return self._state is not None

    def begin(self, state: State) -> None:
        """Copy the state and start writing this rank's part. One save at a time: ``finish`` the one before."""
        writer = self._writer_of(state)
        mine = {name: rows.local.detach().to("cpu", copy=True).contiguous() for name, rows in state.tensors.items()
                if writer.get(name, self.world.rank) == self.world.rank}
        self._state, self._part, self._error = state, None, None
        self._thread = threading.Thread(target=self._write, args=(state.step, mine), name="checkpoint", daemon=True)
        self._thread.start()

    def _writer_of(self, state: State) -> dict[str, int]:
        """Which rank writes each replicated tensor: the largest first, each to the rank with the least to write."""
        load = [0] * self.world.size
        writer = {}
        whole = [(rows.local.numel() * rows.local.element_size(), name)
                 for name, rows in state.tensors.items() if rows.total is None]
        for size, name in sorted(whole, key=lambda pair: (-pair[0], pair[1])):
            rank = load.index(min(load))
            writer[name], load[rank] = rank, load[rank] + size
        return writer

    def _write(self, step: int, tensors: dict[str, Tensor]) -> None:
        path = self.run.checkpoint(step) / f"part-{self.world.rank}.safetensors"
        try:
            body = safetensors.torch.save(tensors)
            files.atomic_write(path, body)
            self._part = {"file": path.name, "bytes": len(body), "sha256": hashlib.sha256(body).hexdigest()}
        except Exception as error:  # noqa: BLE001 - whatever it was, the part is not there, and `finish` must say so
            self._error = f"{path}: {getattr(error, 'strerror', None) or error!r}"

    def finish(self) -> str | None:
        """Wait for all ranks' parts and seal the checkpoint. Returns a sentence if it failed, else None.

        A failed save removes what it wrote; the checkpoint before it stays.
        """
        self._thread.join()
        state, self._thread, self._state = self._state, None, None
        told = self.world.gather_text(json.dumps({"part": self._part, "error": self._error,
                                                  "rows": {n: [r.first, len(r.local)] for n, r in
                                                           state.tensors.items() if r.total is not None}}))
        every = [json.loads(text) for text in told]
        errors = [t["error"] or "a part was not written" for t in every if t["error"] or not t["part"]]
        if self.world.main:
            folder = self.run.checkpoint(state.step)
            try:
                if not errors:
                    files.atomic_write(folder / MANIFEST, _sealed(self._manifest(state, every)))
            except OSError as error:
                errors.append(f"{folder / MANIFEST}: {error.strerror or error}")
            if errors:
                shutil.rmtree(folder, ignore_errors=True)
            else:
                self._tidy(state.step)
        failed = self.world.tell(errors[0] if errors else "") or None
        if not failed:
            self.durable = state.step
        return failed

    def _manifest(self, state: State, every: list[dict]) -> dict:
        writer = self._writer_of(state)
        tensors = {}
        for name, rows in sorted(state.tensors.items()):
            if rows.total is None:
                pieces = [[writer[name], 0]]
            else:
                pieces = [[rank, told["rows"][name][0]] for rank, told in enumerate(every) if told["rows"][name][1]]
            tensors[name] = {"shape": rows.shape, "dtype": str(rows.local.dtype).removeprefix("torch."),
                             "pieces": pieces}
        return {"format": FORMAT, "step": state.step, "fingerprint": state.fingerprint, "science": state.science,
                "machinery": state.machinery, "numbers": state.numbers, "parts": [t["part"] for t in every],
                "tensors": tensors}

    def save(self, state: State) -> str | None:
        """``begin`` and ``finish``: durable when it returns None. A step that is durable is not written again."""
        if self.saving:
            before = self.finish()
            if before:
                LOG.warning("checkpoint not saved: %s", before)
        if self.durable == state.step:
            return None
        self.begin(state)
        return self.finish()

    def _tidy(self, newest: int) -> None:
        """After a good save: delete saves that were cut short, and what is neither among the last ``keep`` nor a
        multiple of ``keep_every``."""
        there = [(step, folder) for step, folder in folders(self.run) if step <= newest]
        sealed = [step for step, folder in there if (folder / MANIFEST).exists()]
        kept = {*sealed[-self.keep:], *(step for step in sealed if self.keep_every and step % self.keep_every == 0)}
        for step, folder in there:
            if step not in kept:
                shutil.rmtree(folder, ignore_errors=True)

    # -- reading --------------------------------------------------------------------------------------------

    def newest(self) -> Saved | None:
        """The newest checkpoint that is whole, agreed by all ranks; each one passed over is named in the log."""
        answer = ""
        if self.world.main:
            found, skipped = newest_valid(self.run)
            for folder, why in skipped:
                LOG.warning("checkpoint %s skipped: %s", folder.name, why)
            answer = str(found.folder) if found else ""
        answer = self.world.tell(answer)
        if not answer:
            return None
        saved = Saved.open(Path(answer))
        self.durable = saved.step
        return saved


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
        """What is wrong with it: a missing, truncated or changed part. None if it is whole."""
        body = {k: v for k, v in self.manifest.items() if k != "sha256"}
        if self.manifest.get("format") != FORMAT:
            return f"format {self.manifest.get('format')}, not {FORMAT}"
        if fingerprint(body) != self.manifest.get("sha256"):
            return "the manifest was changed"
        for part in self.manifest["parts"]:
            path = self.folder / part["file"]
            if not path.exists():
                return f"{part['file']} is missing"
            if path.stat().st_size != part["bytes"]:
                return f"{part['file']} has {path.stat().st_size} bytes, not {part['bytes']}"
            if files.digest(path) != part["sha256"]:
                return f"{part['file']} has another sha256 than the manifest"
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


def _sealed(manifest: dict) -> str:
    return json.dumps(manifest | {"sha256": fingerprint(manifest)}, indent=1)


def folders(run: RunDir) -> list[tuple[int, Path]]:
    """(step, folder) of everything that looks like a checkpoint, ascending."""
    found = run.checkpoints.glob("step-*") if run.checkpoints.is_dir() else []
    return sorted((int(p.name[5:]), p) for p in found if p.name[5:].isdigit())


def newest_valid(run: RunDir) -> tuple[Saved | None, list[tuple[Path, str]]]:
    """The newest whole checkpoint, and the newer ones that were passed over, with the reason."""
    skipped = []
    for _, folder in reversed(folders(run)):
        try:
            saved = Saved.open(folder)
            why = saved.why_invalid()
        except FileNotFoundError:
            why = "no manifest: the save was cut short"
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            why = f"the manifest cannot be read ({type(error).__name__})"
        if why is None:
            return saved, skipped
        skipped.append((folder, why))
    return None, skipped


def digest_of(run: RunDir) -> str:
    """Digest of the newest whole checkpoint of a run folder. Raises ``ResumeError`` where there is none."""
    saved, skipped = newest_valid(run)
    if saved is None:
        reasons = "; ".join(f"{folder.name}: {why}" for folder, why in skipped)
        raise ResumeError(f"run folder {run.root}", got=f"no whole checkpoint{' (' + reasons + ')' if reasons else ''}",
                          expected="a run that has saved at least once", mend="start it with `hpcssl train`")
    return saved.digest()
