"""Attempts that end at a chosen file operation, all from one process that imported torch once.

``python killed_writers.py ROOT WORLD FIRST EVERY FAULT`` forks the ranks of one attempt after another. Each rank in
turn meets the fault before its k-th file operation, or in the middle of it if it is a write, for every EVERY-th k from
FIRST on. The faults:

- ``kill``: the rank kills itself.
- ``power``: the machine loses power. Whatever was not fsynced is lost too, both bytes of files and names in folders.
- ``quota``: this write and all later ones of the rank fail, after half of the bytes.

After each fault the next attempt runs to the end, and the run must then be as if it had not been disturbed. One line of
JSON per fault says what was wrong; ``why`` is empty if nothing was.
"""

import errno
import json
import mmap
import os
import shutil
import signal
import struct
import sys
from pathlib import Path

import torch

from hpcssl import files
from hpcssl.checkpoint.manager import CheckpointManager, CheckpointState, checkpoint_digest
from hpcssl.checkpoint.reader import folders, latest_valid
from hpcssl.checkpoint.shard import TensorShard
from hpcssl.distributed.world import World
from hpcssl.files import append_line, atomic_write, read_lines
from hpcssl.journal import set_up_logging
from hpcssl.json_lines import JsonLinesWriter, truncate_after
from hpcssl.run_dir import RunDir
from hpcssl.train.attempt.run_lock import RunLock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.forked import fork_rank, free_port, launcher_variables

STEPS = 4
PATH_OPERATIONS = ("open", "replace", "rename", "unlink", "remove", "rmdir", "mkdir", "ftruncate")


