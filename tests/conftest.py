"""What all tests share: shards made on the spot, pictures made of arithmetic, and the skips of absent hardware."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

from hpcssl.data.shards import FORMAT, INDEX, ROW, ROWS, ShardSet


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="also what is marked full: every case of what the quick "
                     "selection tries by a few")


def pytest_collection_modifyitems(config, items):
    import torch

    if not config.getoption("--full"):
        full = [item for item in items if item.get_closest_marker("full")]
        config.hook.pytest_deselected(items=full)
        items[:] = [item for item in items if item not in set(full)]
    skips = []
    if not torch.cuda.is_available():
        skips.append(("gpu", "needs a CUDA device"))
    if not all(shutil.which(tool) or shutil.which(f"/usr/sbin/{tool}") for tool in ("slurmctld", "slurmd", "munged")):
        skips.append(("slurm", "needs slurmctld, slurmd and munged"))
    for item in items:
        for marker, reason in skips:
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def own_log():
    """What a door that was called in this process set up for its log, with a stream that is closed by now, is no other
    test's."""
    yield
    log = logging.getLogger("hpcssl")
    log.handlers.clear()
    log.propagate = True
    log.setLevel(logging.NOTSET)


def _picture(index: int, height: int = 60, width: int = 80) -> np.ndarray:
    """A smooth colour picture, uint8 [height, width, 3], another one for every index."""
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    waves = [np.sin(7 * x * (1 + index % 3) + c + index) + np.cos(9 * y + 2 * c - index) for c in range(3)]
    return (127.5 + 60 * np.stack(waves, -1)).clip(0, 255).astype(np.uint8)


def _second(index: int) -> np.ndarray:
    return _picture(index + 50)[::-1, :, 0].copy()


def _encode(image: np.ndarray | Image.Image, kind: str = "JPEG", **options) -> bytes:
    out = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(out, kind, **({"quality": 90} if kind == "JPEG" else {}) | options)
    return out.getvalue()


def _member(tar: tarfile.TarFile, name: str, body: bytes) -> tuple[int, int]:
    """Append one member; (offset of its header, offset of its bytes)."""
    header = tar.fileobj.tell()
    info = tarfile.TarInfo(name)
    info.size = len(body)
    tar.addfile(info, io.BytesIO(body))
    return header, header + 512


def _write_shards(root, samples, per_shard: int = 8, classes: int = 2) -> ShardSet:
    """The format of hpcssl/data/shards.py, written with tarfile. samples: (key, bytes, label[, second bytes])."""
    root.mkdir(parents=True, exist_ok=True)
    rows, shards = np.zeros(len(samples), ROW), []
    for number, first in enumerate(range(0, len(samples), per_shard)):
        name = f"shard-{number:06d}.tar"
        with tarfile.open(root / name, "w", format=tarfile.USTAR_FORMAT) as tar:
            for at, (key, body, label, *second) in enumerate(samples[first:first + per_shard], first):
                suffix = "png" if body[:4] == b"\x89PNG" else "jpg"
                header, offset = _member(tar, f"{key}.{suffix}", body)
                rows[at] = (number, header, offset, len(body), label, 0, 0)
                if second:
                    _, rows[at]["offset_b"] = _member(tar, f"{key}.b.png", second[0])
                    rows[at]["size_b"] = len(second[0])
                _member(tar, f"{key}.cls", str(label).encode())
        body = (root / name).read_bytes()
        shards.append({"name": name, "bytes": len(body), "samples": len(samples[first:first + per_shard]),
                       "sha256": hashlib.sha256(body).hexdigest()})
    table = io.BytesIO()
    np.save(table, rows)
    (root / ROWS).write_bytes(table.getvalue())
    (root / INDEX).write_text(json.dumps({
        "format": FORMAT, "shards": shards, "classes": [f"class {i}" for i in range(classes)],
        "samples": len(samples), "rows_sha256": hashlib.sha256(table.getvalue()).hexdigest()}))
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
    """40 pictures of 60 x 80 in 5 shards, labels index % 2; as second modality a gray one."""
    samples = [(f"p/{i:03d}", _encode(_picture(i)), i % 2, _encode(_second(i), "PNG")) for i in range(40)]
    return _write_shards(tmp_path_factory.mktemp("shards"), samples)


@pytest.fixture(scope="session")
def start_ranks():
    """``start_ranks(size, [script, args…], env={})`` runs a Python script once per rank and waits for all of them."""

    def start(size, command, *, env=None, timeout=240, expect=0):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        ranks = []
        for rank in range(size):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1",
                     "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
            ranks.append(subprocess.Popen([sys.executable, *command], text=True, stdout=subprocess.PIPE,
                                          stderr=subprocess.STDOUT,
                                          env=os.environ | {k: str(v) for k, v in place.items()} | (env or {})))
        try:
            said = [rank.communicate(timeout=timeout)[0] for rank in ranks]
        finally:
            for rank in ranks:
                if rank.poll() is None:
                    rank.kill()
        codes = [rank.returncode for rank in ranks]
        assert codes == [expect] * size, f"exit codes {codes}\n" + "\n".join(said)
        return said

    return start
