"""Last line of a batch script: ``python -m slurm.after RUN WHAT CODE`` settles how the step ended.

The tasks are gone; only the batch script still lives. It asks for another attempt after a crash that may be worth
one (a rank that was killed could not ask itself), and exits with the code that the job shall have: whatever waits
for the job's success must start only when there was success.
"""

from __future__ import annotations

import signal
import sys
import time

from hpcssl.errors import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED
from hpcssl.files import RunDir
from slurm import again, attempts, job, sched

BY_SIGNAL = (128 + 2, 128 + 10, 128 + 12, 128 + 15)
"""Died by INT, USR1, USR2 or TERM: stopped before it could take the signal, which is no crash."""
BY_KILL = 128 + 9
GRANTED_S = 60
"""How long to wait for the end that a granted requeue brings: who leaves first would complete the job."""


def settle(run: RunDir, what: str, code: int) -> tuple[int, bool]:
    """The job's exit code after its step ended with ``code``, and whether a requeue was granted here.

    srun gives the highest code of all tasks: one that crashed with 1 hides behind those that left with 75 because
    of it, so 75 counts as a stop only where the attempt's own record says so.
    """
    if code == EXIT_DONE:
        return code, False
    attempt = job.this_attempt(run, what)
    mine = [a for a in attempts.history(run, what) if a.number == attempt["attempt"] and a.cause]
    if mine and mine[0].cause == "done":
        return EXIT_DONE, False  # whatever ended the tasks after that
    now = sched.ask_quietly(attempt["job"])
    cause = again.explain(run, what, attempt, now, [signal.Signals(code - 128).name] if code in BY_SIGNAL else [])
    stopped = code == EXIT_STOPPED and bool(mine) and not mine[0].crashed
    if stopped:  # rank 0 has asked; if that was in vain, this is the second chance
        cause = mine[0].cause if cause == "stopped" else cause
        verdict = attempts.Verdict(cause != "cancelled", f"every rank left by itself ({cause})")
    elif cause != "stopped" or (code in BY_SIGNAL and not mine):
        if not mine or cause == "node_fail":
            attempts.end(run, what, attempt, cause, f"its step ended with exit code {code}")
        verdict = attempts.Verdict(cause != "cancelled", f"{cause}; its step ended with exit code {code}")
    else:
        verdict = attempts.settle(run, what, attempt, f"its step ended with exit code {code}", sure=code == BY_KILL)
    refused = again.ask(run, what, attempt, now, cause) if verdict.again else None
    _say(verdict.why + ("; another attempt was asked for" if verdict.again and refused is None else
                        f"; no other attempt: {refused}" if verdict.again else "; no other attempt is asked for"))
    asked = verdict.again and refused is None and now.requeue and now.restarts == attempt["restart"]
    return EXIT_FAILED if code == EXIT_STOPPED and not stopped else code, asked


def _say(sentence: str) -> None:
    print(f"hpcssl: {sentence}", file=sys.stderr, flush=True)  # noqa: T201 - the job's log


def main(run: str, what: str, code: int) -> int:
    code, granted = settle(RunDir(run), what, code)
    job_id, restart = sched.own_job()
    limit = time.monotonic() + (GRANTED_S if granted else 0)
    while time.monotonic() < limit and sched.ask_quietly(job_id).restarts == restart:
        time.sleep(1)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
