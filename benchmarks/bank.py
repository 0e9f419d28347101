"""Search in the memory bank on a CPU, compared with the usual ways: ``python -m benchmarks.bank [--rows N …]``.

The work of one MSF step on the bank: the k nearest of 256 targets among N rows of 512, and the loss of 256 predictions.

    msf           the official code: the bank cloned, two full products, topk       train_msf.py:185-201
    one product   one full product, topk, loss on the gathered rows
    chunks        ours without faiss
    ours          ours as installed
    ours bf16     ours with prefilter=bf16: fast on CPUs with matrix units, the same neighbors everywhere

Candidates take turns within each round, and a ratio is the median of the ratios of the rounds, so that a slowdown of
the machine affects all of them. Extra memory is the peak above the bank itself, in a new process per candidate.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.nn import functional as F

from hpcssl import rng
from hpcssl.distributed.world import World
from hpcssl.memory import search
from hpcssl.memory.bank import Bank
from hpcssl.memory.columns import ColumnSpec

B, D, K = 256, 512, 5
GOALS = {131072: 0.25, 1048576: 0.15}  # share of the time of msf; the goal for extra memory is 40 MiB
FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def msf(bank, rows, target, online):
    targets = rows.clone()
    target_distance = 2 - 2 * torch.einsum("bc,kc->bk", target, targets)
    online_distance = 2 - 2 * torch.einsum("bc,kc->bk", online, targets)
    near = target_distance.topk(K, dim=1, largest=False).indices
    return near, online_distance.gather(1, near).sum(dim=1).div(K).mean()


def one_product(bank, rows, target, online):
    near = (target @ rows.T).topk(K, dim=1).indices
    return near, mean_distance(online, rows[near])


def ours(bank, rows, target, online):
    neighbors = bank.nearest(target, K)
    return neighbors.slot, mean_distance(online, neighbors.rows)


def chunks(bank, rows, target, online):
    installed, search.faiss = search.faiss, None
    try:
        return ours(bank, rows, target, online)
    finally:
        search.faiss = installed


def ours_bf16(bank, rows, target, online):
    bank.prefilter = "bf16"
    try:
        return ours(bank, rows, target, online)
    finally:
        bank.prefilter = "fp32"


def mean_distance(online, near):
    return (2 - 2 * torch.einsum("bc,bkc->bk", online, near)).mean()


CANDIDATES = {"msf": msf, "one product": one_product, "chunks": chunks, "ours": ours, "ours bf16": ours_bf16}


def make_inputs(size):
    """Return a bank of random rows into which the targets were just pushed, as in MSF, and the inputs of a step."""
    bank = Bank(size, {"key": ColumnSpec(D)}, World.single_process(), key=rng.key(0, "bank"))
    target, online = (
        F.normalize(torch.randn(B, D, generator=rng.generator(rng.key(0, name))), dim=1)
        for name in ("target", "online")
    )
    bank.push(key=target)
    return bank, bank.state()[0]["key"].tensor, target, online


def compare(size, rounds):
    inputs = make_inputs(size)
    results = {name: candidate(*inputs) for name, candidate in CANDIDATES.items()}  # also warms up
    seconds = {name: [] for name in CANDIDATES}
    for _ in range(rounds):
        for name, candidate in CANDIDATES.items():
            start = time.perf_counter()
            candidate(*inputs)
            seconds[name].append(time.perf_counter() - start)
    naive_near, naive_loss = results["msf"]
    return {
        name: {
            "ms": round(1e3 * statistics.median(seconds[name]), 1),
            "of_msf": round(statistics.median(a / b for a, b in zip(seconds[name], seconds["msf"], strict=True)), 3),
            "extra_MiB": extra_memory(name, size),
            "neighbors_equal": round((results[name][0] == naive_near).double().mean().item(), 6),
            "loss_differs_by": abs(results[name][1] - naive_loss).item(),
        }
        for name in CANDIDATES
    }


def extra_memory(name, size):
    process = subprocess.run(
        [sys.executable, "-m", "benchmarks.bank", "--probe", name, "--rows", str(size)],
        check=True,
        capture_output=True,
        text=True,
    )
    return round(float(process.stdout), 1)


def probe(name, size):
    """Return the peak of resident memory above that before the call, in MiB; Linux only."""
    CANDIDATES[name](*make_inputs(search.SMALL + 1))  # allocates the buffers of the libraries, which are not counted
    inputs = make_inputs(size)
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _status("VmRSS")
    CANDIDATES[name](*inputs)
    return (_status("VmHWM") - before) / 1024


def _status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def describe_machine():
    flags = next(
        (line.split() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")), []
    )
    return {
        "torch": torch.__version__,
        "faiss": getattr(search.faiss, "__version__", None),
        "threads": torch.get_num_threads(),
        "cpu_flags": [flag for flag in FLAGS if flag in flags],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=sorted(GOALS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "bank_cpu.json")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--probe", choices=CANDIDATES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.probe:
        print(probe(options.probe, options.rows[0]))
        return
    report = {
        "what": f"{B} queries x N rows x {D}, float32, top-{K} and the loss",
        "machine": describe_machine(),
        "rounds": options.rounds,
        "rows": {},
    }
    for size in options.rows:
        report["rows"][size] = table = compare(size, options.rounds)
        print(f"{size} rows" + (f" (goal: {GOALS[size]} of msf, 40 MiB)" if size in GOALS else ""))
        for name, row in table.items():
            print(
                f"  {name:12s} {row['ms']:8.1f} ms  {row['of_msf']:6.3f} of msf  {row['extra_MiB']:7.1f} MiB  "
                f"neighbors equal {row['neighbors_equal']:.4%}"
            )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
