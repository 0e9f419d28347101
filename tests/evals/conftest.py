"""Fixtures of the evaluations: a tiny shard folder, weights, and ranks started by fork."""

import io
import json
import multiprocessing
import os
import socket
import tarfile
import traceback

import numpy as np
import pytest
import torch
from PIL import Image

from hpcssl.data import shards
from hpcssl.files import digest
from hpcssl.nets import resnet, weights
from hpcssl.nets.resnet import Arch
from hpcssl.world import World

TINY = Arch(arch="resnet_tiny", stem="small")
CLASSES = ["a", "b", "c", "d"]


def pictures(count, seed):
    """uint8 [count, 16, 16, 3] and labels: a class is a direction of stripes, under noise."""
    draw = np.random.default_rng(seed)
    y, x = np.mgrid[:16, :16]
    labels = draw.integers(0, 4, count)
    phase = draw.uniform(0, 3, (count, 1, 1))
    waves = np.stack([x, y, x + y, x - y])[labels] * 0.8 + phase
    noisy = 128 + 45 * np.sin(waves)[..., None] + draw.normal(0, 40, (count, 16, 16, 3))
    return noisy.clip(0, 255).astype(np.uint8), labels


def write_shards(root, images, labels, classes=CLASSES):
    """One shard with an index, after the contract of ``hpcssl/data/shards.py``."""
    root.mkdir(parents=True)
    rows = np.zeros(len(images), shards.ROW)
    with tarfile.open(root / "shard-000000.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            body = io.BytesIO()
            Image.fromarray(image).save(body, "PNG")
            for name, content in ((f"{i:05d}.png", body.getvalue()), (f"{i:05d}.cls", str(label).encode())):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                if name.endswith("png"):
                    rows[i]["header"], rows[i]["size"] = tar.offset, len(content)
                    rows[i]["offset"], rows[i]["label"] = tar.offset + 512, label
                tar.addfile(member, io.BytesIO(content))
    np.save(root / shards.ROWS, rows)
    tar = root / "shard-000000.tar"
    (root / shards.INDEX).write_text(json.dumps({
        "format": shards.FORMAT, "classes": list(classes), "rows_sha256": digest(root / shards.ROWS),
        "shards": [{"name": tar.name, "bytes": tar.stat().st_size, "samples": len(images), "sha256": digest(tar)}]}))
    return shards.ShardSet.open(root)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """(train of 90 images, val of 60) as shard sets."""
    root = tmp_path_factory.mktemp("shards")
    return write_shards(root / "train", *pictures(90, 0)), write_shards(root / "val", *pictures(60, 1))


@pytest.fixture(scope="session")
def shards_of():
    return write_shards


@pytest.fixture(scope="session")
def pictures_of():
    return pictures


@pytest.fixture(scope="session")
def weights_file(tmp_path_factory):
    """Weights of a tiny network with random values; MSF's normalisation, 16 pixels."""
    backbone = resnet.build(TINY)
    resnet.initialise(backbone, 3)
    path = tmp_path_factory.mktemp("weights") / "step-00000005.safetensors"
    weights.save(path, backbone, TINY, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), size=16,
                 fingerprint="f" * 64, step=5, method="msf")
    return path


@pytest.fixture(autouse=True)
def one_thread():
    """Sums in one order; and a process that is forked holds no pool of threads that the child would miss."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def ranks(monkeypatch):
    """``ranks(size, function, *arguments)`` -> what function(world, *arguments) returned on each rank."""
    return _ranks


def _ranks(size, function, *arguments):
    fork = multiprocessing.get_context("fork")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pipes, tasks = [], []
    for rank in range(size):
        ours, theirs = fork.Pipe()
        tasks.append(fork.Process(target=_rank, args=(rank, size, port, theirs, function, arguments), daemon=True))
        tasks[-1].start()
        theirs.close()
        pipes.append(ours)
    try:
        answers = []
        for rank, pipe in enumerate(pipes):
            assert pipe.poll(120), f"rank {rank} of {size} does not answer"
            answers.append(pipe.recv())
    finally:
        for task in tasks:
            task.kill()
            task.join()
    failed = [text for kind, text in answers if kind == "failed"]
    assert not failed, failed[0]
    return [value for _, value in answers]


def _rank(rank, size, port, pipe, function, arguments):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        world = World.start("cpu", timeout_s=60)
        answer = ("done", function(world, *arguments))
    except BaseException:
        answer = ("failed", traceback.format_exc())
    pipe.send(answer)
    pipe.recv() if pipe.poll(100) else None  # rank 0 holds the store that the others still use
