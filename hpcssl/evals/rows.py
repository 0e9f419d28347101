"""Result rows: one JSON line per evaluation in ``RUN/evals/NAME.jsonl``.

A row records what was measured, for which weights, on which data, with which options and which code. Its ``identity``
is a digest of everything that decides the scores: an identical evaluation returns the stored row.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from hpcssl import config, files
from hpcssl.code_version import code_commit
from hpcssl.data.shards import ShardSet
from hpcssl.distributed.world import World
from hpcssl.evals.context import EvalContext
from hpcssl.run_dir import RunDir
from hpcssl.storage import folders
from hpcssl.storage.records import Fields

Row = dict[str, Any]
"""A result row: the keys that ``build_row`` writes, with plain values."""


ROW_FIELDS: Fields = {
    **dict.fromkeys(("eval", "identity", "weights_sha256", "fingerprint", "method", "arch"), str),
    **dict.fromkeys(("train", "val", "commit", "time"), str),
    "step": int | None,
    "options": dict,
    "metrics": dict,
}
"""What every stored row has. Other lines of the file are reported and skipped, and their evaluation runs again."""


def compute_identity(name: str, options: object, sets: Mapping[str, ShardSet], weights_sha256: str) -> str:
    """Return the sha256 of everything that decides the scores of an evaluation.

    Args:
        name: The evaluation.
        options: Its options, a dataclass instance.
        sets: Its shard sets by role (``train``, ``val``, ``test``).
        weights_sha256: Digest of the encoder.
    """
    return config.fingerprint(
        {
            "eval": name,
            "options": config.as_dict(options),
            "weights": weights_sha256,
            **{role: data.digest for role, data in sets.items()},
        }
    )


def read_rows(run: RunDir | None, name: str) -> list[Row]:
    """Return the rows of an evaluation in a run folder, oldest first; no rows without a run folder."""
    return [] if run is None else files.read_lines(run.eval_rows(name), ROW_FIELDS)


def find_row(run: RunDir | None, name: str, identity: str, world: World) -> Row | None:
    """Return the stored row of an identity, as rank 0 reads it, or None. A collective."""
    local = next((row for row in read_rows(run, name) if row["identity"] == identity), None)
    row: Row | None = json.loads(world.broadcast_text(json.dumps(local) if world.is_main else None))
    return row


def store_row(run: RunDir | None, name: str, row: Row, world: World) -> Row:
    """Append a row of rank 0 to the run folder, if there is one. A collective.

    Returns:
        The stored row, on every rank. That is another process's, if one was computing the same at the same time.
    """
    if run is not None:
        path, mine = run.eval_rows(name), row

        def store() -> None:
            nonlocal row
            folders.make_folder(path.parent)
            with files.exclusive_lock(path):
                stored = next((other for other in read_rows(run, name) if other["identity"] == mine["identity"]), None)
                if stored is None:
                    files.append_line(path, mine)
            row = stored or mine

        world.run_on_main(store)  # an error on rank 0 is raised on all ranks
    stored_row: Row = json.loads(world.broadcast_text(json.dumps(row) if world.is_main else None))
    return stored_row


def build_row(
    name: str, context: EvalContext[Any], sets: Mapping[str, ShardSet], metrics: dict[str, float], seconds: float
) -> Row:
    """Build the row of a finished evaluation.

    Args:
        name: The evaluation.
        context: What it was given; its ``details`` go into the row.
        sets: The shard sets by role, as they were named (before any copy to this machine).
        metrics: Scores in percent.
        seconds: Duration.
    """
    encoder, world = context.encoder, context.world
    return {
        "eval": name,
        "identity": context.identity,
        "step": encoder.meta["step"],
        "weights": encoder.path.name,
        "weights_sha256": encoder.sha256,
        "fingerprint": encoder.meta["fingerprint"],
        "method": encoder.meta["method"],
        "arch": encoder.meta["arch"].arch,
        "options": config.as_dict(context.options),
        "metrics": metrics,
        "details": context.details,
        **{role: data.digest for role, data in sets.items()},
        **{f"{role}_name": _short_name(data) for role, data in sets.items()},
        "world": world.size,
        "device": world.device.type,
        "seconds": round(seconds, 3),
        "commit": code_commit(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def build_summary_row(name: str, rows: Sequence[Row], metrics: dict[str, float]) -> Row:
    """Build the row of scores over several data sets from the rows of the data sets.

    Args:
        name: The evaluation.
        rows: The row of each data set, of the same encoder.
        metrics: Scores over all of them, in percent.
    """
    identities = [row["identity"] for row in rows]
    roles = ("train", "val", "test")
    return (
        rows[0]
        | {role: config.fingerprint({"sets": [row[role] for row in rows]}) for role in roles}
        | {f"{role}_name": f"{len(rows)} sets" for role in roles}
        | {
            "identity": summary_identity(name, rows),
            "metrics": metrics,
            "details": {"rows": identities},
            "options": rows[0]["options"] | {"sets": "+".join(row["options"]["sets"] for row in rows)},
            "seconds": round(sum(row["seconds"] for row in rows), 3),
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
        }
    )


def summary_identity(name: str, rows: Sequence[Row]) -> str:
    """Return the identity of the row over several data sets."""
    return config.fingerprint({"eval": name, "rows": [row["identity"] for row in rows]})


def _short_name(data: ShardSet) -> str:
    """The last two names of a set's folder, such as ``imagenet/train``, for tables."""
    return "/".join(str(data.root).rstrip("/").split("/")[-2:])
