"""The damaged samples that a run has met, in ``damaged.jsonl`` of its folder, and their limit."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from typing import Any

from hpcssl import files
from hpcssl.data.batch import Batch
from hpcssl.data.reader import DamagedSample, damage_limit_error
from hpcssl.data.shards import ShardSet
from hpcssl.distributed.world import World
from hpcssl.run_dir import RunDir

LOG = logging.getLogger("hpcssl")
_FIELDS = {"index": int, "key": str, "shard": str, "reason": str}


class DamageLog:
    """The damaged samples that any rank of any attempt has met since the run began.

    Each sample counts once, at the first step whose batch should have held it. The count after a step therefore
    depends on the data and on the order of samples alone, not on ranks or attempts. All ranks hold the same list.

    Args:
        run: The run folder; samples of earlier attempts are read from it.
        world: The processes. All ranks build the log together.
        shards: The training shards, for error messages.
        limit: Most damaged samples that the run accepts.

    Attributes:
        known: The samples by their global index.

    Raises:
        DataError: On all ranks, where earlier attempts have met more than ``limit``.
    """

    def __init__(self, run: RunDir, world: World, shards: ShardSet, limit: int):
        self.run, self.world, self.shards, self.limit = run, world, shards, limit
        lines = files.read_lines(run.damaged, _FIELDS) if world.is_main else None
        self.known = {
            line["index"]: DamagedSample(**{name: line[name] for name in _FIELDS})
            for line in json.loads(world.broadcast_text(json.dumps(lines)))
        }
        self._check_limit()

    def has_new(self, batch: Batch) -> bool:
        """Return whether this rank's rows hold a damaged sample that is not in the log. No collective."""
        return any(sample.index not in self.known for sample in batch.damaged)

    def record(self, step: int, batch: Batch) -> None:
        """Add the samples that are new on any rank. A collective.

        Args:
            step: The number of steps finished with this batch; it is written beside the samples.
            batch: This rank's rows.

        Raises:
            DataError: On all ranks, where there are now more than ``limit``.
        """
        reports = self.world.all_gather_text(json.dumps([asdict(sample) for sample in batch.damaged]))
        samples = {sample["index"]: sample for report in reports for sample in json.loads(report)}
        for index in sorted(samples.keys() - self.known.keys()):
            self.known[index] = DamagedSample(**samples[index])
            if self.world.is_main:
                self._append({"step": step} | samples[index])
        self._check_limit()

    def _append(self, line: dict[str, Any]) -> None:
        try:
            files.append_line(self.run.damaged, line)
        except OSError as error:  # the count goes on in memory; the next attempt meets this sample again
            LOG.warning(
                "%s: %s. Damaged sample %s is not noted there.", self.run.damaged, error.strerror, line["index"]
            )

    def _check_limit(self) -> None:
        if len(self.known) > self.limit:
            raise damage_limit_error(self.shards, f"{len(self.known)} damaged", self.known.values(), self.limit)
