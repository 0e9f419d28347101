"""What a batch script runs after its step: ``python -m slurm.job.epilogue RUN WHAT CODE`` handles the end of the step.

The tasks are gone by then; only the batch script still runs. After a crash the epilogue arranges another attempt, which
a killed rank could not do itself: in this allocation where that is possible (``relaunch``), else by a requeue. It exits
with ``EXIT_RELAUNCH``, or with the exit code of the job: jobs that depend on its success must start only after one.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from typing import Any

from hpcssl.cli_runner import print_message
from hpcssl.errors import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, SubmitError, describe_error
from hpcssl.run_dir import RunDir
from hpcssl.storage import folders
from slurm.backend import permissions, scheduler
from slurm.job import relaunch, requeue, task
from slurm.log import attempts, job_log, retry
from slurm.log.launches import EXIT_RELAUNCH
from slurm.log.retry import RetryDecision

SIGNAL_EXIT_CODES = (128 + 2, 128 + 10, 128 + 12, 128 + 15)
"""Exit codes of a step that INT, USR1, USR2 or TERM ended before it could handle the signal. That is not a crash."""
KILL_EXIT_CODE = 128 + 9
REQUEUE_WAIT_S = 60
"""Seconds to wait for the end of the job that a granted requeue brings: a job that exits before is completed."""


def finalize_step(run: RunDir, what: str, code: int) -> tuple[int, bool]:
    """Record how the step of a job ended, and ask for another attempt if there should be one.

    srun returns the highest exit code of all tasks. A task that crashed with 1 is hidden by those that left with 75
    because of it, so 75 counts as a stop only if the attempt's own record agrees. After the loss of a node srun may
    return 0 (measured), so only the record says that the attempt is done.

    Args:
        run: The run folder.
        what: ``train``, or an evaluation.
        code: Exit code of srun.

    Returns:
        The exit code of the job, or ``EXIT_RELAUNCH``; and whether SLURM has granted a requeue here.
    """
    attempt = task.describe_attempt(run, what)
    state = scheduler.query_job_or_unknown(attempt["job"])
    recorded = attempts.find_attempt(run, what, attempt)
    with contextlib.suppress(OSError):  # a full disk must not cost the run its next attempt
        if state.name == "RUNNING" and state.restarts == attempt["restart"]:
            requeue.record_removed_nodes(run, what, attempt, recorded)
            job_log.record_event(run, "step", attempt["job"], what=what, attempt=attempt["attempt"], code=code)
    recorded = attempts.find_attempt(run, what, attempt)
    if recorded is not None and recorded.cause is None:
        recorded = None
    if (recorded is not None and recorded.cause == "done") or (what == job_log.TRAIN and run.finished):
        return EXIT_DONE, False  # what ended the tasks after that does not matter
    signals = [signal.Signals(code - 128).name] if code in SIGNAL_EXIT_CODES else []
    cause = requeue.determine_cause(run, what, attempt, state, signals)
    explanation = f"its step ended with exit code {code}"
    stopped = _was_stopped(code, recorded)
    if stopped and recorded is not None:  # rank 0 has asked for a requeue; if it was refused, this is the second try
        cause = str(recorded.cause) if cause == "stopped" else cause
        decision = RetryDecision(cause != "cancelled", f"the ranks left by themselves ({cause})")
    elif cause != "stopped" or (code in SIGNAL_EXIT_CODES and recorded is None):
        if recorded is None or cause == "node_fail":
            with contextlib.suppress(OSError):
                attempts.record_end(run, what, attempt, cause, explanation)
        decision = RetryDecision(cause != "cancelled", f"{cause}; {explanation}")
    else:
        refusal = _find_refusal(run, attempt) if recorded is None and code == EXIT_FAILED else ""
        if refusal:  # the log has it, and nothing ran that could have recorded it
            with contextlib.suppress(OSError):
                attempts.record_end(run, what, attempt, "error", refusal)
        decision = retry.decide_after_exit(run, what, attempt, explanation, was_killed=code == KILL_EXIT_CODE)
        if decision.retry and _may_relaunch(run, what, attempt):
            print_message(f"{decision.reason}; the next attempt starts in this allocation")
            return EXIT_RELAUNCH, False
    refused = requeue.request_next_attempt(run, what, attempt, state, cause) if decision.retry else None
    if not decision.retry:
        result = "no other attempt is requested"
    elif refused is None:
        result = "another attempt was requested"
    else:
        result = f"no other attempt: {refused}"
    print_message(f"{decision.reason}; {result}")
    granted = decision.retry and refused is None and state.requeue_enabled and state.restarts == attempt["restart"]
    is_misleading = code == EXIT_DONE or (code == EXIT_STOPPED and not stopped)
    return EXIT_FAILED if is_misleading else code, granted


def _was_stopped(code: int, recorded: attempts.Attempt | None) -> bool:
    """Whether the ranks saved and left by themselves. One that takes longer than KillWait to leave is killed."""
    if recorded is None or recorded.is_crash:
        return False
    return code == EXIT_STOPPED or (code == KILL_EXIT_CODE and recorded.was_saved)


def _may_relaunch(run: RunDir, what: str, attempt: dict[str, Any]) -> bool:
    recorded = attempts.find_attempt(run, what, attempt)
    if recorded is None:
        return False
    state = scheduler.query_job_or_unknown(attempt["job"])  # as late as possible: it may be preempted by now
    refusal = relaunch.explain_refusal(run, what, recorded, state)
    if refusal is not None:
        print_message(f"no attempt in this allocation: {refusal}")
    return refusal is None


def _find_refusal(run: RunDir, attempt: dict[str, Any]) -> str:
    """Why ``bootstrap`` has refused to run the job's code, or SLURM to start the step; empty if they have not."""
    try:
        permissions.check(run.root)
    except (SubmitError, OSError) as error:
        return str(error)
    return relaunch.explain_failed_launch(attempt)


def main(run: str, what: str, code: int) -> int:
    """Handle the end of a step, and wait for the requeue if one was granted. Returns what ``finalize_step`` does."""
    try:
        folders.pin_folder(run)
    except OSError as error:  # moved or removed: it must not come into being again with a record of this end
        print_message(f"no other attempt is requested: {describe_error(error)}")
        return EXIT_FAILED if code in (EXIT_DONE, EXIT_STOPPED) else code
    code, granted = finalize_step(RunDir(run), what, code)
    job_id, restart = scheduler.current_job()
    deadline = time.monotonic() + (REQUEUE_WAIT_S if granted else 0)
    while time.monotonic() < deadline and scheduler.query_job_or_unknown(job_id).restarts == restart:
        time.sleep(1)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
