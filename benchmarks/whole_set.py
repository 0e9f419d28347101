"""The part ``imagenet`` of ``benchmarks/size.py``: a set with as many images as ImageNet, from sharding to a resume.

The images are tiny, the same in every class, and lie in archives as those of ImageNet do. What is measured is what a
training does: ``hpcssl-shard imagenet``, eight ranks of a node that open the set, an epoch in random order in a
process that may hold 256 files open, and an attempt that resumes late in a long training with a large bank.

``python -m benchmarks.whole_set STAGE FOLDER`` runs one stage in a process of its own, whose imports are not counted.
"""

from __future__ import annotations

import io
import json
import os
import resource
import subprocess
import sys
import tarfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

RANKS, OPEN_FILES, BATCH, MIB = 8, 256, 4096, 2**20


@dataclass(frozen=True)
class Size:
    """How much is measured.

    Attributes:
        images: Images of the training set.
        per_shard: Images per shard.
        step: Step at which the training is resumed.
        bank: Rows of its bank.
        width: Entries per row.
    """

    images: int
    per_shard: int
    step: int
    bank: int
    width: int


FULL, QUICK = Size(1_281_167, 1000, 1_000_000, 2**20, 512), Size(5000, 50, 50_000, 2**14, 128)
CLASSES = 1000


# -- archives ---------------------------------------------------------------------------------------------------------


