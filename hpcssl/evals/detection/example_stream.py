"""The training examples of a detector, read ahead by threads.

How a training example looks is a function of (seed, step, image) only: the short side is one of the protocol's sizes,
and half of the images are mirrored.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from hpcssl import rng
from hpcssl.distributed.world import World
from hpcssl.errors import EvalError
from hpcssl.evals.detection.data import DetectionExample, DetectionShards

_STEPS_AHEAD = 3


class ExampleStream:
    """Iterator over this rank's training examples, one list per step.

    Args:
        shards: The training images.
        steps: Step and indices of this rank's images, one pair per step.
        sides: Short sides in pixels, of which one is drawn per image.
        max_side: Largest long side in pixels.
        masks: Whether targets have masks.
        seed: Seed of sizes and flips.
        threads: Reading threads.
    """

    def __init__(
        self,
        shards: DetectionShards,
        steps: Iterable[tuple[int, Sequence[int] | npt.NDArray[np.int64]]],
        *,
        sides: Sequence[int],
        max_side: int,
        masks: bool,
        seed: int,
        threads: int,
    ) -> None:
        self.shards, self.steps = shards, iter(steps)
        self.sides, self.max_side, self.masks, self.seed = sides, max_side, masks, seed
        self.pool = ThreadPoolExecutor(threads, "examples")
        self.pending: deque[list[Future[DetectionExample]]] = deque()

    def __iter__(self) -> Iterator[list[DetectionExample]]:
        for step, index in self.steps:
            self.pending.append([self.pool.submit(self._read, step, int(i)) for i in index])
            if len(self.pending) > _STEPS_AHEAD:
                yield [future.result() for future in self.pending.popleft()]
        while self.pending:
            yield [future.result() for future in self.pending.popleft()]

    def _read(self, step: int, index: int) -> DetectionExample:
        side, flip = rng.uniform(rng.key(self.seed, "detect", "view", step, index), 2)
        return self.shards.example(
            index, self.sides[int(side * len(self.sides))], self.max_side, flip=flip < 0.5, masks=self.masks
        )

    def close(self) -> None:
        """Stop the reading threads."""
        self.pool.shutdown(cancel_futures=True)


def find_trainable_images(shards: DetectionShards, world: World, *, masks: bool) -> npt.NDArray[np.int64]:
    """Return the indices of the images with at least one box that has an area and is not a crowd. A collective.

    Rank 0 reads every record, so that shards without boxes, or without masks for a protocol that learns them, are
    rejected before the first step.

    Args:
        shards: The images.
        world: The processes of the evaluation.
        masks: Whether the protocol needs masks.

    Raises:
        EvalError: On every rank, if a record is missing or has no masks.
    """
    flags: list[str] = []

    def check_records() -> None:
        for index in range(len(shards.data)):
            record = shards.record(index)
            if masks and len(record.get("segmentation", ())) != len(record["boxes"]):
                raise EvalError(
                    f"shard folder {shards.data.root}",
                    got="boxes without masks",
                    expected="a mask for each box, which this protocol learns",
                    fix="set protocol=voc_c4, or name shards of `hpcssl-shard detection coco SRC OUT`",
                )
            area = (record["boxes"][:, 2:] - record["boxes"][:, :2]).prod(1)
            flags.append(str(int((~record["crowd"] & (area > 0)).any())))

    world.run_on_main(check_records)
    return np.flatnonzero(np.frombuffer(world.broadcast_text("".join(flags)).encode(), np.uint8) == ord("1"))
