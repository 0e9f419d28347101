"""Shared by all tests: options, skips for missing hardware, synthetic images, small shards, and groups of ranks.

Helper modules of this folder are imported as ``from tests.waiting import wait_until``: ``pythonpath = .`` in setup.cfg
puts the repository root on ``sys.path``, also in the workers of pytest-xdist.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hpcssl.data.shards import FORMAT, INDEX, ROW, ROWS, ShardSet
from hpcssl.signals import INTERACTIVE, STOPPING
from tests.forked import free_port, launcher_variables

ROOT = Path(__file__).resolve().parents[1]


def pytest_addoption(parser):
    parser.addoption(
        "--full", action="store_true", help="also run tests marked full: every case, of which the default runs a few"
    )
    parser.addoption(
        "--shuffle",
        metavar="SEED",
        help="run the test files, and the tests of each file, in a random order of this seed",
    )


NO_GPU = "needs a CUDA device"
NO_SLURM = "needs slurmctld, slurmd and munged"
LONG_FILES = (
    "resume/test_exact.py",
    "resume/test_recipes.py",
    "slurm/test_cluster.py",
    "equations/test_learning.py",
    "resume/test_cmsf.py",
    "resume/test_start.py",
    "slurm/test_submit.py",
    "docs/test_console_blocks.py",
    "smoke/test_init.py",
    "resume/test_numerics.py",
    "faults/test_watchdog.py",
)
"""Files that take half a minute or more, the longest first: they are started first."""
_LEFT_OUT = pytest.StashKey[int]()
"""Number of deselected tests marked ``full``. Every worker of pytest-xdist counts them: each collects all tests."""


def pytest_collection_modifyitems(config, items):
    import torch

    if not config.getoption("--full"):
        full = [item for item in items if item.get_closest_marker("full")]
        config.stash[_LEFT_OUT] = len(full)
        config.hook.pytest_deselected(items=full)
        items[:] = [item for item in items if item not in set(full)]
    if config.getoption("--shuffle"):
        _shuffle(items, config.getoption("--shuffle"))
    else:  # a long file that comes last would be waited for alone
        ranks = {name: rank for rank, name in enumerate(LONG_FILES)}
        items.sort(key=lambda item: ranks.get(item.path.relative_to(ROOT / "tests").as_posix(), len(ranks)))
    skips = []
    if not torch.cuda.is_available():
        skips.append(("gpu", NO_GPU))
    if not all(shutil.which(tool) or shutil.which(f"/usr/sbin/{tool}") for tool in ("slurmctld", "slurmd", "munged")):
        skips.append(("slurm", NO_SLURM))
    for item in items:
        for marker, reason in skips:
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


def _shuffle(items, seed):
    """Shuffle the files, and the tests within each file: fixtures of a file are still set up once.

    The order comes from a generator of its own. No global random state is read or seeded.
    """
    shuffled, files = random.Random(seed), {}
    for item in items:
        files.setdefault(item.path, []).append(item)
    order = list(files.values())
    shuffled.shuffle(order)
    for tests in order:
        shuffled.shuffle(tests)
    items[:] = [item for tests in order for item in tests]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    """Take over the count of deselected tests from a worker of pytest-xdist that has ended."""
    if "left_out" in getattr(node, "workeroutput", {}):
        node.config.stash[_LEFT_OUT] = node.workeroutput["left_out"]


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):  # in a worker of xdist
        session.config.workeroutput["left_out"] = session.config.stash.get(_LEFT_OUT, 0)


def pytest_terminal_summary(terminalreporter, config):
    """Print in at most three lines what was not run, why, and how to run it."""
    reasons = [
        report.longrepr[2].removeprefix("Skipped: ")
        for report in terminalreporter.stats.get("skipped", [])
        if isinstance(report.longrepr, tuple)
    ]
    lines = []
    gpu = reasons.count(NO_GPU)
    if gpu:
        lines.append(f"{gpu} skipped: {NO_GPU} -- run `make test` on a machine with a GPU")
    # the cluster fixture has its own reasons: one program is missing, or the right to start it
    slurm = [reason for reason in reasons if reason == NO_SLURM or "slurm" in reason]
    if slurm:
        way = "run as root" if "root" in slurm[-1] else "on Debian or Ubuntu: apt-get install slurm-wlm munge"
        lines.append(f"{len(slurm)} skipped: {slurm[-1].partition(':')[0]} -- {way}")
    others = [reason for reason in reasons if reason != NO_GPU and reason not in slurm]
    left_out = config.stash.get(_LEFT_OUT, 0)
    last = [f"{left_out} deselected: marked full -- run `make test-full`"] if left_out else []
    if others:
        why = ", ".join(sorted(set(others)))[:120]
        last.append(f"{len(others)} skipped for other reasons ({why}) -- see `pytest -rs`")
    lines += ["; ".join(last)] if last else []
    if lines:
        terminalreporter.section("not run")
        for line in lines:
            terminalreporter.line(line)


def pytest_sessionstart():
    """Let Ctrl-C raise KeyboardInterrupt: a shell starts background processes, and so all that they start, without."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Restore the blocked signals and the handlers of signals after each test and the fixtures it was first to use.

    Jobs block the stopping signals: every process that a later test starts would inherit that and ignore its signals. A
    training that is started by the command line in this process handles Ctrl-C to the end of the process.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    handlers = {number: signal.getsignal(number) for number in (*STOPPING, *INTERACTIVE, signal.SIGINT)}
    result = yield
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    for number, handler in handlers.items():
        if handler is not None and signal.getsignal(number) is not handler:
            signal.signal(number, handler)
    return result


