"""A complete example on one machine, in minutes: ``python -m slurm.demo [RUN]``.

It runs the commands that a user types: scanned digits become shards, MSF trains on two processes, two evaluations
follow, and the trained encoder is compared with the untrained one. During the training it sends the signals of a
preemption once; the run continues by itself. Then two short runs of the same recipe, one preempted and one not, must
end in the same bits. The exit code is not 0 if they do not, or if the encoder has not learned. After an interruption,
the same command continues.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

from hpcssl.errors import EXIT_DONE, EXIT_FAILED, HpcsslError
from hpcssl.files import read_lines
from hpcssl.run_dir import RunDir
from slurm.log import attempts
from slurm.manage import control, status
from slurm.manage.wait import wait_for_jobs

MODULES = {"hpcssl": "hpcssl", "hpcssl-submit": "slurm", "hpcssl-shard": "data_prep"}
"""The module of each command, for a checkout that is not installed."""
PREEMPT_AT = 0.1
"""Share of the steps after which the preemption takes place."""
MIN_SCORE, MIN_GAIN = 92.0, 8.0
"""20-NN accuracy that the trained encoder must reach, and its lead over the untrained one, in percentage points."""
PAIR_EPOCHS = 12
"""Length of the two runs whose final states are compared: a second run of full length would take minutes."""
PAGE = "report.html"


def main(words: list[str]) -> int:
    """Run the example. Returns the exit code.

    Args:
        words: The run folder, or nothing for ``runs/demo``. The shards go into the folder ``digits`` beside it.
    """
    run = RunDir(words[0] if words else "runs/demo")
    data = run.root.with_name("digits")
    start = time.monotonic()
    try:
        _run_command("hpcssl-shard", "digits", _relative(data))
        code = _train(run, data, "--evals", "knn,linear", "evals.knn_every_epochs=20")
        if code == EXIT_DONE:
            _run_command("hpcssl", "results", _relative(run.root), "--write", _relative(run.root / "RESULTS.md"))
            _run_command("hpcssl", "report", _relative(run.root), "--to", _relative(run.root / PAGE), "--compute")
            pair = [RunDir(run.root.with_name(f"{run.root.name}-{kind}")) for kind in ("preempted", "undisturbed")]
            _remove_unusable(pair)
            length = f"schedule.epochs={PAIR_EPOCHS}"
            code = _train(pair[0], data, length) or _train(pair[1], data, length, preempt=False)
        if code != EXIT_DONE:
            _write(f"the demo failed: a run ended with exit code {code}")
            return EXIT_FAILED
        digests = [_run_command("hpcssl", "digest", "--run", _relative(r.root), capture=True) for r in pair]
        return _judge(run, pair, digests, time.monotonic() - start)
    except subprocess.CalledProcessError as error:
        _write(f"the demo failed: {Path(error.cmd[0]).name} ended with exit code {error.returncode}")
        return EXIT_FAILED
    except HpcsslError as error:
        _write(f"the demo failed: {error}")
        return error.exit_code


def _train(run: RunDir, data: Path, *words: str, preempt: bool = True) -> int:
    """Submit the training on this machine, unless it runs already or is finished, and follow it to its end.

    Args:
        run: The run folder.
        data: The folder of the shards.
        *words: Options and values besides those that all runs share.
        preempt: Whether to preempt the training once.

    Returns:
        The exit code of the training, or of the first evaluation that failed.
    """
    evals, values = [w for w in words if "=" not in w], [w for w in words if "=" in w]
    folder = _relative(run.root)
    if not control.active_jobs(run):
        _run_command(
            "hpcssl-submit",
            "digits_msf",
            "--run",
            folder,
            "--local",
            "--ntasks-per-node",
            "2",
            *evals,
            f"data.train={_relative(data / 'train')}",
            f"data.val={_relative(data / 'val')}",
            *values,
        )
    code = wait_for_jobs(run, _write, on_poll=_preempt_once(run) if preempt else lambda: None)
    if code != EXIT_DONE:
        _run_command("hpcssl-submit", "logs", folder)
    return code


def _remove_unusable(pair: list[RunDir]) -> None:
    """Remove what an interrupted demo has left and that proves nothing: both runs of the pair start again."""
    is_whole = pair[0].finished is not None and _count_preemptions(pair[0]) == 0
    if is_whole or _count_preemptions(pair[1]):
        for run in pair:
            if control.active_jobs(run):
                control.cancel(run)
            shutil.rmtree(run.root, ignore_errors=True)


def _preempt_once(run: RunDir) -> Callable[[], None]:
    """A function that preempts the training once, when it has made some progress."""
    total = status.total_steps(run) or 0
    is_done = len(attempts.read_attempts(run)) > 1 or run.finished is not None

    def preempt_if_due() -> None:
        nonlocal is_done
        if is_done or not total or status.current_step(run) < PREEMPT_AT * total:
            return
        is_done = True
        try:
            _run_command("hpcssl-submit", "preempt", _relative(run.root))
        except subprocess.CalledProcessError:
            if run.finished is None:  # else it was faster than the command
                raise

    return preempt_if_due


def _judge(run: RunDir, pair: list[RunDir], digests: list[str], seconds: float) -> int:
    """Say what was shown, and return the exit code."""
    rows = sorted(read_lines(run.eval_rows("knn")), key=lambda row: row["step"])
    first, last = rows[0]["metrics"], rows[-1]["metrics"]
    untrained, trained = first["knn20"], last["knn20"]
    history = attempts.read_attempts(run)
    resumed = [attempt.first_step for before, attempt in pairwise(history) if before.cause == "preempted"]
    preempted = [_count_preemptions(r) for r in pair]
    is_same = len(set(digests)) == 1
    count = _count_preemptions(run)
    where = f" (resumed at step {', '.join(map(str, resumed))})" if resumed else ""
    _write(
        f"""
