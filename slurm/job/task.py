"""The program of each task of a job: ``python -m slurm.job.task RUN WHAT``.

Before the signal handlers are installed only the standard library and small modules of hpcssl are imported, so that
signals wait as briefly as possible. The task ends with ``os._exit``: a thread that is stuck in a collective must not
delay the end of the process or change its exit code.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import traceback
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NoReturn

from hpcssl.cli_runner import print_message
from hpcssl.distributed import launch
from hpcssl.errors import EXIT_FAILED, HpcsslError, RankLost, Stopped, describe_error
from hpcssl.run_dir import RunDir
from hpcssl.signals import StopFlag
from hpcssl.storage import folders
from slurm.backend import code_snapshot, scheduler
from slurm.backend.owner import current_token
from slurm.job import bootstrap, requeue
from slurm.job.requeue import ATTEMPT_VARIABLE, LOCAL_JOB_VARIABLE
from slurm.log import attempts, job_log
from slurm.log.launches import LAUNCH_TIME_VARIABLE, current_launch


@dataclass
class Task:
    """One task of an attempt.

    Attributes:
        run: The run folder.
        what: ``train``, or the text of an evaluation.
        stop: The flag that the stopping signals set.
        info: Rank, number of processes and rendezvous; None if the task is the only one, or not known yet.
        attempt: The attempt, from ``describe_attempt``; None if not known yet.
    """

    run: RunDir
    what: str
    stop: StopFlag = field(default_factory=StopFlag)
    info: launch.LaunchInfo | None = None
    attempt: dict[str, Any] | None = None

    @property
    def rank(self) -> int:
        """The rank of this task; 0 if it is the only one."""
        return self.info.rank if self.info else 0


def main(folder: str, what: str) -> NoReturn:
    """Run one task of a job: the training, or an evaluation. Does not return.

    Args:
        folder: The run folder.
        what: ``train``, or the text of an evaluation.
    """
    task, code = Task(RunDir(folder), what), EXIT_FAILED
    task.stop.install(signal.SIGINT)
    bootstrap.unblock_signals()
    try:
        folders.pin_folder(task.run.root)  # until this process ends: a folder that is moved stays where it is
        task.info, task.attempt = detect_launch_info(), describe_attempt(task.run, what)
        export_launch_info(task.info)
        code_snapshot.verify_snapshot(task.run)
        if task.rank == 0:
            requeue.record_previous_end(task.run, what, task.attempt)
            stop_if_preempted(task.stop, task.attempt)
        code = _train(task, task.attempt) if what == job_log.TRAIN else _evaluate(task, task.attempt)
    except Stopped as error:  # before the run was locked: the trainer has recorded no attempt
        code = error.exit_code
        record_failure(task, str(error), cause="stopped")
    except RankLost as error:
        code = error.exit_code
        record_failure(task, str(error), error.cause, is_consequence=error.is_consequence)
    except HpcsslError as error:
        code = error.exit_code
        record_failure(task, str(error))
    except BaseException as error:  # noqa: BLE001 - without a record it would look like a death by SIGKILL
        traceback.print_exc()
        message = describe_error(error) or f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        record_failure(task, message, is_consequence=_is_collective_error(error))
    exit_task(task, code)


def detect_launch_info() -> launch.LaunchInfo | None:
    """Return this task's rank and rendezvous from SLURM's or the local supervisor's variables; None for a single task.

    Raises:
        WorldError: The variables are incomplete.
    """
    size = int(os.environ.get("SUBMITIT_LOCAL_NTASKS", "1"))
    if LOCAL_JOB_VARIABLE not in os.environ:
        _remove_launch_variables()  # those of the shell that submitted
        return launch.detect_launcher()
    if size == 1:
        return None
    rank, token = int(os.environ["SUBMITIT_LOCAL_GLOBALID"]), os.environ[launch.TOKEN]
    return launch.LaunchInfo(
        rank=rank, local_rank=rank, size=size, address="127.0.0.1", port=launch.port_for(token), token=token
    )


def export_launch_info(info: launch.LaunchInfo | None) -> None:
    """Set the environment variables from which the trainer reads its rank and rendezvous; None removes them."""
    _remove_launch_variables()
    os.environ.update(info.environment() if info else {})


def describe_attempt(run: RunDir, what: str) -> dict[str, Any]:
    """Describe the attempt that this process belongs to.

    Every rank computes the same values; only rank 0 records them.

    Args:
        run: The run folder.
        what: ``train``, or an evaluation.

    Returns:
        ``attempt`` (its number), ``job``, ``restart``, ``launch`` and ``host``; on SLURM also the job's ``token``, and
        ``began``, the Unix time at which the batch script launched it.
    """
    host = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST") or os.uname().nodename
    if LOCAL_JOB_VARIABLE in os.environ:
        number = int(os.environ[ATTEMPT_VARIABLE])
        job = os.environ[LOCAL_JOB_VARIABLE]
        return {"attempt": number, "job": job, "restart": number - 1, "launch": 0, "host": host}
    (job, restart), token, launches = scheduler.current_job(), current_token(), current_launch()
    key = (job, token, restart, launches)
    recorded = [a for a in attempts.read_attempts(run, what) if (*a.job_key, a.restart, a.launch) == key]
    number = recorded[-1].number if recorded else attempts.next_number(run, what)
    optional = {"token": token, "began": int(os.environ.get(LAUNCH_TIME_VARIABLE, 0))}
    about = {"attempt": number, "job": job, "restart": restart, "launch": launches, "host": host}
    return about | {name: value for name, value in optional.items() if value}


def stop_if_preempted(stop: StopFlag, attempt: dict[str, Any]) -> None:
    """Request a stop if the job was preempted between two launches, when there was no task to get the signal.

    Args:
        stop: The flag of this process.
        attempt: The attempt, from ``describe_attempt``.
    """
    if attempt["launch"] and scheduler.query_job_or_unknown(attempt["job"]).preempted:
        stop.set("SIGTERM")


def record_failure(task: Task, message: str, cause: str = "error", *, is_consequence: bool = False) -> None:
    """Print a failure, and record it as the end of the attempt unless an end is recorded already.

    A signal reaches every process of a step, including those that an evaluation has started. An evaluation that fails
    after a signal probably fails because of it, so its cause is ``stopped``. If it fails for another reason, it fails
    again without a signal.

    Args:
        task: This task.
        message: The error in one line.
        cause: One of the causes in ``attempts``.
        is_consequence: See ``attempts.Attempt``.
    """
    cause = "stopped" if task.stop.is_set() and task.what != job_log.TRAIN else cause
    print_message(message, f"rank {task.rank}")
    attempt = task.attempt
    if attempt is None:
        return

    with contextlib.suppress(OSError):  # a full disk must not hide the first error
        # checked before the lock: of a thousand ranks few should wait for it
        if describe_recorded_failure(task):  # by the trainer, or by another rank
            return
        with job_log.attempt_lock(task.run):
            if not describe_recorded_failure(task):
                message = f"rank {task.rank}: {message}"
                attempts.record_end(task.run, task.what, attempt, cause, message, is_consequence=is_consequence)


def describe_recorded_failure(task: Task) -> str:
    """Return the cause and the message of the end of this task's attempt, if it was recorded; else an empty string."""
    recorded = attempts.find_attempt(task.run, task.what, task.attempt) if task.attempt else None
    return "" if recorded is None or not recorded.cause else f"{recorded.cause}: {recorded.error}"


