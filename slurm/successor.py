"""``python -m slurm.successor RUN WHAT JOB``: where SLURM requeues nothing, another job takes over from this one.

It has the same options and waits for the end of the old one. Whatever waits in the queue for the old job's success
is made to wait for the new one's before the old one ends: with ``--kill-on-invalid-dep`` SLURM would take it.
"""

from __future__ import annotations

import re
import sys

from hpcssl.errors import EXIT_DONE, EXIT_FAILED, HpcsslError
from hpcssl.files import RunDir
from slurm import records, sched, script, start
from slurm.cluster import Profile

ONCE = ("dependency", "begin", "hold", "time-min")
"""Options that the old job has met already."""


def take_over(run: RunDir, what: str, job: str) -> str:
    """Submit the successor of a job, or find the one it has; its id. Raises ``SubmitError``."""
    with records.locked(run):  # no cancel falls between the two
        known = records.submitted(run).get(what)
        if known is not None and known.job != job:
            return known.job
        options = {k: v for k, v in (known.options if known else {}).items() if k not in ONCE}
        profile = Profile(**known.profile) if known and known.profile else Profile()
        new = script.submit(run, what, options | {"dependency": f"afterany:{job}"}, profile, follows=job)
        relink(job, new, options.get("clusters"))
        return new


def relink(old: str, new: str, cluster: str | None = None) -> list[str]:
    """Make every queued job that waits for the success or failure of ``old`` wait for ``new``; their ids."""
    moved = []
    for line in sched.call("squeue", "-h", "-t", "PD", "-o", "%i|%E", cluster=cluster).stdout.splitlines():
        child, _, waits = line.strip().partition("|")
        waits = re.sub(r"\([^)]*\)", "", waits)  # (unfulfilled)
        changed = re.sub(rf"\b(afterok|afternotok|afterany):((?:\d+:)*){old}\b", rf"\1:\g<2>{new}", waits)
        if child == new or changed == waits:
            continue
        answer = sched.call("scontrol", "update", f"jobid={child}", f"dependency={changed}", cluster=cluster)
        if answer.returncode:
            _say(f"job {child} still waits for {old}, not for {new}: {' '.join(answer.stderr.split())}; to mend: "
                 f"scontrol update jobid={child} dependency={changed}")
        else:
            moved.append(child)
    return moved


def _say(sentence: str) -> None:
    sys.stderr.write(f"hpcssl: {sentence}\n")
    sys.stderr.flush()


def main(folder: str, what: str, job: str) -> int:
    start.hold()  # a signal between sbatch's answer and its note would leave a job that nobody knows
    try:
        _say(f"job {job} cannot be requeued here: job {take_over(RunDir(folder), what, job)} takes over")
    except HpcsslError as error:
        _say(f"job {job} cannot be requeued here, and no job takes over: {error}")
        return EXIT_FAILED
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
