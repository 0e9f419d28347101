"""Fixtures of the evaluations: small shard sets, a weights file, and processes that run a function as ranks."""

import io
import json
import multiprocessing
import os
import tarfile
import traceback

import numpy as np
import pytest
import torch
from PIL import Image

from hpcssl.data import shards
from hpcssl.distributed.world import World
from hpcssl.files import sha256_of_file
from hpcssl.nets import resnet, weights
from hpcssl.nets.resnet import Arch
from tests.forked import free_port

TINY = Arch(arch="resnet_tiny", stem="small")
CLASSES = ["a", "b", "c", "d"]
ANSWER_S = 120.0
"""Seconds after which a rank without a result fails the test; no working machine needs them."""


def _striped_images(count, seed):
    """Noisy images whose class is the direction of their stripes: uint8 [count, 16, 16, 3], and labels [count]."""
    draw = np.random.default_rng(seed)
    y, x = np.mgrid[:16, :16]
    labels = draw.integers(0, 4, count)
    phase = draw.uniform(0, 3, (count, 1, 1))
    waves = np.stack([x, y, x + y, x - y])[labels] * 0.8 + phase
    noisy = 128 + 45 * np.sin(waves)[..., None] + draw.normal(0, 40, (count, 16, 16, 3))
    return noisy.clip(0, 255).astype(np.uint8), labels


def _write_shards(root, images, labels, classes=CLASSES):
    """Write one shard with its index, in the format of ``hpcssl/data/shards.py``."""
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
    index = {
        "format": shards.FORMAT,
        "classes": list(classes),
        "rows_sha256": sha256_of_file(root / shards.ROWS),
        "shards": [
            {"name": tar.name, "bytes": tar.stat().st_size, "samples": len(images), "sha256": sha256_of_file(tar)}
        ],
    }
    (root / shards.INDEX).write_text(json.dumps(index))
    return shards.ShardSet.open(root)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Two shard sets: 90 training images and 60 validation images."""
    root = tmp_path_factory.mktemp("shards")
    return _write_shards(root / "train", *_striped_images(90, 0)), _write_shards(root / "val", *_striped_images(60, 1))


@pytest.fixture(scope="session")
def write_shards():
    """``write_shards(folder, images, labels, classes=[...])`` writes a shard set and opens it."""
    return _write_shards


@pytest.fixture(scope="session")
def striped_images():
    """``striped_images(count, seed)`` returns images and their labels."""
    return _striped_images


@pytest.fixture(scope="session")
def weights_file(tmp_path_factory):
    """Weights of a tiny network with random values; ImageNet's normalization, 16 pixels."""
    backbone = resnet.build(TINY)
    resnet.initialize(backbone, 3)
    path = tmp_path_factory.mktemp("weights") / "step-00000005.safetensors"
    weights.save(
        path,
        backbone,
        TINY,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        size=16,
        fingerprint="f" * 64,
        step=5,
        method="msf",
    )
    return path


@pytest.fixture(autouse=True)
def one_thread():
    """Compute with one thread: sums have one order, and a forked process needs no thread pool of its parent."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def run_ranks():
    """``run_ranks(size, function, *arguments)`` returns what ``function(world, *arguments)`` returned on each rank."""
    return _run_ranks


def _run_ranks(size, function, *arguments):
    fork, port = multiprocessing.get_context("fork"), free_port()
    pipes, processes = [], []
    for rank in range(size):
        parent_end, child_end = fork.Pipe()
        process = fork.Process(target=_rank, args=(rank, size, port, child_end, function, arguments), daemon=True)
        process.start()
        child_end.close()
        processes.append(process)
        pipes.append(parent_end)
    try:
        results = []
        for rank, pipe in enumerate(pipes):
            assert pipe.poll(ANSWER_S), f"rank {rank} of {size} returned nothing within {ANSWER_S:g} s"
            results.append(pipe.recv())
    finally:
        for process in processes:
            process.kill()
            process.join()
    errors = [value for outcome, value in results if outcome == "failed"]
    assert not errors, errors[0]
    return [value for _, value in results]


def _rank(rank, size, port, pipe, function, arguments):
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    try:
        world = World.start("cpu", timeout_s=60)
        result = ("done", function(world, *arguments))
    except BaseException:
        result = ("failed", traceback.format_exc())
    pipe.send(result)
    pipe.recv() if pipe.poll(ANSWER_S) else None  # rank 0 holds the store that the others still use
