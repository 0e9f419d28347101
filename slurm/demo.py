"""``python -m slurm.demo RUN``: the whole of it on one machine in minutes, by the commands that a user types.

Scanned digits become shards; MSF trains on two processes with two evaluations chained on it, is preempted once by
the signals that SLURM would send, goes on by itself, and its encoder is compared with the untrained one. Ends with
an exit code other than 0 if the encoder has not learned. What a run that was broken off has done is kept.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from hpcssl.errors import EXIT_DONE, EXIT_FAILED, HpcsslError
from hpcssl.files import RunDir, read_lines
from slurm import attempts, control, watch

MODULES = {"hpcssl": "hpcssl", "hpcssl-submit": "slurm", "hpcssl-shard": "data_prep"}
PREEMPT_AT = 0.1
"""Share of the steps after which the preemption comes."""
LEAST, GAIN = 92.0, 8.0
"""What the trained encoder's 20-NN must reach, and by how much it must beat the untrained one, in points."""


def main(words: list[str]) -> int:
    run = RunDir(words[0] if words else "runs/demo")
    data = run.root.with_name("digits")
    began = time.monotonic()
    try:
        _call("hpcssl-shard", "digits", _short(data))
        if not control.living(run):
            _call("hpcssl-submit", "digits_msf", "--run", _short(run.root), "--local", "--ntasks-per-node", "2",
                  "--evals", "knn,linear", f"data.train={_short(data / 'train')}", f"data.val={_short(data / 'val')}")
        code = watch.wait(run, _say, between=_preempt_once(run))
        if code != EXIT_DONE:
            _call("hpcssl-submit", "logs", _short(run.root))
            _say(f"the demo failed: the run ended with exit code {code}")
            return EXIT_FAILED
        _call("hpcssl", "results", _short(run.root), "--write", _short(run.root / "RESULTS.md"))
        return _judge(run, time.monotonic() - began)
    except subprocess.CalledProcessError as error:
        _say(f"the demo failed: {Path(error.cmd[0]).name} ended with exit code {error.returncode}")
        return EXIT_FAILED
    except HpcsslError as error:
        _say(f"the demo failed: {error}")
        return error.exit_code


def _preempt_once(run: RunDir):
    """What is done between two looks at the run: one preemption, once it is under way."""
    total = watch.steps_of(run) or 0
    done = [len(attempts.history(run)) > 1 or run.finished]

    def between() -> None:
        if done[0] or not total or watch.step_of(run) < PREEMPT_AT * total:
            return
        done[0] = True
        _call("hpcssl-submit", "preempt", _short(run.root))
    return between


def _judge(run: RunDir, seconds: float) -> int:
    rows = sorted(read_lines(run.eval_rows("knn")), key=lambda row: row["step"])
    before, after = rows[0]["metrics"]["knn20"], rows[-1]["metrics"]["knn20"]
    stops = [a for a in attempts.history(run) if a.cause == "preempted"]
    _say(f"20-NN: untrained {before:.1f} %, trained {after:.1f} %; preempted {len(stops)} time(s); "
         f"{seconds:.0f} s; {_short(run.root / 'RESULTS.md')}")
    if after < LEAST or after < before + GAIN:
        _say(f"the demo failed: expected at least {LEAST:g} % and {GAIN:g} points above the untrained encoder")
        return EXIT_FAILED
    return EXIT_DONE


def _call(program: str, *words: str) -> None:
    _say("$ " + shlex.join([program, *words]))
    beside = Path(sys.executable).with_name(program)
    found = str(beside) if beside.exists() else shutil.which(program)
    subprocess.run([found, *words] if found else [sys.executable, "-m", MODULES[program], *words], check=True)


def _short(path: Path) -> str:
    """The path as one would type it here."""
    short = os.path.relpath(path)
    return str(path) if short.startswith("..") else short


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