1. Preempted {"once" if count == 1 else f"{count} times"}{where}, the training continued by itself.
2. It learned without labels: 20-NN {untrained:.1f} % untrained, {trained:.1f} % trained;
   with one label per class (1-NN, mean of random draws) {first["one_label"]:.1f} % and {last["one_label"]:.1f} %.
3. {PAIR_EPOCHS} epochs, once preempted and once not, end in {"the same" if is_same else "DIFFERENT"} bits: \
{" ".join(dict.fromkeys(digest[:16] for digest in digests))}.
4. Open {_relative(run.root / PAGE)}: scores, curves, nearest neighbors. It took {seconds:.0f} s.
5. Your own images: `hpcssl-shard images FOLDER data/mine` (docs/tutorials/own_images.md)."""
    )
    if not preempted[0] or preempted[1]:
        _write(f"the demo failed: preempted {preempted[0]} and {preempted[1]} times instead of once and never")
        return EXIT_FAILED
    if not is_same:
        _write("the demo failed: the run that was preempted has another digest than the one that was not")
        return EXIT_FAILED
    if trained < MIN_SCORE or trained < untrained + MIN_GAIN:
        _write(f"the demo failed: expected {MIN_SCORE:g} %, and {MIN_GAIN:g} points more than the untrained encoder")
        return EXIT_FAILED
    return EXIT_DONE


def _count_preemptions(run: RunDir) -> int:
    return sum(attempt.cause == "preempted" for attempt in attempts.read_attempts(run))


def _run_command(program: str, *words: str, capture: bool = False) -> str:
    """Show and run a command. Returns what it prints with ``capture``, which is shown as well."""
    _write("$ " + shlex.join([program, *words]))
    installed = Path(sys.executable).with_name(program)
    path = str(installed) if installed.exists() else shutil.which(program)
    command = [path, *words] if path else [sys.executable, "-m", MODULES[program], *words]
    done = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE if capture else None)
    if capture:
        _write(done.stdout.strip())
    return (done.stdout or "").strip()


def _relative(path: Path) -> str:
    """The path as it is typed in this folder."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def _write(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
