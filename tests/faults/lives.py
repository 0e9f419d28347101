"""Lives of a run folder that end at a chosen file operation, all from one process that imported torch once.

``python lives.py ROOT WORLD FIRST EVERY POWER`` forks the ranks of one life after another. Each rank in turn kills
itself before its k-th file operation, or in the middle of it where it is a write, for every EVERY-th k from FIRST on.
POWER 1: the machine dies with it, and takes along whatever was not fsynced: bytes of files, and names in folders. What
a new life finds, and whether it ends as an undisturbed one does, is judged here; a line of JSON per life says what was
wrong.
"""

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
from hpcssl.files import LineFile, RunDir, append_line, atomic_write, read_lines
from hpcssl.journal import cut_back, set_up_logging
from hpcssl.train.checkpoint import Rows, State, Store, digest_of, folders, newest_valid
from hpcssl.train.lock import RunLock
from hpcssl.world import World

sys.path.append(str(Path(__file__).parents[1]))
from forked import fork_rank, free_port, place

STEPS = 4
PATHS = ("open", "replace", "rename", "unlink", "remove", "rmdir", "mkdir", "ftruncate")


class Deadly:
    """Counts the file operations of this process, and dies at the k-th."""

    def __init__(self, k, power, shared, slot):
        self.k, self.power, self.count, self.shared, self.slot = k, power, 0, shared, slot
        self.paths, self.dirty, self.undo = {}, {}, {}
        self.os = {name: getattr(os, name) for name in (*PATHS, "write", "pwrite", "fsync")}
        for name in PATHS:
            setattr(os, name, self.around(name))
        os.write, os.pwrite, os.fsync = self.write, self.pwrite, self.fsync
        files.open = self.opened

    def due(self, half=None):
        self.count += 1
        self.shared[self.slot:self.slot + 4] = struct.pack("i", self.count)
        if self.count == self.k:
            if half is not None:
                half()
            if self.power:
                self.forget()
            os.kill(os.getpid(), signal.SIGKILL)

    def around(self, name):
        honest = self.os[name]

        def call(*args, **options):
            self.due()
            undo = self.undoing(name, args) if self.power and not options.get("dir_fd") else None
            result = honest(*args, **options)
            if name == "open":
                self.paths[result] = os.fspath(args[0])
            if undo:
                self.undo.setdefault(os.path.dirname(os.fspath(args[name != "mkdir"])), []).append(undo)
            return result
        return call

    def undoing(self, name, args):
        """How to take back a change of a folder that was never fsynced."""
        if name == "mkdir":
            return lambda: shutil.rmtree(args[0], ignore_errors=True)
        if name not in ("replace", "rename"):
            return None  # a removal that the disk forgets makes nothing worse
        source, target = map(os.fspath, args[:2])
        kept = f"{target}.kept-{self.count}"
        if os.path.isfile(target):
            os.link(target, kept)

        def back():
            if os.path.exists(target):
                self.os["rename"](target, source)
            if os.path.exists(kept):
                self.os["rename"](kept, target)
        return back

    def forget(self):
        for name, honest in self.os.items():
            setattr(os, name, honest)
        for path, safe in self.dirty.items():
            if os.path.isfile(path):
                os.truncate(path, max(safe, os.path.getsize(path) // 2))
        for undone in self.undo.values():
            for back in reversed(undone):
                back()

    def fsync(self, fd):
        self.due()
        self.os["fsync"](fd)
        self.dirty.pop(self.paths.get(fd), None)
        self.undo.pop(self.paths.get(fd), None)

    def write(self, fd, body):
        self.due(lambda: self.os["write"](fd, body[:len(body) // 2]))  # these bytes reach the disk, or half of the file
        self.dirty.setdefault(self.paths.get(fd, ""), os.fstat(fd).st_size)
        return self.os["write"](fd, body)

    def pwrite(self, fd, body, at):
        self.due()
        return self.os["pwrite"](fd, body, at)

    def opened(self, path, mode="r", **options):
        self.due()
        file = open(path, mode, **options)  # noqa: SIM115 - the caller closes it
        if "w" not in mode:
            return file
        self.paths[file.fileno()] = os.fspath(path)
        honest, deadly = file.write, self

        class Counted:
            def write(self, body):
                deadly.due(lambda: (honest(body[:len(body) // 2]), file.flush()))
                deadly.dirty[os.fspath(path)] = 0
                return honest(body)

            def __enter__(self):
                return self

            def __exit__(self, *error):
                return file.__exit__(*error)

            def __getattr__(self, name):
                return getattr(file, name)
        return Counted()


def state(step, world):
    made = torch.Generator().manual_seed(step)
    tensors = {"net.weight": Rows(torch.randn(50, 4, generator=made)), "net.scale": Rows(torch.tensor(float(step)))}
    bank, part = torch.randn(8, 3, generator=made), 8 // world.size
    tensors["bank"] = Rows(bank[world.rank * part:(world.rank + 1) * part].clone(), world.rank * part, 8)
    return State(step, tensors, {"pointer": step}, "f" * 8, {"seed": 0}, {})


def life(run, world, told):
    """All that an attempt writes, in its order; ``told(step)`` when a save was reported to be durable."""
    lock = RunLock(run, "job") if world.main else None
    world.on_main(lambda: lock.take(5.0))
    for path, text in ((run.config, "seed: 0\n"), (run.data, "{}")):
        if world.main and not path.exists():
            atomic_write(path, text)
    store = Store(run, world, keep=2, guard=lambda: lock.check())
    found = store.newest()
    first = found.step if found else 0
    if world.main:
        cut_back(run.journal, first)
        append_line(run.attempts, {"event": "start", "first_step": first})
        lines = LineFile(run.journal)
    for step in range(first + 1, STEPS + 1):
        if world.main:
            lines.add({"step": step})
            lines.sync()
        failed = store.save(state(step, world))
        assert failed is None, failed
        told(step)
    store.save(state(STEPS, world))
    if world.main:
        atomic_write(run.weights_at(STEPS), "weights")
        atomic_write(run.done, "{}")
        lock.release()
    world.barrier()
    world.close()


def ranks(run, size, shared, victim=-1, k=0, power=False):
    """One life; the exit codes of its ranks. The first that dies takes the others along, as SLURM sees to it."""
    def work(rank):
        world = World.start("cpu", 30.0)
        if rank == victim or not k:
            Deadly(k, power, shared, 4 + 4 * rank)

        def told(step):
            if rank == 0:
                shared[:4] = struct.pack("i", step)
        life(run, world, told)
        return 0

    port = free_port()
    pids = [fork_rank(None, place(rank, size, port) if size > 1 else {}, lambda _stop, rank=rank: work(rank))
            for rank in range(size)]
    codes = {}
    while len(codes) < size:
        pid, status = os.wait()
        codes[pid] = os.waitstatus_to_exitcode(status)
        if codes[pid]:
            for other in pids:
                if other not in codes:
                    os.kill(other, signal.SIGKILL)
    return [codes[pid] for pid in pids]


def judge(run, shared, digest, size):
    """What is wrong after a kill, and after the life that follows it."""
    sealed, = struct.unpack("i", shared[:4])
    found, _ = newest_valid(run)
    step = found.step if found else 0
    if not sealed <= step <= sealed + 1:
        return f"step {sealed} was durable, and step {step} is found"
    if found is not None and not torch.equal(found.rows("net.weight"), state(step, World.alone()).tensors[
            "net.weight"].local):
        return f"step {step} holds other values"
    known = {line["step"] for line in read_lines(run.journal)}
    if not known >= set(range(1, step + 1)):
        return f"the journal of step {step} holds {sorted(known)}"
    if (codes := ranks(run, size, shared)) != [0] * size:
        return f"the next life ended with {codes}"
    if (ours := digest_of(run)) != digest:
        return f"digest {ours[:8]}, not {digest[:8]}"
    left = [str(p.relative_to(run.root)) for p in run.root.rglob("*.tmp")]
    if left or [s for s, _ in folders(run)] != [STEPS - 1, STEPS] or not run.done.exists():
        return f"left over: {left or [p.name for _, p in folders(run)]}"
    steps = [line["step"] for line in read_lines(run.journal)]
    return "" if steps == list(range(1, STEPS + 1)) else f"the journal holds {steps}"


def main(root, size, first, every, power):
    set_up_logging(1)  # of rank 0 too, warnings alone
    shared = mmap.mmap(-1, 4 + 4 * size)
    whole = RunDir(root / "whole")
    assert ranks(whole, size, shared) == [0] * size
    digest, counts = digest_of(whole), struct.unpack(f"{size}i", shared[4:])
    for victim in range(size):
        for k in range(first, counts[victim] + 1, every):
            run = RunDir(root / f"{victim}-{k}")
            shared[:4] = struct.pack("i", 0)
            codes = ranks(run, size, shared, victim, k, power)
            killed = codes[victim] == -signal.SIGKILL
            why = judge(run, shared, digest, size) if killed or not any(codes) else f"exit codes {codes}"
            print(json.dumps({"rank": victim, "k": k, "killed": killed, "why": why}), flush=True)
            if not why:
                shutil.rmtree(run.root)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