def write_archives(folder: Path, images: int) -> None:
    """Write a tar of class tars, a flat tar and its labels, as the archives of ImageNet; classes have equal images."""
    more, fewer = (_class_tar(images // CLASSES + n) for n in (1, 0))
    with tarfile.open(folder / "train.tar", "w") as outer:
        for number in range(CLASSES):
            _add(outer, f"n{number:08d}.tar", more if number < images % CLASSES else fewer)
    with tarfile.open(folder / "val.tar", "w") as archive:
        for number, image in enumerate(_draw_images(CLASSES)):
            _add(archive, f"val_{number}.JPEG", image)
    labels = (f"val_{number}.JPEG n{number:08d}\n" for number in range(CLASSES))
    (folder / "labels.txt").write_text("".join(labels))


def _class_tar(count: int) -> bytes:
    body = io.BytesIO()
    with tarfile.open(fileobj=body, mode="w") as archive:
        for number, image in enumerate(_draw_images(count)):
            _add(archive, f"{number}.JPEG", image)
    return body.getvalue()


def _draw_images(count: int) -> list[bytes]:
    import simplejpeg

    from hpcssl import rng

    pixels = (rng.raw(count, count * 12) % 256).astype(np.uint8).reshape(count, 2, 2, 3).repeat(8, 1).repeat(8, 2)
    return [simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality=80) for image in pixels]


def _add(archive: tarfile.TarFile, name: str, body: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(body)
    archive.addfile(member, io.BytesIO(body))


# -- stages, each in a process of its own -----------------------------------------------------------------------------


def _memory() -> dict[str, int]:
    """KiB of anonymous memory of this process, and its share of all that it maps."""
    fields = dict(line.split(":") for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    return {name: int(fields[name].split()[0]) for name in ("Anonymous", "Pss")}


def _tell(answer: dict[str, Any]) -> None:
    """Print a line at once, in one piece: ranks share the pipe."""
    os.write(1, (json.dumps(answer) + "\n").encode())


def open_on_ranks(folder: Path) -> None:
    """Open the set on all ranks of a node, as a training does, and print a line per rank."""
    from hpcssl.data.order import Order
    from hpcssl.distributed.world import World
    from hpcssl.run_dir import RunDir
    from hpcssl.train.attempt.node_index import open_on_node
    from hpcssl.train.attempt.shard_check import check_shards
    from hpcssl.train.attempt.shard_watch import ShardWatch

    def run(rank: int) -> None:
        variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "MASTER_ADDR": "127.0.0.1"}
        variables |= {"MASTER_PORT": 20_000 + os.getppid() % 9000, "HPCSSL_TOKEN": "size"}
        os.environ.update({key: str(value) for key, value in variables.items()})
        world, clock = World.start("cpu", 600), _Clock()
        before = _memory()
        shards = clock.measure("open", lambda: open_on_node(folder / "set" / "train", world))
        opened = _memory()
        own = clock.measure("compare", lambda: check_shards(RunDir(folder / "run"), shards, world, refuse=True))
        batch = min(BATCH, len(shards) // 4)
        order = Order(shards.samples_per_shard, seed=0, global_batch=batch, window="all")
        clock.measure("order", lambda: order.batch(0))
        watch = ShardWatch(shards, world, own)
        clock.measure("watch", watch.check)
        world.barrier()  # all hold what they hold
        answer = {"seconds": clock.seconds, "before": before, "opened": opened, "after": _memory()}
        _tell(answer)
        world.barrier()
        world.close()

    (folder / "run").mkdir()
    pids = []
    for rank in range(RANKS):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                run(rank)
                code = 0
            except BaseException:  # noqa: BLE001 - the process ends with code 1
                traceback.print_exc()
            finally:
                os._exit(code)
        pids.append(pid)
    codes = [os.waitpid(pid, 0)[1] for pid in pids]
    if any(codes):
        raise SystemExit("benchmarks.size: a rank of the part `imagenet` failed")


def read_epoch(folder: Path) -> None:
    """Read every image of an epoch in random order, with few open files, and print what it took."""
    from hpcssl.data.order import Order
    from hpcssl.data.reader import Reader
    from hpcssl.data.shards import ShardSet
    from hpcssl.storage import open_files

    open_files.raise_limit()
    shards = ShardSet.open(folder / "set" / "train")
    batch = min(BATCH, len(shards) // 4)
    order = Order(shards.samples_per_shard, seed=0, global_batch=batch, window="all")
    seen, most, clock = np.zeros(len(shards), np.int64), 0, _Clock()

    def read_all() -> None:
        nonlocal most
        with Reader(shards) as reader:
            for step in range(order.steps_per_epoch):
                indices = order.batch(step)
                if not all(reader.read(index).startswith(b"\xff\xd8") for index in indices.tolist()):
                    raise SystemExit("benchmarks.size: the part `imagenet` read something that is no JPEG")
                seen[indices] += 1
                most = max(most, len(os.listdir("/proc/self/fd")))

    clock.measure("epoch", read_all)
    if seen.max() != 1 or seen.sum() != batch * order.steps_per_epoch:
        raise SystemExit("benchmarks.size: an epoch of the part `imagenet` read images twice")
    files = {"shards": len(shards.shards), "limit": resource.getrlimit(resource.RLIMIT_NOFILE)[0], "most": most}
    _tell(clock.seconds | files | {"images": int(seen.sum())})


class _Clock:
    """Wall and CPU seconds of calls, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, tuple[float, float]] = {}

    def measure(self, name: str, work: Callable[..., Any], *args: Any, **options: Any) -> Any:
        wall, cpu = time.perf_counter(), time.process_time()
        value = work(*args, **options)
        self.seconds[name] = time.perf_counter() - wall, time.process_time() - cpu
        return value

    def watch(self, owner: Any, function: str, name: str) -> None:
        """Measure each call of a function that others call by this name of its module or class."""
        original = getattr(owner, function)
        setattr(owner, function, lambda *args, **options: self.measure(name, original, *args, **options))


def train(folder: Path, size: Size, *, resumed: bool) -> None:
    """Run one attempt: the first claims to be at a late step, and saves; the second resumes, up to its first step."""
    import torch.utils.tensorboard  # noqa: F401  (an import)

    from hpcssl.checkpoint.manager import CheckpointManager
    from hpcssl.journal import Journal
    from hpcssl.run_dir import RunDir
    from hpcssl.signals import StopFlag
    from hpcssl.train import builders, data, loop, main, recipe
    from hpcssl.train.train_state import TrainState

    clock, stop, run = _Clock(), StopFlag(), RunDir(folder / "late")
    load_state, launch_step = main.load_state, loop.launch_step

    def claim_late_step(training: TrainState, checkpoints: CheckpointManager) -> None:
        load_state(training, checkpoints)
        training.step = size.step

    def save_after_step(training: TrainState, *rest: Any) -> Any:
        stop.set("enough")
        return launch_step(training, *rest)

    def report(training: TrainState, *_rest: Any) -> Any:
        wall, cpu = time.perf_counter() - began, time.process_time() - cpu_began
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        answer = clock.seconds | {"all": (wall, cpu), "peak": peak, "before": before, "step": training.step}
        _tell(answer)
        os._exit(0)

    if resumed:
        clock.watch(data, "open_train_shards", "index")
        clock.watch(data, "check_shards", "shards")
        clock.watch(main, "training_labels", "labels")
        clock.watch(builders, "build_bank", "bank")
        clock.watch(CheckpointManager, "latest", "verified")
        clock.watch(TrainState, "load", "loaded")
        clock.watch(Journal, "__init__", "journal")
        loop.launch_step = report
    else:
        main.load_state, loop.launch_step = claim_late_step, save_after_step
    overrides = [
        f"data.train={folder / 'set' / 'train'}",
        "machine.devices=cpu",
        "optim.batch=64",
        f"bank.size={size.bank}",
        f"model.projector.out={size.width}",
        f"model.predictor.out={size.width}",
        f"schedule.steps={size.step + 1000}",
        "schedule.warmup_epochs=0",
        "machine.checkpoint_minutes=0",
        "evals.knn_every_epochs=0",
    ]
    composed = recipe.compose("digits_msf", overrides)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    began, cpu_began = time.perf_counter(), time.process_time()
    main.train(run, composed, stop=stop)


def write_journal(path: Path, steps: int) -> None:
    """Write the journal of a training of so many steps; every tenth line has totals, as at ``machine.log_steps=10``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    totals = {f"total_{name}_s": 12345.678 for name in ("step", "data", "save", "eval", "other")}
    with open(path, "w") as file:
        for step in range(1, steps + 1):
            line = {"step": step, "epoch": step / 312, "loss": 1.25, "lr": 0.05, "spread": 0.98765, "purity": 0.5}
            file.write(json.dumps(line | ({"images_per_s": 1234.5} | totals if step % 10 == 0 else {})) + "\n")


# -- the part ---------------------------------------------------------------------------------------------------------


def _run_stage(stage: str, folder: Path, quick: bool, open_files: int | None = None) -> list[Any]:
    """Run a stage in a fresh process, and return what it printed."""

    def limit() -> None:
        if open_files:
            resource.setrlimit(resource.RLIMIT_NOFILE, (open_files, open_files))

    command = [sys.executable, "-m", "benchmarks.whole_set", stage, str(folder), *(["--quick"] if quick else [])]
    environ = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environ, preexec_fn=limit)
    if done.returncode:
        raise SystemExit(f"benchmarks.size: the stage {stage!r} of the part `imagenet` failed")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def measure_whole_set(folder: Path, quick: bool) -> dict[str, Any]:
    """Sharding, opening, an epoch and a late resume with a set that has the number of images of ImageNet."""
    size, result = QUICK if quick else FULL, {}
    write_archives(folder, size.images)
    result |= _measure_sharding(folder, size)
    result |= _describe_ranks(_run_stage("open", folder, quick))
    (epoch,) = _run_stage("epoch", folder, quick, OPEN_FILES)
    result[f"epoch in random order, {epoch['shards']} shards, ulimit -n {epoch['limit']}"] = (
        f"{epoch['images']} images read once each in {_both(epoch['epoch'])}, at most {epoch['most']} files open"
    )
    write_journal(folder / "late" / "journal.jsonl", size.step)
    _run_stage("save", folder, quick)
    (resumed,) = _run_stage("resume", folder, quick)
    assert resumed["step"] == size.step + 1
    result |= _describe_resume(resumed, size)
    return result


def _measure_sharding(folder: Path, size: Size) -> dict[str, Any]:
    words = [str(folder / name) for name in ("train.tar", "val.tar", "set")]
    options = ["--labels", str(folder / "labels.txt"), "--samples-per-shard", str(size.per_shard)]
    before, start = os.times(), time.perf_counter()
    subprocess.run([sys.executable, "-m", "data_prep", "imagenet", *words, *options], check=True, capture_output=True)
    wall, after = time.perf_counter() - start, os.times()
    cpu = sum(after[:4]) - sum(before[:4])
    (folder / "train.tar").unlink()
    files = list((folder / "set" / "train").iterdir())
    shards = [path.stat().st_size for path in files if path.suffix == ".tar"]
    index = (folder / "set" / "train" / "index.npy").stat().st_size
    return {
        f"sharding of {size.images} images": f"{wall:.0f} s ({cpu:.0f} s of CPU, {1e6 * cpu / size.images:.0f} us per "
        f"image): {len(shards)} shards, {sum(shards) / MIB:.0f} MiB, and index.npy with {index / MIB:.1f} MiB"
    }


def _both(seconds: Sequence[float]) -> str:
    return f"{seconds[0]:.2f} s ({seconds[1]:.2f} s of CPU)"


def _describe_ranks(answers: list[dict[str, Any]]) -> dict[str, str]:
    """The slowest and the largest of the ranks, and the memory of all."""
    texts = {
        "open": "index opened, sizes looked up",
        "compare": "images of each shard compared",
        "order": "first batch of the order",
        "watch": "files looked up after an epoch",
    }
    result = {}
    for name, text in texts.items():
        wall, cpu = (max(answer["seconds"][name][n] for answer in answers) for n in (0, 1))
        result[f"{RANKS} ranks of a node: {text}"] = _both((wall, cpu))
    own = {name: max(a[name]["Anonymous"] - a["before"]["Anonymous"] for a in answers) for name in ("opened", "after")}
    node = sum(answer["after"]["Pss"] - answer["before"]["Pss"] for answer in answers)
    result[f"{RANKS} ranks of a node: memory"] = (
        f"a rank {own['opened'] / 1024:.0f} MiB of its own for the index, {own['after'] / 1024:.0f} MiB with order and "
        f"checks; {node / 1024:.0f} MiB for all, shared pages counted once"
    )
    return result


def _describe_resume(resumed: dict[str, Any], size: Size) -> dict[str, str]:
    texts = {
        "index": "index and shard sizes",
        "shards": "images of each shard compared",
        "labels": "labels",
        "journal": "journal",
        "bank": "bank: memory and first rows",
        "verified": "checkpoint found and verified",
        "loaded": "checkpoint loaded",
    }
    name = f"resume at step {size.step}, bank of {size.bank} rows of {size.width}"
    result = {f"{name}: {text}": _both(resumed[key]) for key, text in texts.items()}
    bank = [sum(resumed[key][n] for key in ("bank", "verified", "loaded")) for n in (0, 1)]
    rest = [total - part for total, part in zip(resumed["all"], bank, strict=True)]
    result[f"{name}: from the imports to the first step"] = _both(resumed["all"])
    result[f"{name}: without bank and checkpoint"] = _both(rest)
    result[f"{name}: memory"] = f"peak {resumed['peak'] / MIB:.0f} MiB, {resumed['before'] / MIB:.0f} MiB of it imports"
    return result


STAGES: dict[str, Callable[[Path, Size], None]] = {
    "open": lambda folder, _: open_on_ranks(folder),
    "epoch": lambda folder, _: read_epoch(folder),
    "save": lambda folder, size: train(folder, size, resumed=False),
    "resume": lambda folder, size: train(folder, size, resumed=True),
}

if __name__ == "__main__":
    STAGES[sys.argv[1]](Path(sys.argv[2]), QUICK if "--quick" in sys.argv else FULL)