@pytest.fixture(autouse=True)
def reset_logging():
    """Undo what a command that was called in this process has set up for logging.

    Its handlers write to a stream that pytest has closed by the time of the next test.
    """
    yield
    log = logging.getLogger("hpcssl")
    log.handlers.clear()
    log.propagate = True
    log.setLevel(logging.NOTSET)


def _picture(index: int, height: int = 60, width: int = 80) -> np.ndarray:
    """Return a smooth color image, uint8 [height, width, 3], a different one for every index."""
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    waves = [np.sin(7 * x * (1 + index % 3) + c + index) + np.cos(9 * y + 2 * c - index) for c in range(3)]
    return (127.5 + 60 * np.stack(waves, -1)).clip(0, 255).astype(np.uint8)


def _second_modality(index: int) -> np.ndarray:
    """Return a gray image, uint8 [60, 80], to go with ``_picture(index)``."""
    return _picture(index + 50)[::-1, :, 0].copy()


def _encode(image: np.ndarray | Image.Image, kind: str = "JPEG", **options) -> bytes:
    out = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(out, kind, **({"quality": 90} if kind == "JPEG" else {}) | options)
    return out.getvalue()


def _member(tar: tarfile.TarFile, name: str, body: bytes) -> tuple[int, int]:
    """Append a member to a tar and return the offsets of its header and of its bytes."""
    header = tar.fileobj.tell()
    info = tarfile.TarInfo(name)
    info.size = len(body)
    tar.addfile(info, io.BytesIO(body))
    return header, header + 512


def _write_shards(root, samples, per_shard: int = 8, classes: int = 2) -> ShardSet:
    """Write shards in the format of hpcssl/data/shards.py, with tarfile instead of hpcssl-shard.

    Args:
        root: The folder to write.
        samples: Tuples (key, encoded image, label) or (key, encoded image, label, encoded second modality).
        per_shard: Samples per shard.
        classes: Number of class names in the index.
    """
    root.mkdir(parents=True, exist_ok=True)
    rows, shards = np.zeros(len(samples), ROW), []
    for number, first in enumerate(range(0, len(samples), per_shard)):
        name = f"shard-{number:06d}.tar"
        with tarfile.open(root / name, "w", format=tarfile.USTAR_FORMAT) as tar:
            for at, (key, body, label, *second) in enumerate(samples[first : first + per_shard], first):
                suffix = "png" if body[:4] == b"\x89PNG" else "jpg"
                header, offset = _member(tar, f"{key}.{suffix}", body)
                rows[at] = (number, header, offset, len(body), label, 0, 0)
                if second:
                    _, rows[at]["offset_b"] = _member(tar, f"{key}.b.png", second[0])
                    rows[at]["size_b"] = len(second[0])
                _member(tar, f"{key}.cls", str(label).encode())
        body = (root / name).read_bytes()
        shards.append(
            {
                "name": name,
                "bytes": len(body),
                "samples": len(samples[first : first + per_shard]),
                "sha256": hashlib.sha256(body).hexdigest(),
            }
        )
    table = io.BytesIO()
    np.save(table, rows)
    (root / ROWS).write_bytes(table.getvalue())
    (root / INDEX).write_text(
        json.dumps(
            {
                "format": FORMAT,
                "shards": shards,
                "classes": [f"class {i}" for i in range(classes)],
                "samples": len(samples),
                "rows_sha256": hashlib.sha256(table.getvalue()).hexdigest(),
            }
        )
    )
    return ShardSet.open(root)


@pytest.fixture(scope="session")
def picture():
    """picture(index, height=60, width=80) -> uint8 [height, width, 3]."""
    return _picture


@pytest.fixture(scope="session")
def encode():
    """encode(array or PIL image, kind="JPEG", **options) -> bytes."""
    return _encode


@pytest.fixture(scope="session")
def make_shards():
    """make_shards(folder, [(key, bytes, label[, second bytes])], per_shard=8) -> ShardSet."""
    return _write_shards


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> ShardSet:
    """40 images of 60 x 80 pixels in 5 shards; labels are index % 2, the second modality is a gray image."""
    samples = [(f"p/{i:03d}", _encode(_picture(i)), i % 2, _encode(_second_modality(i), "PNG")) for i in range(40)]
    return _write_shards(tmp_path_factory.mktemp("shards"), samples)


@pytest.fixture(scope="session")
def start_ranks():
    """start_ranks(size, [script, arguments...], env={}, exit_code=0) -> the output of each rank.

    Runs a Python command once per rank, from the repository root, and waits for all of them. Every rank must end with
    ``exit_code``.
    """

    def start(size, command, *, env=None, timeout=1200, exit_code=0):
        port, ranks = free_port(), []
        for rank in range(size):
            variables = launcher_variables(rank, size, port)
            del variables["HPCSSL_TOKEN"]  # as under torchrun, which names no attempt
            ranks.append(
                subprocess.Popen(
                    [sys.executable, *command],
                    text=True,
                    cwd=ROOT,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    env=os.environ | variables | {"OMP_NUM_THREADS": "1"} | (env or {}),
                )
            )
        try:
            outputs = [rank.communicate(timeout=timeout)[0] for rank in ranks]
        finally:
            for rank in ranks:
                if rank.poll() is None:
                    rank.kill()
        codes = [rank.returncode for rank in ranks]
        assert codes == [exit_code] * size, f"exit codes {codes}\n" + "\n".join(outputs)
        return outputs

    return start
