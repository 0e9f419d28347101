"""What a run tells while it runs: log lines, ``journal.jsonl``, TensorBoard and a progress bar.

Scalars may be tensors on the device; they are fetched together at the next flush, so that a step never waits for
its own loss. After a resume the journal is cut back to the checkpoint's step: each step stands once.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import sys
import threading
import time

import torch

from hpcssl.files import LineFile, RunDir, atomic_write, read_lines
from hpcssl.pulse import host
from hpcssl.straggler import Stragglers
from hpcssl.world import World

LOG = logging.getLogger("hpcssl")


def set_up_logging(rank: int = 0) -> None:
    """One handler, set once by a door or a job: rank 0 at INFO, the others from WARNING on with their rank."""
    LOG.handlers.clear()
    handler = logging.StreamHandler(sys.stderr)
    who = "" if rank == 0 else f" rank {rank}"
    handler.setFormatter(logging.Formatter(f"%(asctime)s{who} %(message)s", "%Y-%m-%d %H:%M:%S"))
    LOG.addHandler(handler)
    LOG.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    LOG.propagate = False
    threading.excepthook = _thread_died


def _thread_died(died) -> None:
    # TensorBoard's writer dies of a full or absent disk, which the journal says in a sentence
    if not isinstance(died.exc_value, OSError):
        threading.__excepthook__(died)


class Journal:
    """Scalars of a run, averaged over ranks: one JSON line per step, the newest also to TensorBoard and the screen.

    All ranks call ``write`` and ``flush``; rank 0 keeps the files. A full disk is told once, and the training goes on:
    lines wait in memory until there is room; what TensorBoard's files miss then stands in ``journal.jsonl`` alone.
    """

    def __init__(self, run: RunDir, world: World, *, first_step: int, last_step: int, every: int, batch: int):
        self.run, self.world, self.every, self.batch = run, world, every, batch
        self._waiting: list[tuple[int, dict]] = []
        self._last, self._bar, self._file, self._samples, self._events = last_step, None, None, None, None
        self._told: set[str] = set()  # what is amiss with the files, said once
        self._clock, self._clock_step = time.monotonic(), first_step
        self._stragglers = Stragglers(world.gather_text(host()))
        world.on_main(lambda: self._open(first_step))

    def _open(self, first_step: int) -> None:
        run = self.run
        for path in (run.journal, run.samples):
            cut_back(path, first_step)
        self._file = LineFile(run.journal)
        self._open_events(purge_step=first_step + 1)
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=self._last, initial=first_step, unit="step", dynamic_ncols=True)

    def _open_events(self, **options) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import: only where it is used

        self._events = SummaryWriter(str(self.run.events), **options)

    def write(self, step: int, **scalars: torch.Tensor | float) -> None:
        """Take this rank's scalars of ``step`` (the number of steps done after it), the same names on all ranks."""
        self._waiting.append((step, scalars))
        if step % self.every == 0 or step == self._last:
            self.flush()

    def flush(self) -> None:
        """Average what waits over the ranks and write it. A collective."""
        if not self._waiting:
            return
        steps = [step for step, _ in self._waiting]
        names = [list(scalars) for _, scalars in self._waiting]
        flat = [torch.as_tensor(v, dtype=torch.float64, device=self.world.device).detach().reshape(())
                for _, scalars in self._waiting for v in scalars.values()]
        self._waiting.clear()
        found = self.world.mean(torch.cat([torch.stack(flat), self._times()])).tolist()
        values = iter(found)
        lines = [{"step": step, **{name: _finite(next(values)) for name in row}}
                 for step, row in zip(steps, names, strict=True)]
        now = time.monotonic()
        rate = (steps[-1] - self._clock_step) * self.batch / max(now - self._clock, 1e-9)
        self._clock, self._clock_step = now, steps[-1]
        lines[-1]["images_per_s"] = round(rate, 1)
        if self.world.main:
            lines[-1] |= self._slowest(found[len(flat):])
            self._write(lines)

    def _times(self) -> torch.Tensor:
        """[2W] float64: this rank's own seconds per step and its wait for data, in its place among all ranks'."""
        world = self.world
        times = torch.zeros(2, world.size if world.pulse is not None else 0, dtype=torch.float64)
        if world.pulse is not None:
            times[:, world.rank] = torch.tensor(world.pulse.clock.take(), dtype=torch.float64)
        return times.flatten().to(world.device)

    def _slowest(self, means: list[float]) -> dict[str, float]:
        """Scalars on the ranks' seconds from their means over ranks; a straggler is named in the log."""
        size = self.world.size
        if size == 1 or not means:
            return {"data_s": round(means[1], 5)} if means else {}
        scalars, sentence = self._stragglers.look(*([size * s for s in means[k:k + size]] for k in (0, size)))
        if sentence:
            LOG.warning("%s", sentence)
        return {name: round(value, 5) for name, value in scalars.items()}

    def _write(self, lines: list[dict]) -> None:
        self._tell(self.run.journal, self._file.add(*lines))
        newest = dict(lines[-1])
        step = newest.pop("step")
        self._draw(newest, step)
        shown = {k: f"{float(newest[k]):.4g}" for k in ("loss", "purity", "lr", "images_per_s") if k in newest}
        self._say(step, shown)

    def sync(self) -> None:
        """``flush``, and everything written is on the disk: before a checkpoint, after which nobody writes it again."""
        self.flush()
        for file in (self._file, self._samples):
            if file is not None:
                self._tell(file.path, file.sync())
        if self._file is not None:
            self._draw(flush=True)

    def _draw(self, scalars: dict | None = None, step: int = 0, *, flush: bool = False) -> None:
        """Scalars to TensorBoard. Its writer does not survive a full disk: a new one is tried at the next ``sync``."""
        if self._events is None and not flush:
            return
        try:
            if self._events is None:
                self._open_events()
            for name, value in (scalars or {}).items():
                self._events.add_scalar(name, float(value), step)
            if flush:
                self._events.flush()
                self._tell(self.run.events, None)
        except OSError as error:
            self._events = None
            self._tell(self.run.events, error.strerror or str(error))

    def _tell(self, path, why: str | None) -> None:
        if why is None:
            self._told.discard(str(path))
        elif str(path) not in self._told:
            self._told.add(str(path))
            LOG.warning("%s: %s; the training goes on, and its lines wait for room", path, why)

    def scored(self, step: int) -> bool:
        """Whether the results of an evaluation at ``step`` stand here already. A collective."""
        mine = self.world.main and any(r.get("eval") and r.get("step") == step for r in read_lines(self.run.journal))
        return self.world.any(mine)

    def score(self, step: int, **scalars: float) -> None:
        """Results of an evaluation during training, on rank 0."""
        if self.world.main:
            self._tell(self.run.journal, self._file.add({"step": step, "eval": True, **scalars}))
            self._draw({f"eval/{name}": value for name, value in scalars.items()}, step)
            self._say(step, {k: f"{v:.4g}" for k, v in scalars.items()})
        self._clock = time.monotonic()  # the rate is the training's, not the evaluation's

    def _say(self, step: int, words: dict[str, str]) -> None:
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
            self._bar.set_postfix(words)
        else:
            LOG.info("step %d/%d  %s", step, self._last, "  ".join(f"{k} {v}" for k, v in words.items()))

    def sample_ids(self, step: int, index: torch.Tensor) -> None:
        """Write the sample ids of the whole world's batch. A collective."""
        every = self.world.whole_batch(index.to(self.world.device)).tolist()
        if self.world.main:
            self._samples = self._samples or LineFile(self.run.samples)
            self._tell(self.run.samples, self._samples.add({"step": step, "index": every}))

    def close(self) -> None:
        """Everything written is on disk; after this ``os._exit`` loses nothing. No collective: ``flush`` first."""
        self._waiting.clear()
        for file in (self._file, self._samples):
            if file is not None:
                self._tell(file.path, file.close())
        if self._events is not None:
            with contextlib.suppress(OSError):
                self._events.close()
        self._file = self._samples = self._events = None
        if self._bar is not None:
            self._bar.close()


def cut_back(path, step: int) -> None:
    """Drop the lines of a JSON-lines file that lie after ``step``: a resumed run writes them again."""
    records = read_lines(path)
    kept = [r for r in records if isinstance(r.get("step"), int) and r["step"] <= step]
    if path.exists():
        atomic_write(path, "".join(json.dumps(r) + "\n" for r in kept))


def _finite(value: float) -> float | str:
    # JSON has no infinities: a reader in another language must not choke on a diverged run
    return value if math.isfinite(value) else str(value)
