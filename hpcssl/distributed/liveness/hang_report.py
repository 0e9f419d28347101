"""A sentence that says why ranks make no progress, from their last heartbeat records.

These are pure functions, without clock or store. Collectives bind the ranks together: if one rank does not arrive, all
others wait. The rank to blame is therefore searched for in this order: ranks that give no sign of life, ranks that are
behind the others, ranks that call another collective.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence

from hpcssl.distributed.liveness.record import HeartbeatRecord

MAX_CHARACTERS = 900
"""Maximum length of a sentence: it is one line of ``attempts.jsonl`` and of ``hpcssl-submit status``."""


def describe_silent_ranks(silent: Mapping[int, float], records: Mapping[int, HeartbeatRecord]) -> str:
    """Name the ranks that give no sign of life, and where they were last seen.

    Args:
        silent: Seconds without a sign of life, by rank.
        records: The last record of each rank.
    """
    sentences = []
    for rank, seconds in sorted(silent.items()):
        record = records[rank]
        since = f" or stopped: no sign of life for {seconds:.0f} s" if seconds >= 1 else ""
        sentences.append(
            f"{record.name} (process {record.pid}) is gone{since}; last seen in {record.position}{_stack(record)}"
        )
    return _truncate("; ".join(sentences))


def describe_hang(records: Mapping[int, HeartbeatRecord], silent: Mapping[int, float], limit_s: float) -> str:
    """Name the ranks to blame if no rank has made progress for ``limit_s`` seconds.

    Args:
        records: The last record of each rank.
        silent: Seconds without a sign of life, for the ranks that give none.
        limit_s: Seconds without progress.
    """
    head = f"no progress for {limit_s:.0f} s: "
    if silent:
        return _truncate(head + describe_silent_ranks(silent, records))
    ranks = sorted(records.values(), key=lambda record: record.rank)
    behind = _behind(ranks)
    if behind:
        ahead = next(record for record in ranks if record not in behind)
        return _truncate(
            head
            + "; ".join(_stuck(record) for record in behind)
            + f"; the others wait for it in {ahead.position}, after {ahead.count} collectives"
        )
    if len(_by_collective(ranks)) > 1:
        return _truncate(head + describe_mismatch(records))
    if len(ranks) == 1:
        return _truncate(head + _stuck(ranks[0]))
    return _truncate(
        f"{head}all {len(ranks)} ranks wait alike in {ranks[0].position}, collective {ranks[0].count} "
        f"({ranks[0].last}){_stack(ranks[0])}: the network between their nodes may be down"
    )


def describe_mismatch(records: Mapping[int, HeartbeatRecord]) -> str:
    """Say which ranks call which collective, if they differ; else an empty string."""
    groups = _by_collective(sorted(records.values(), key=lambda record: record.rank))
    if len(groups) < 2:
        return ""
    calls = "; ".join(f"{_names(group)} in {call}{_stack(group[0])}" for call, group in groups.items())
    return _truncate(f"a mismatched collective in {next(iter(groups.values()))[0].position}: {calls}")


def named_nodes(sentence: str) -> list[str]:
    """Return the nodes of the ranks that a sentence of this module blames, each once."""
    return list(dict.fromkeys(re.findall(r"\brank \d+ on (\S+) \(process", sentence)))


def _behind(ranks: Sequence[HeartbeatRecord]) -> list[HeartbeatRecord]:
    """The ranks that the others wait for: in an earlier step, or outside a collective that others have entered."""
    steps = {record.step if record.step is not None else -1 for record in ranks}
    if len(steps) > 1:
        return [record for record in ranks if (record.step if record.step is not None else -1) == min(steps)]
    fewest = min(record.count for record in ranks)
    late = [record for record in ranks if record.count == fewest]
    phases = {record.phase for record in ranks}
    if len(late) < len(ranks) and (len(phases) > 1 or not any(record.inside for record in late)):
        return late
    outside = [record for record in ranks if not record.inside]  # all called one collective, and some have left it
    return outside if 0 < len(outside) < len(ranks) and len(_by_collective(ranks)) == 1 else []


def _by_collective(ranks: Sequence[HeartbeatRecord]) -> dict[str, list[HeartbeatRecord]]:
    groups: dict[str, list[HeartbeatRecord]] = {}
    for record in ranks:
        groups.setdefault(f"collective {record.count} ({record.last})", []).append(record)
    return groups


def _stuck(record: HeartbeatRecord) -> str:
    threads = f"; its threads: {record.others}" if record.others else ""
    return (
        f"{record.name} (process {record.pid}) is stuck in {record.position} for {record.idle:.0f} s"
        f"{_stack(record)}{threads}"
    )


def _stack(record: HeartbeatRecord) -> str:
    return f", at {record.stack}" if record.stack else ""


def _names(group: Sequence[HeartbeatRecord]) -> str:
    hosts = Counter(record.host for record in group)
    plural = "s" if len(group) > 1 else ""
    return f"rank{plural} {', '.join(str(record.rank) for record in group)} on {', '.join(hosts)}"


def _truncate(sentence: str) -> str:
    return sentence if len(sentence) <= MAX_CHARACTERS else sentence[: MAX_CHARACTERS - 1] + "…"
