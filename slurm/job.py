"""What runs inside a job, once per task: ``python -m slurm.job RUN WHAT``, a call that never returns.

Nothing but the standard library is imported before the handlers stand. The call ends in ``os._exit``, so that no
stuck thread of a collective decides how the task ends.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import traceback
from functools import partial

from hpcssl import launch
from hpcssl.errors import EXIT_FAILED, HpcsslError, Stopped, sentence
from hpcssl.files import RunDir
from hpcssl.signals import StopFlag
from slurm import again, attempts, freeze, records, sched, start
from slurm.again import ATTEMPT, LOCAL_JOB


def main(folder: str, what: str) -> None:
    """One task of a job of the run in ``folder``: the training, or the evaluation called ``what``."""
    stop = StopFlag().install(signal.SIGINT)
    start.release()
    run, code, place, attempt = RunDir(folder), EXIT_FAILED, None, None
    try:
        place, attempt = here(), this_attempt(run, what)
        enter(place)
        freeze.verify(run)
        if place is None or place.rank == 0:
            again.explain_before(run, what, attempt)
        work = _train if what == records.TRAIN else _evaluate
        code = work(run, what, stop, attempt, place)
    except Stopped as error:  # before the run was ours: no trainer has written a line
        code = error.exit_code
        _crashed(run, what, attempt, place, str(error), stop, cause="stopped")
    except HpcsslError as error:
        code = error.exit_code
        _crashed(run, what, attempt, place, str(error), stop)
    except BaseException as error:  # noqa: BLE001 - a task that dies without a word looks like a KILL
        traceback.print_exc()
        _crashed(run, what, attempt, place, sentence(error) or
                 f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", stop)
    leave(run, code, attempt, place)


def here() -> launch.Place | None:
    """This task's place: SLURM's or the local supervisor's; None for a single task."""
    size = int(os.environ.get("SUBMITIT_LOCAL_NTASKS", "1"))
    if LOCAL_JOB not in os.environ:
        for name in (*launch.TORCHRUN, launch.TOKEN):  # left over from the shell that submitted
            os.environ.pop(name, None)
        return launch.find()
    if size == 1:
        return None
    rank, token = int(os.environ["SUBMITIT_LOCAL_GLOBALID"]), os.environ[launch.TOKEN]
    return launch.Place(rank=rank, local_rank=rank, size=size, address="127.0.0.1", port=launch.port_of(token),
                        token=token)


def enter(place: launch.Place | None) -> None:
    for name in (*launch.TORCHRUN, launch.TOKEN):
        os.environ.pop(name, None)
    os.environ.update(place.environment() if place else {})


def this_attempt(run: RunDir, what: str) -> dict:
    """Number, job, restart count and host of this attempt. Only rank 0 writes it down."""
    host = os.environ.get("SLURM_JOB_NODELIST") or os.uname().nodename
    if LOCAL_JOB in os.environ:
        number = int(os.environ[ATTEMPT])
        return {"attempt": number, "job": os.environ[LOCAL_JOB], "restart": number - 1, "host": host}
    job, restart = sched.own_job()
    known = [a for a in attempts.history(run, what) if (a.job, a.restart) == (job, restart)]
    number = known[-1].number if known else attempts.next_number(run, what)
    return {"attempt": number, "job": job, "restart": restart, "host": host}


def _train(run: RunDir, what: str, stop: StopFlag, attempt: dict, place: launch.Place | None) -> int:
    from hpcssl.run import train
    from slurm import beside

    if (place is None or place.rank == 0) and LOCAL_JOB not in os.environ:  # there the supervisor looks
        beside.follow(run)
    return train(run, stop=stop, requeue=partial(again.after_stop, run, what, attempt), attempt=attempt,
                 on_hang=partial(_hung, run, what, attempt, place, stop), allow_pipe=records.allowed_pipe(run))


def _evaluate(run: RunDir, what: str, stop: StopFlag, attempt: dict, place: launch.Place | None) -> int:
    from slurm.evaluate import evaluate

    return evaluate(run, what, stop=stop, requeue=partial(again.after_stop, run, what, attempt), attempt=attempt)


def _hung(run: RunDir, what: str, attempt: dict, place: launch.Place | None, stop: StopFlag, sentence: str) -> None:
    """Leave from the thread that found no progress; the main thread may never come back."""
    _crashed(run, what, attempt, place, sentence, stop, cause="hang")
    leave(run, EXIT_FAILED, attempt, place)


def _crashed(run: RunDir, what: str, attempt: dict | None, place: launch.Place | None, sentence: str,
             stop: StopFlag, cause: str = "error") -> None:
    """Write down an end that wrote no line of its own.

    A signal reaches every process of a step, also those that an evaluation has started: what fails after it, may well
    fail because of it. That is a stop; what fails anyhow will fail again without one.
    """
    rank = place.rank if place else 0
    cause = "stopped" if stop.is_set() and what != records.TRAIN else cause
    print(f"rank {rank}: {sentence}", file=sys.stderr, flush=True)  # noqa: T201 - the task's log
    if attempt is None:
        return

    def ended() -> bool:  # the trainer, or another rank, has said why
        return any(a.number == attempt["attempt"] and a.cause for a in attempts.history(run, what))

    with contextlib.suppress(OSError):  # a full disk must not hide the first error
        if ended():  # asked first: of a thousand ranks few should queue for the file
            return
        with records.alone(run):
            if not ended():
                attempts.end(run, what, attempt, cause, f"rank {rank}: {sentence}")


def leave(run: RunDir, code: int, attempt: dict | None, place: launch.Place | None) -> None:
    """Flush and go, whatever threads are still about."""
    if LOCAL_JOB in os.environ and attempt is not None:  # submitit's local controller keeps exit codes to itself
        with contextlib.suppress(OSError):
            records.note(run, "exit", attempt["job"], attempt=attempt["attempt"], rank=place.rank if place else 0,
                         code=code)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    main(*sys.argv[1:])