class FaultyFileSystem:
    """Counts the file operations of this process, and injects the fault at the k-th.

    Args:
        k: Number of the operation with the fault; 0 to count only.
        fault: See the module's docstring.
        shared: Memory shared with the parent, to which the count is written.
        slot: Offset of the count in ``shared``, in bytes.
    """

    def __init__(self, k, fault, shared, slot):
        self.k, self.fault, self.count, self.shared, self.slot = k, fault, 0, shared, slot
        self.is_over_quota = False
        self.paths = {}  # file descriptor: path
        self.unsynced_bytes = {}  # path: size that is surely on the disk
        self.unsynced_names = {}  # folder: functions that undo its changes since its last fsync
        self.original = {name: getattr(os, name) for name in (*PATH_OPERATIONS, "write", "pwrite", "fsync")}
        for name in PATH_OPERATIONS:
            setattr(os, name, self.wrap(name))
        os.write, os.pwrite, os.fsync = self.write, self.pwrite, self.fsync
        files.open = self.open

    def count_operation(self, write_half=None):
        """Count one operation and inject the fault if it is the k-th, after ``write_half`` if it is a write."""
        self.count += 1
        self.shared[self.slot : self.slot + 4] = struct.pack("i", self.count)
        if self.fault == "quota":
            if 0 < self.k <= self.count and write_half is not None:
                if not self.is_over_quota:
                    write_half()
                self.is_over_quota = True
                raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
        elif self.count == self.k:
            if write_half is not None:
                write_half()
            if self.fault == "power":
                self.lose_power()
            os.kill(os.getpid(), signal.SIGKILL)

    def wrap(self, name):
        """Return a replacement of the function ``name`` of ``os`` that counts."""
        original = self.original[name]

        def call(*args, **options):
            self.count_operation()
            undo = self.prepare_undo(name, args) if self.fault == "power" and not options.get("dir_fd") else None
            result = original(*args, **options)
            if name == "open":
                self.paths[result] = os.fspath(args[0])
            if undo:
                folder = os.path.dirname(os.fspath(args[name != "mkdir"]))
                self.unsynced_names.setdefault(folder, []).append(undo)
            return result

        return call

    def prepare_undo(self, name, args):
        """Return a function that undoes a change of a folder; None for a removal, which does no harm if it is lost."""
        if name == "mkdir":
            return lambda: shutil.rmtree(args[0], ignore_errors=True)
        if name not in ("replace", "rename"):
            return None
        source, target = map(os.fspath, args[:2])
        backup = f"{target}.backup-{self.count}"
        if os.path.isfile(target):
            os.link(target, backup)

        def undo():
            if os.path.exists(target):
                self.original["rename"](target, source)
            if os.path.exists(backup):
                self.original["rename"](backup, target)

        return undo

    def lose_power(self):
        """Lose what was not fsynced: half of the unsynced bytes of files, and all unsynced names in folders."""
        for name, original in self.original.items():
            setattr(os, name, original)
        for path, safe_size in self.unsynced_bytes.items():
            if os.path.isfile(path):
                os.truncate(path, max(safe_size, os.path.getsize(path) // 2))
        for undo_functions in self.unsynced_names.values():
            for undo in reversed(undo_functions):
                undo()

    def fsync(self, descriptor):
        self.count_operation()
        self.original["fsync"](descriptor)
        self.unsynced_bytes.pop(self.paths.get(descriptor), None)
        self.unsynced_names.pop(self.paths.get(descriptor), None)

    def write(self, descriptor, body):
        self.count_operation(lambda: self.original["write"](descriptor, body[: len(body) // 2]))
        self.unsynced_bytes.setdefault(self.paths.get(descriptor, ""), os.fstat(descriptor).st_size)
        return self.original["write"](descriptor, body)

    def pwrite(self, descriptor, body, offset):
        self.count_operation(lambda: self.original["pwrite"](descriptor, body[: len(body) // 2], offset))
        return self.original["pwrite"](descriptor, body, offset)

    def open(self, path, mode="r", **options):
        """Replace ``open`` in hpcssl/files.py; writes to the file are counted."""
        self.count_operation()
        file = open(path, mode, **options)  # noqa: SIM115 - the caller closes it
        if "w" not in mode:
            return file
        self.paths[file.fileno()] = os.fspath(path)
        original, file_system = file.write, self

        class CountedFile:
            def write(self, body):
                file_system.count_operation(lambda: (original(body[: len(body) // 2]), file.flush()))
                file_system.unsynced_bytes[os.fspath(path)] = 0
                return original(body)

            def __enter__(self):
                return self

            def __exit__(self, *error):
                return file.__exit__(*error)

            def __getattr__(self, name):
                return getattr(file, name)

        return CountedFile()


def state(step, world):
    """Return the state of a step: two replicated tensors and a sharded one."""
    generator = torch.Generator().manual_seed(step)
    tensors = {
        "net.weight": TensorShard(torch.randn(50, 4, generator=generator)),
        "net.scale": TensorShard(torch.tensor(float(step))),
    }
    bank, rows = torch.randn(8, 3, generator=generator), 8 // world.size
    first = world.rank * rows
    tensors["bank"] = TensorShard(bank[first : first + rows].clone(), first, 8)
    return CheckpointState(step, tensors, {"pointer": step}, "f" * 8, {"seed": 0}, {})


def run_attempt(run, world, on_durable):
    """Write all that an attempt writes, in its order. ``on_durable(step)`` is called after each completed save."""
    lock = RunLock(run, "job") if world.is_main else None
    world.run_on_main(lambda: lock.take(5.0))
    for path, text in ((run.config, "seed: 0\n"), (run.data, "{}")):
        if world.is_main and not path.exists():
            atomic_write(path, text)
    checkpoints = CheckpointManager(run, world, keep=2, guard=lambda: lock.check())
    saved = checkpoints.latest()
    first = saved.step if saved else 0
    if world.is_main:
        truncate_after(run.journal, first)
        append_line(run.attempts, {"event": "start", "first_step": first})
        journal = JsonLinesWriter(run.journal)
    for step in range(first + 1, STEPS + 1):
        if world.is_main:
            journal.add({"step": step})
            journal.sync()
        failure = checkpoints.save(state(step, world))
        assert failure is None, failure
        on_durable(step)
    checkpoints.save(state(STEPS, world))
    if world.is_main:
        atomic_write(run.weights_at(STEPS), "weights")
        atomic_write(run.done, "{}")
        lock.release()
    world.barrier()
    world.close()


def run_ranks(run, size, shared, target=-1, k=0, fault="kill"):
    """Run one attempt in ``size`` processes and return their exit codes.

    The first rank that fails takes the others along, as in a SLURM job. Rank ``target`` meets the fault at its k-th
    file operation. With ``k`` 0 no rank does, and all count their operations.
    """

    def work(rank):
        world = World.start("cpu", 30.0)
        if rank == target or not k:
            FaultyFileSystem(k, fault, shared, 4 + 4 * rank)

        def on_durable(step):
            if rank == 0:
                shared[:4] = struct.pack("i", step)

        run_attempt(run, world, on_durable)
        return 0

    port = free_port()
    pids = [
        fork_rank(
            None,
            launcher_variables(rank, size, port) if size > 1 else {},
            lambda _stop, rank=rank: work(rank),
        )
        for rank in range(size)
    ]
    codes = {}
    while len(codes) < size:
        pid, status = os.wait()
        codes[pid] = os.waitstatus_to_exitcode(status)
        if codes[pid]:
            for other in pids:
                if other not in codes:
                    os.kill(other, signal.SIGKILL)
    return [codes[pid] for pid in pids]


def find_problem(run, shared, digest, size):
    """Return what is wrong after a fault, or after the next attempt, which is run here; empty if nothing is."""
    (durable,) = struct.unpack("i", shared[:4])
    saved, _ = latest_valid(run)
    step = saved.step if saved else 0
    if not durable <= step <= durable + 1:
        return f"step {durable} was durable, and step {step} is the newest"
    if saved is not None:
        expected = state(step, World.single_process()).tensors["net.weight"].tensor
        if not torch.equal(saved.rows("net.weight"), expected):
            return f"step {step} has other values"
    steps = {line["step"] for line in read_lines(run.journal)}
    if not steps >= set(range(1, step + 1)):
        return f"the journal has the steps {sorted(steps)} at step {step}"
    if (codes := run_ranks(run, size, shared)) != [0] * size:
        return f"the next attempt ended with {codes}"
    if (resumed_digest := checkpoint_digest(run)) != digest:
        return f"digest {resumed_digest[:8]}, not {digest[:8]}"
    temporaries = [str(path.relative_to(run.root)) for path in run.root.rglob("*.tmp")]
    if temporaries or [step for step, _ in folders(run)] != [STEPS - 1, STEPS] or not run.done.exists():
        return f"remaining files: {temporaries or [path.name for _, path in folders(run)]}"
    steps = [line["step"] for line in read_lines(run.journal)]
    return "" if steps == list(range(1, STEPS + 1)) else f"the journal has the steps {steps}"


def main(root, size, first, every, fault):
    set_up_logging(1)  # as on ranks other than 0: only warnings are logged
    shared = mmap.mmap(-1, 4 + 4 * size)  # the newest durable step, and the number of operations of each rank
    undisturbed = RunDir(root / "undisturbed")
    assert run_ranks(undisturbed, size, shared) == [0] * size
    digest, counts = checkpoint_digest(undisturbed), struct.unpack(f"{size}i", shared[4:])
    for target in range(size):
        for k in range(first, counts[target] + 1, every):
            run = RunDir(root / f"{target}-{k}")
            shared[:4] = struct.pack("i", 0)
            codes = run_ranks(run, size, shared, target, k, fault)
            failed = codes[target] == (1 if fault == "quota" else -signal.SIGKILL)
            why = find_problem(run, shared, digest, size) if failed or not any(codes) else f"exit codes {codes}"
            print(json.dumps({"rank": target, "k": k, "failed": failed, "why": why}), flush=True)
            if not why:
                shutil.rmtree(run.root)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:5]), sys.argv[5])
