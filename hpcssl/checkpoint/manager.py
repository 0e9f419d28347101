"""Writes checkpoints while the training continues, and finds the one to resume from.

Format: ``checkpoints/step-N/`` holds ``part-R.safetensors`` of every rank and, written last, ``manifest.json``. A
folder without a manifest is not a checkpoint. Tensors that all ranks hold alike are distributed over the ranks' parts
by size; of a tensor whose rows are split over ranks, each rank writes its own rows. So every tensor is stored once, and
can be loaded by any number of ranks. There is no pickle: what is not a tensor is JSON in the manifest.

A save copies the state to host memory and returns; a thread writes and syncs the part. The ranks learn from the
collective at the end of a later step that all threads are done (``busy``), and rank 0 then writes the manifest. No
collective runs in a thread, where it could mix with those of the training. Each rank needs one host copy in memory.

Nothing is deleted before ``keep`` other checkpoints exist that look whole, and never before the first save is
complete: a process that is killed between any two operations leaves the newest checkpoint or the one before it.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcssl import files
from hpcssl.checkpoint import retention
from hpcssl.checkpoint.host_copy import HostCopy
from hpcssl.checkpoint.reader import FOREIGN, FORMAT, MANIFEST, SavedCheckpoint, describe_skipped, latest_valid
from hpcssl.checkpoint.shard import TensorShard
from hpcssl.distributed.world import World
from hpcssl.errors import ResumeError
from hpcssl.run_dir import RunDir

LOG = logging.getLogger("hpcssl")


@dataclass(frozen=True)
class CheckpointState:
    """Everything that a run is at one step.

    Attributes:
        step: Number of completed steps.
        tensors: This rank's shard of every tensor, by name. They are not copied: they are the living state.
        numbers: What is not a tensor; must be JSON.
        fingerprint: Hash of ``science``.
        science: The part of the recipe that determines the result; a run resumes only under the same one.
        machinery: Software and hardware that may change the bits, for a warning when it differs at a resume.
    """

    step: int
    tensors: dict[str, TensorShard]
    numbers: dict[str, Any]
    fingerprint: str
    science: dict[str, Any]
    machinery: dict[str, Any]


class CheckpointManager:
    """The checkpoints of one run. All ranks call its methods together, except for ``busy`` and ``saving``.

    Args:
        run: The run folder.
        world: The processes that train together.
        keep: Number of last checkpoints that are kept, from 1.
        keep_every: Checkpoints of steps that are multiples of this are kept for good; 0 for none.
        guard: Called by rank 0 before anything is written, and again before the manifest is. It raises ``ResumeError``
            if another process has taken over the run; then all ranks raise it.

    Attributes:
        recipe_fingerprint: ``CheckpointState.fingerprint`` of this run. If it is set, checkpoints with another one are
            not resumed from, counted or deleted.
        durable: Step of the newest checkpoint that is known to be whole; None before there is one.
    """

    def __init__(
        self, run: RunDir, world: World, *, keep: int = 2, keep_every: int = 0, guard: Callable[[], None] = lambda: None
    ):
        self.run, self.world, self.keep, self.keep_every, self.guard = run, world, keep, keep_every, guard
        self.recipe_fingerprint: str | None = None
        self.durable: int | None = None
        self._copy = HostCopy()
        self._writer: threading.Thread | None = None
        self._cleaner: threading.Thread | None = None
        self._state: CheckpointState | None = None
        self._part: dict[str, Any] | None = None
        self._error: str | None = None
        self._skipped: dict[int, str] = {}  # what ``latest`` skipped: steps, with the reason

    # -- writing --------------------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Whether this rank's part is still being written. Not a collective."""
        return self._writer is not None and self._writer.is_alive()

    @property
    def saving(self) -> bool:
        """Whether a save was begun and not completed by ``finish`` yet."""
        return self._state is not None

    def begin(self, state: CheckpointState) -> None:
        """Copy the state and start to write this rank's part. ``finish`` the save before it first."""
        self.world.run_on_main(self.guard)
        self._join_cleaner()
        ranks = self._assign_ranks(state)
        own = {
            name: shard.tensor.detach()
            for name, shard in state.tensors.items()
            if ranks.get(name, self.world.rank) == self.world.rank
        }
        self._state, self._part, self._error = state, None, None
        try:
            self._copy.take(own)
        except (RuntimeError, MemoryError) as error:  # perhaps on one rank only: the others learn of it in ``finish``
            self._error = f"rank {self.world.rank}: no host copy of its part: {' '.join(str(error).split())[:200]}"
            return
        self._writer = threading.Thread(target=self._write, args=(state.step,), name="checkpoint", daemon=True)
        self._writer.start()

    def _assign_ranks(self, state: CheckpointState) -> dict[str, int]:
        """Which rank writes each replicated tensor: the largest first, each to the rank with the least to write."""
        load = [0] * self.world.size
        ranks: dict[str, int] = {}
        sizes = [
            (shard.tensor.numel() * shard.tensor.element_size(), name)
            for name, shard in state.tensors.items()
            if shard.is_replicated
        ]
        for size, name in sorted(sizes, key=lambda pair: (-pair[0], pair[1])):
            rank = load.index(min(load))
            ranks[name], load[rank] = rank, load[rank] + size
        return ranks

    def _write(self, step: int) -> None:
        path = self.run.checkpoint(step) / f"part-{self.world.rank}.safetensors"
        try:
            self._part = self._copy.write(path)
        except Exception as error:  # noqa: BLE001 - whatever it was, the part is missing, and `finish` must say so
            where = getattr(error, "filename", None) or path
            self._error = f"{where}: {getattr(error, 'strerror', None) or repr(error)}"

    def finish(self) -> str | None:
        """Wait for the parts of all ranks and complete the checkpoint.

        A failed save removes what it wrote; the checkpoint before it stays.

        Returns:
            None, or what went wrong, in words.
        """
        if self._writer is not None:
            self._writer.join()
        state, self._writer, self._state = self._state, None, None
        assert state is not None, "`begin` comes first"
        report = {
            "part": self._part,
            "error": self._error,
            "rows": {n: [s.first_row, len(s.tensor)] for n, s in state.tensors.items() if not s.is_replicated},
        }
        reports = [json.loads(text) for text in self.world.all_gather_text(json.dumps(report))]
        errors = [r["error"] or "a part was not written" for r in reports if r["error"] or not r["part"]]
        self.world.run_on_main(self.guard)
        if self.world.is_main:
            folder = self.run.checkpoint(state.step)
            try:
                if not errors:
                    files.write_record(folder / MANIFEST, self._manifest(state, reports), indent=1)
            except OSError as error:
                errors.append(f"{folder / MANIFEST}: {error.strerror or error}")
            if errors:
                files.remove(folder)
            else:
                self._cleaner = threading.Thread(target=self._clean, args=(state.step,), name="cleaner", daemon=True)
                self._cleaner.start()
        failure = self.world.broadcast_text(errors[0] if errors else "") or None
        if not failure:
            self.durable = state.step
        return failure

    def _manifest(self, state: CheckpointState, reports: list[dict[str, Any]]) -> dict[str, Any]:
        ranks = self._assign_ranks(state)
        tensors = {}
        for name, shard in sorted(state.tensors.items()):
            if shard.is_replicated:
                pieces = [[ranks[name], 0]]
            else:
                rows = [report["rows"][name] for report in reports]
                pieces = [[rank, first] for rank, (first, count) in enumerate(rows) if count]
            tensors[name] = {
                "shape": shard.shape,
                "dtype": str(shard.tensor.dtype).removeprefix("torch."),
                "pieces": pieces,
            }
        return {
            "format": FORMAT,
            "step": state.step,
            "fingerprint": state.fingerprint,
            "science": state.science,
            "machinery": state.machinery,
            "numbers": state.numbers,
            "parts": [report["part"] for report in reports],
            "tensors": tensors,
        }

    def save(self, state: CheckpointState) -> str | None:
        """``begin`` and ``finish``: the checkpoint is durable if this returns None.

        A step that is durable already is not written again.
        """
        if self.saving:
            failure = self.finish()
            if failure:
                LOG.warning("The checkpoint was not saved, and the previous one remains: %s", failure)
        if self.durable == state.step:
            if self.world.is_main:
                self._clean(state.step)  # a kill may have prevented it before
            return None
        self.begin(state)
        failure = self.finish()
        self._join_cleaner()
        return failure

    def _join_cleaner(self) -> None:
        if self._cleaner is not None:
            self._cleaner.join()

    def _clean(self, newest: int) -> None:
        """After a complete save, delete obsolete checkpoints. What cannot be deleted stays."""
        self._skipped.pop(newest, None)
        try:
            numbers = {"keep": self.keep, "keep_every": self.keep_every}
            obsolete = retention.obsolete_paths(self.run, newest, **numbers, skipped=self._skipped)
        except OSError as error:
            LOG.warning("Old checkpoints in %s stay until the next save: %s", self.run.checkpoints, error.strerror)
            return
        for path in obsolete:
            files.remove(path)
        self._skipped = {step: why for step, why in self._skipped.items() if why == FOREIGN}

    # -- reading --------------------------------------------------------------------------------------------

    def latest(self) -> SavedCheckpoint | None:
        """The newest checkpoint that is whole, the same on all ranks. Each one that is skipped is logged.

        Returns:
            The checkpoint; None if no save was ever completed.

        Raises:
            ResumeError: If checkpoints exist and none is whole. A run never restarts from step 0, over what is left
                of it, unless the user asks for that.
        """
        answer = ""

        def look() -> None:
            nonlocal answer
            self._join_cleaner()
            retention.remove_temporaries(self.run)
            saved, skipped = latest_valid(self.run, self.recipe_fingerprint)
            for folder, why in skipped:
                LOG.warning("Checkpoint %s is skipped: %s.", folder.name, why)
            if saved is None and any((folder / MANIFEST).exists() for folder, _ in skipped):
                raise ResumeError(
                    f"run folder {self.run.root}",
                    got=describe_skipped(skipped),
                    expected="at least one whole checkpoint",
                    fix=f"check its disk and restore a checkpoint from a copy, or remove {self.run.checkpoints} to "
                    "start again from step 0",
                )
            self._skipped = {int(folder.name[5:]): why for folder, why in skipped}
            answer = str(saved.folder) if saved else ""

        self.world.run_on_main(look)
        if not (answer := self.world.broadcast_text(answer)):
            return None
        checkpoint = SavedCheckpoint.open(Path(answer))
        self.durable = checkpoint.step
        return checkpoint


def checkpoint_digest(run: RunDir) -> str:
    """One sha256 of the newest whole checkpoint of a run; the same for any number of ranks.

    Raises:
        ResumeError: If there is no whole checkpoint.
    """
    saved, skipped = latest_valid(run)
    if saved is None:
        raise ResumeError(
            f"run folder {run.root}",
            got=describe_skipped(skipped),
            expected="a run that has saved at least once",
            fix="start it with `hpcssl train`",
        )
    return saved.digest()
