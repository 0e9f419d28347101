"""Run the tests under the conditions of other machines.

Usage: ``python tests/variations.py [NAME ...]``, or ``make test-variations``.

A test that passes here can fail elsewhere because arithmetic is done in another order (other vector instructions,
another number of threads), because something takes longer, or because another test ran before it. Each variation below
imitates one such difference and runs the tests that could depend on it. One line is printed when a variation ends, and
a summary at the end. The exit code is 1 if a test failed in any of them.

pytest does not collect this file, since its name does not begin with ``test_``.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FAULTS = ["tests/faults", "tests/slurm"]
"""Tests of signals, kills, hangs and jobs, which could depend on timing."""
NUMBERS = [
    "tests/equations",
    "tests/memory",
    "tests/dist",
    "tests/evals",
    "tests/optim",
    "tests/views",
    "tests/nets",
    "tests/resume",
    "tests/data",
    "tests/faults",
]
"""Tests that compare numbers or train, which could depend on how sums are rounded."""
WAITING = [*FAULTS, "tests/data", "tests/ground", "tests/resume", "tests/dist"]
"""Tests in which threads or processes wait for each other."""
ALL = ["tests"]
BUSY_LOOP = "while True: pass"
TIMEOUT_S = 4 * 3600
"""Limit of one run of pytest in seconds."""


@dataclass(frozen=True)
class Variation:
    """One way to run tests.

    Attributes:
        tests: Files or folders for pytest.
        env: Environment variables to set.
        cores: Number of CPU cores to run on; 0 for all.
        busy: Number of busy loops that run at the same time, on the same cores.
        times: Number of runs in a row.
        shuffle: Whether the order of the tests is random.
    """

    tests: list[str]
    env: dict[str, str] = field(default_factory=dict)
    cores: int = 0
    busy: int = 0
    times: int = 1
    shuffle: bool = False


VARIATIONS: dict[str, Variation] = {
    "default": Variation(NUMBERS, {"ATEN_CPU_CAPABILITY": "default"}),  # kernels of torch without vector instructions
    "avx2": Variation(NUMBERS, {"ATEN_CPU_CAPABILITY": "avx2"}),
    "onednn-avx2": Variation(NUMBERS, {"ONEDNN_MAX_CPU_ISA": "AVX2"}),  # convolutions
    "mkl-compatible": Variation(NUMBERS, {"MKL_CBWR": "COMPATIBLE"}),  # matrix products
    "mkl-avx2": Variation(NUMBERS, {"MKL_CBWR": "AVX2"}),
    "old-cpu": Variation(NUMBERS, {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_CBWR": "AVX2"}),
    "one-core": Variation(ALL, cores=1),
    "two-cores": Variation(ALL, cores=2),
    "busy": Variation(WAITING, busy=4),
    "random-order": Variation(ALL, shuffle=True),
    "repeat": Variation(FAULTS, times=5),
}


def start_busy_loop() -> subprocess.Popen:
    """Start a process that computes until it is killed, at the latest when this process ends."""
    code = f"import ctypes; ctypes.CDLL(None).prctl(1, {int(signal.SIGKILL)})\n{BUSY_LOOP}"  # PR_SET_PDEATHSIG
    return subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.DEVNULL)


@contextlib.contextmanager
def busy_loops(count: int) -> Iterator[None]:
    """Run ``count`` busy loops inside the context."""
    loops: list[subprocess.Popen] = []
    try:
        for _ in range(count):
            loops.append(start_busy_loop())
        yield
    finally:
        for loop in loops:
            loop.kill()
        for loop in loops:
            loop.wait()


@contextlib.contextmanager
def on_cores(count: int) -> Iterator[None]:
    """Restrict this process and those that it starts to ``count`` of its cores; 0 for no restriction."""
    before = os.sched_getaffinity(0)
    if count > len(before):
        raise RuntimeError(f"needs {count} cores, but this process has {len(before)}")
    try:
        if count:
            os.sched_setaffinity(0, sorted(before)[:count])
        yield
    finally:
        os.sched_setaffinity(0, before)


@dataclass
class Outcome:
    """Result of one run of pytest.

    Attributes:
        passed: Number of tests that passed.
        failed: Number of tests that failed or could not be run.
        skipped: Number of tests that were skipped.
        seconds: Duration in seconds.
        code: Exit code of pytest.
    """

    passed: int
    failed: int
    skipped: int
    seconds: float
    code: int

    @property
    def is_success(self) -> bool:
        """Whether no test failed and pytest itself succeeded."""
        return self.code == 0 and self.failed == 0

    def to_line(self, name: str) -> str:
        """Return the line that is printed for a variation."""
        line = (
            f"{name:<16} {self.passed:>5} passed {self.failed:>4} failed {self.skipped:>4} skipped "
            f"{self.seconds:>7.0f} s"
        )
        return line if self.is_success or self.failed else f"{line}  pytest ended with exit code {self.code}"


def parse_counts(text: str) -> tuple[int, int, int]:
    """Return the numbers of passed, failed and skipped tests from the last summary line of pytest's output."""
    lines = [
        line
        for line in text.splitlines()
        if re.search(r"\d+ (passed|failed|skipped|error)", line) and re.search(r" in [\d.]+s", line)
    ]
    counts = dict.fromkeys(("passed", "failed", "skipped", "error"), 0)
    for number, word in re.findall(r"(\d+) (passed|failed|skipped|error)", lines[-1] if lines else ""):
        counts[word] = int(number)
    return counts["passed"], counts["failed"] + counts["error"], counts["skipped"]