def exit_task(task: Task, code: int) -> NoReturn:
    """Flush the streams and end the process, whatever its other threads do."""
    if LOCAL_JOB_VARIABLE in os.environ and task.attempt is not None:  # submitit's local controller keeps no exit codes
        with contextlib.suppress(OSError):
            number = task.attempt["attempt"]
            job_log.record_event(task.run, "exit", task.attempt["job"], attempt=number, rank=task.rank, code=code)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _train(task: Task, attempt: dict[str, Any]) -> int:
    from hpcssl.run import train
    from slurm.job import concurrent_evals

    if task.rank == 0 and LOCAL_JOB_VARIABLE not in os.environ:  # for local jobs the supervisor submits them
        concurrent_evals.start_polling(task.run)
    return train(
        task.run,
        stop=task.stop,
        requeue=partial(requeue.handle_stop, task.run, task.what, attempt),
        attempt=attempt,
        on_hang=partial(_exit_on_hang, task),
        failure=partial(describe_recorded_failure, task),
        allow_pipe=job_log.read_allowed_pipe(task.run),
    )


def _evaluate(task: Task, attempt: dict[str, Any]) -> int:
    from slurm.job.evaluate import evaluate

    handle_stop = partial(requeue.handle_stop, task.run, task.what, attempt)
    return evaluate(
        task.run,
        task.what,
        stop=task.stop,
        requeue=handle_stop,
        attempt=attempt,
        record_failure=lambda cause, sentence: record_failure(task, sentence, cause),
        leave=lambda _: exit_task(task, EXIT_FAILED),
        failure=partial(describe_recorded_failure, task),
    )


def _exit_on_hang(task: Task, message: str) -> NoReturn:
    """End the process from the watchdog's thread: the main thread may never continue."""
    record_failure(task, message, cause="hang")
    exit_task(task, EXIT_FAILED)


def _is_collective_error(error: BaseException) -> bool:
    if "torch" not in sys.modules:  # it failed before it could call a collective
        return False
    from hpcssl.distributed.world import World

    return World.is_collective_error(error)


def _remove_launch_variables() -> None:
    for name in (*launch.TORCHRUN, launch.TOKEN):
        os.environ.pop(name, None)


if __name__ == "__main__":
    main(*sys.argv[1:])
