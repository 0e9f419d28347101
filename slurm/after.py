"""Last line of a batch script: ``python -m slurm.after RUN WHAT CODE`` settles how the step ended.

The tasks are gone; only the batch script still lives. It asks for another attempt after a crash that may be worth
one (a rank that was killed could not ask itself), and exits with the code that the job shall have: whatever waits
for the job's success must start only when there was success.
"""

from __future__ import annotations

import sys

from hpcssl.errors import EXIT_DONE, EXIT_STOPPED
from hpcssl.files import RunDir
from slurm import attempts, job, records, sched

BY_SIGNAL = (128 + 10, 128 + 12, 128 + 15)
"""Died by USR1, USR2 or TERM: stopped before it could take the signal, which is no crash."""


def settle(run: RunDir, what: str, code: int) -> int:
    """The job's exit code after its step ended with ``code``."""
    if code in (EXIT_DONE, EXIT_STOPPED):
        return code
    attempt = job.this_attempt(run, what)
    if records.cancelled(run, attempt["job"]):
        return code
    if code in BY_SIGNAL:
        attempts.end(run, what, attempt, "preempted", "stopped while it started")
        again = attempts.Verdict(True, "stopped while it started")
    else:
        again = attempts.settle(run, what, attempt, f"its step ended with exit code {code}")
    refused = sched.requeue(attempt["job"]) if again.again else None
    _say(again.why + ("; another attempt was asked for" if again.again and refused is None else
                      f"; no other attempt: {refused}" if again.again else "; no other attempt is asked for"))
    return code


def _say(sentence: str) -> None:
    print(f"hpcssl: {sentence}", file=sys.stderr, flush=True)  # noqa: T201 - the job's log


if __name__ == "__main__":
    sys.exit(settle(RunDir(sys.argv[1]), sys.argv[2], int(sys.argv[3])))