def run_pytest(tests: list[str], env: dict[str, str], log: Path, options: list[str]) -> Outcome:
    """Run pytest once and write its output to ``log``.

    It runs in a process group of its own, so that a Ctrl-C reaches it exactly once, through this process. A second
    one would interrupt the fixtures that end the processes of the tests.
    """
    # the usual limit per test would be too short with four busy loops on one core
    command = [sys.executable, "-m", "pytest", "-o", "timeout=3600", *options, *tests]
    began = time.monotonic()
    with open(log, "w") as file:
        file.write(f"$ {shlex.join(command)}\n")
        file.flush()
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | env,
            stdout=file,
            stderr=file,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            code = process.wait(TIMEOUT_S)
        except BaseException:
            os.killpg(process.pid, signal.SIGINT)  # its group exists: it was not waited for yet
            try:
                process.wait(120)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            raise
    return Outcome(*parse_counts(log.read_text(errors="replace")), time.monotonic() - began, code)


def run_variation(name: str, logs: Path, options: list[str], tests: list[str]) -> bool:
    """Run one variation, print a line for each of its runs, and return whether everything passed."""
    variation, success = VARIATIONS[name], True
    for number in range(1, variation.times + 1):
        label = name if variation.times == 1 else f"{name} {number}/{variation.times}"
        log = logs / f"{label.replace(' ', '-').replace('/', '-of-')}.log"
        order = []
        if variation.shuffle:
            order = ["--shuffle", str(time.time_ns() % 10**6)]
            label = f"{label} {order[1]}"
        try:
            with on_cores(variation.cores), busy_loops(variation.busy):
                outcome = run_pytest(tests or variation.tests, variation.env, log, [*order, *options])
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            print(f"{label:<16} could not be run: {error}", flush=True)
            success = False
            continue
        print(outcome.to_line(label), flush=True)
        if not outcome.is_success:
            success = False
            text = log.read_text(errors="replace").splitlines()
            for line in [line for line in text if line.startswith(("FAILED", "ERROR"))][:20]:
                print(f"    {line[:200]}")
            print(f"    see {log}", flush=True)
    return success


def main() -> int:
    """Run the variations named on the command line, or all of them, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of {', '.join(VARIATIONS)}; default: all")
    parser.add_argument("--list", action="store_true", help="print the variations and their tests")
    parser.add_argument(
        "--tests", action="append", default=[], metavar="PATH", help="run this file or folder instead; may be repeated"
    )
    parser.add_argument("--full", action="store_true", help="also run the tests marked full")
    parser.add_argument(
        "--jobs", default="1", metavar="N", help="number of test files at a time, with pytest-xdist; default: 1"
    )
    args = parser.parse_args()
    if args.list:
        for name, variation in VARIATIONS.items():
            print(f"{name:<16} {' '.join(f'{k}={v}' for k, v in variation.env.items())} {' '.join(variation.tests)}")
        return 0
    unknown = [name for name in args.names if name not in VARIATIONS]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(VARIATIONS)}")
    options = (["-n", args.jobs, "--dist", "loadfile"] if args.jobs != "1" else []) + ["--full"] * args.full
    # turn SIGTERM into an exception, so that the busy loops are stopped as well
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    logs = Path(tempfile.mkdtemp(prefix="hpcssl-variations-"))
    names = args.names or list(VARIATIONS)
    began, done, failed = time.monotonic(), [], []
    try:
        for name in names:
            (done if run_variation(name, logs, options, args.tests) else failed).append(name)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
        return 130
    finally:
        not_run = [name for name in names if name not in (*done, *failed)]
        print(
            f"{len(done)} of {len(names)} variations passed in {time.monotonic() - began:.0f} s; "
            f"failed: {', '.join(failed) or 'none'}"
            + (f"; not run: {', '.join(not_run)}" if not_run else "")
            + f"; output of pytest: {logs}",
            flush=True,
        )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
