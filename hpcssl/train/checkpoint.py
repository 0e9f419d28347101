"""Checkpoints: one safetensors part per rank and a JSON manifest, written beside the training.

``checkpoints/step-N/`` holds ``part-R.safetensors`` of every rank and, last of all, ``manifest.json``: a folder
without a manifest does not count. Tensors that all ranks hold alike are dealt out over the ranks' parts by size;
of a tensor whose rows are split over ranks each rank writes its own rows. So every tensor stands once, and loads on
any number of ranks. There is no pickle anywhere: what is not a tensor is JSON in the manifest.

A save copies the state to host memory and returns; a thread writes and fsyncs the part. The ranks learn through
the step's own agreement that all threads are done (``busy``), and rank 0 then writes the manifest. No collective
runs in a thread, where it could meet the training's own. Peak memory: one host copy of what the rank writes, which is
kept from save to save (``part.py``).

Nothing is deleted before ``keep`` others stand that are whole as far as their sizes tell, and never anything on the
way to a first save: a process that is killed between any two operations leaves the newest checkpoint or the one before.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from hpcssl import files
from hpcssl.config import fingerprint
from hpcssl.errors import ResumeError
from hpcssl.files import RunDir
from hpcssl.train.part import HostCopy
from hpcssl.train.saved import FORMAT, MANIFEST, Saved, folders, has_sizes, newest_valid, none_whole
from hpcssl.world import World

LOG = logging.getLogger("hpcssl")


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
    """The checkpoints of one run. All ranks call its methods together, but for ``busy`` and ``saving``.

    ``guard`` is called by rank 0 before anything is written, and again before it is sealed: it raises ``ResumeError``
    where the run is not this process's any more, and so do then all ranks.
    """

    def __init__(self, run: RunDir, world: World, *, keep: int = 2, keep_every: int = 0,
                 guard: Callable[[], None] = lambda: None):
        self.run, self.world, self.keep, self.keep_every, self.guard = run, world, keep, keep_every, guard
        self._copy = HostCopy()
        self._thread: threading.Thread | None = None
        self._tidying: threading.Thread | None = None
        self._state: State | None = None
        self._part: dict | None = None
        self._error: str | None = None
        self._damaged: set[int] = set()  # passed over by ``newest``: they count for nothing
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
        self.world.on_main(self.guard)
        self._tidied()
        writer = self._writer_of(state)
        mine = {name: rows.local.detach() for name, rows in state.tensors.items()
                if writer.get(name, self.world.rank) == self.world.rank}
        self._state, self._part, self._error = state, None, None
        try:
            self._copy.take(mine)
        except (RuntimeError, MemoryError) as error:  # of one rank, perhaps: the others must hear of it in ``finish``
            self._error = f"rank {self.world.rank}: no host copy of its part: {' '.join(str(error).split())[:200]}"
            return
        self._thread = threading.Thread(target=self._write, args=(state.step,), name="checkpoint", daemon=True)
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

    def _write(self, step: int) -> None:
        path = self.run.checkpoint(step) / f"part-{self.world.rank}.safetensors"
        try:
            self._part = self._copy.write(path)
        except Exception as error:  # noqa: BLE001 - whatever it was, the part is not there, and `finish` must say so
            where = getattr(error, "filename", None) or path
            self._error = f"{where}: {getattr(error, 'strerror', None) or repr(error)}"

    def finish(self) -> str | None:
        """Wait for all ranks' parts and seal the checkpoint. Returns a sentence if it failed, else None.

        A failed save removes what it wrote; the checkpoint before it stays.
        """
        if self._thread is not None:
            self._thread.join()
        state, self._thread, self._state = self._state, None, None
        told = self.world.gather_text(json.dumps({"part": self._part, "error": self._error,
                                                  "rows": {n: [r.first, len(r.local)] for n, r in
                                                           state.tensors.items() if r.total is not None}}))
        every = [json.loads(text) for text in told]
        errors = [t["error"] or "a part was not written" for t in every if t["error"] or not t["part"]]
        self.world.on_main(self.guard)
        if self.world.main:
            folder = self.run.checkpoint(state.step)
            try:
                if not errors:
                    files.atomic_write(folder / MANIFEST, _sealed(self._manifest(state, every)))
            except OSError as error:
                errors.append(f"{folder / MANIFEST}: {error.strerror or error}")
            if errors:
                files.remove(folder)
            else:
                self._tidying = threading.Thread(target=self._tidy, args=(state.step,), name="tidy", daemon=True)
                self._tidying.start()
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
            if self.world.main:
                self._tidy(state.step)  # a kill may have come before
            return None
        self.begin(state)
        failed = self.finish()
        self._tidied()
        return failed

    def _tidied(self) -> None:
        if self._tidying is not None:
            self._tidying.join()

    def _tidy(self, newest: int) -> None:
        """After a good save, beside the training: delete what was cut short or is damaged, and what is neither among
        the last ``keep`` whole ones nor a multiple of ``keep_every``. What cannot be deleted stays."""
        try:
            left = self._left(newest)
        except OSError as error:
            LOG.warning("%s: %s; old checkpoints stay until the next save", self.run.checkpoints, error.strerror)
            return
        for path in left:
            files.remove(path)
        self._damaged.clear()

    def _left(self, newest: int) -> list[Path]:
        there = folders(self.run)
        whole = [step for step, folder in there if step == newest
                 or (step not in self._damaged and has_sizes(folder))]
        kept = {*whole[-self.keep:], *(step for step in whole if self.keep_every and step % self.keep_every == 0)}
        left = [folder for step, folder in there if step not in kept] + files.temporaries(self.run.checkpoints)
        folder = self.run.checkpoint(newest)
        listed = {MANIFEST, *(part["file"] for part in Saved.open(folder).manifest["parts"])}
        return left + [path for path in folder.iterdir() if path.name not in listed]

    def _clear(self) -> None:
        """Remove the temporaries that a killed attempt left, before this one writes any."""
        run = self.run
        for place in (run.checkpoints, run.weights, run.weights / "second"):
            for path in files.temporaries(place):
                files.remove(path)
        for path in (run.config, run.data, run.journal, run.samples, run.done):  # others write other files there
            for left in files.temporaries(run.root, path.name):
                files.remove(left)

    # -- reading --------------------------------------------------------------------------------------------

    def newest(self) -> Saved | None:
        """The newest checkpoint that is whole, agreed by all ranks; each one passed over is named in the log.

        None where no save was ever sealed. Raises ``ResumeError`` where some were, and none is whole: a run does not
        begin again from nothing, over what is left of it, unless somebody asks for that.
        """
        answer = ""

        def look() -> None:
            nonlocal answer
            self._tidied()
            self._clear()
            found, skipped = newest_valid(self.run)
            for folder, why in skipped:
                LOG.warning("checkpoint %s skipped: %s", folder.name, why)
            if found is None and any((folder / MANIFEST).exists() for folder, _ in skipped):
                raise ResumeError(f"run folder {self.run.root}", got=none_whole(skipped),
                                  expected="a whole one among its checkpoints",
                                  mend=f"see whether its disk is well and bring one back from a copy, or remove "
                                       f"{self.run.checkpoints} to begin again from step 0")
            self._damaged = {step for step, folder in folders(self.run) if folder in {f for f, _ in skipped}}
            answer = str(found.folder) if found else ""

        self.world.on_main(look)
        answer = self.world.tell(answer)
        if not answer:
            return None
        saved = Saved.open(Path(answer))
        self.durable = saved.step
        return saved


def _sealed(manifest: dict) -> str:
    return json.dumps(manifest | {"sha256": fingerprint(manifest)}, indent=1)


def digest_of(run: RunDir) -> str:
    """Digest of the newest whole checkpoint of a run folder. Raises ``ResumeError`` where there is none."""
    saved, skipped = newest_valid(run)
    if saved is None:
        raise ResumeError(f"run folder {run.root}", got=none_whole(skipped),
                          expected="a run that has saved at least once", mend="start it with `hpcssl train`")
    return saved.digest()
