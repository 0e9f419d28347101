"""Measurements that need a GPU: ``python -m benchmarks gpu --out FOLDER [--only PIECE …] [--again]``.

    correct          neighbors, augmentations and norms of the device against float64 and the CPU, and fast kernels
                     against plain ones: first, and a difference ends the run with exit code 1
    step             MSF as shipped with a bank of 1 M rows, beside its bare encoders and the official script
    shipped          other recipes as shipped, with the images that one GPU has
    choices          MSF with plain and fast kernels, with and without the compiler
    small_batches    MSF with 32 and 64 images
    norms            norms in groups, plain and fast, beside ``nn.BatchNorm2d``
    bank             search and push beside the way of the official code, 131,072 and 1,048,576 rows
    augment          2 x 256 views from uint8 to normalized floats, with plain and fast kernels
    ema, copies      the moving average; the copy of a batch to the device
    cifar            the step of cifar10_msf
    loader           JPEG shards to the GPU, alone and with the training
    deterministic    the step with deterministic algorithms
    checkpoint       what a periodic save costs the training
    kmeans           the clustering of CMSF-KM, on fewer rows

Each piece takes less than ten minutes and is written to FOLDER/PIECE.json; a piece that is there is not measured again,
so that the same command goes on where it was cut. FOLDER/gpu.json has all of them. Times are those of calls back to
back between two events of the GPU, after a second of warm-up: the median of several runs, with the fastest and slowest.
``--device cpu --tiny`` runs every piece at small sizes, to show that the code runs; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before CUDA starts: the piece `deterministic` needs it

import torch

from benchmarks.common import versions
from benchmarks.gpu import kernels, steps
from benchmarks.gpu.bench import Bench
from hpcssl.train.main import set_up_torch
from hpcssl.train.options import MachineOptions

PIECES = {
    piece.__name__: piece
    for piece in (
        kernels.correct,
        steps.step,
        steps.shipped,
        steps.choices,
        steps.small_batches,
        kernels.norms,
        kernels.bank,
        kernels.augment,
        kernels.ema,
        kernels.copies,
        steps.cifar,
        steps.loader,
        steps.deterministic,
        steps.checkpoint,
        kernels.kmeans,
    )
}


def run_piece(name: str, b: Bench, head: dict[str, Any], path: Path) -> dict[str, Any]:
    """Measure a piece, write it, and return it."""
    start = time.perf_counter()
    body = head | {"piece": name, "result": PIECES[name](b)}
    body["seconds"] = round(time.perf_counter() - start, 1)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(body, indent=1) + "\n")
    temporary.rename(path)  # so that a piece that is there is whole
    return body


def merge(folder: Path) -> dict[str, Any]:
    """Write all pieces of a folder into one file."""
    pieces = {name: json.loads((folder / f"{name}.json").read_text()) for name in PIECES if _is_there(folder, name)}
    body = {"benchmark": "gpu", "pieces": pieces, "missing": [name for name in PIECES if name not in pieces]}
    (folder / "gpu.json").write_text(json.dumps(body, indent=1) + "\n")
    return body


def _is_there(folder: Path, name: str) -> bool:
    return (folder / f"{name}.json").exists()


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=PIECES, default=list(PIECES))
    parser.add_argument("--out", type=Path, required=True, help="the folder of the results")
    parser.add_argument("--again", action="store_true", help="measure pieces that are there once more")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--data", type=Path, help="a folder of JPEG shards for the piece loader")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print(
            "benchmarks.gpu: no CUDA device (expected one). Fix: run it on a machine with a GPU, "
            "or try it with --device cpu --tiny",
            file=sys.stderr,
        )
        return 1
    set_up_torch(MachineOptions(devices="cpu" if args.device == "cpu" else "gpu"), torch.device(args.device))
    b = Bench(args.device, args.tiny, args.data)
    head: dict[str, Any] = {"tiny": args.tiny, "versions": versions()}
    if b.on_gpu:
        head |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.only:
        if args.again or not _is_there(args.out, name):
            body = run_piece(name, b, head, args.out / f"{name}.json")
            print(name, json.dumps(body["result"]), flush=True)
            merge(args.out)
    correct = merge(args.out)["pieces"].get("correct")
    failures = correct["result"]["failures"] if correct else []
    if failures:
        print(f"benchmarks.gpu: wrong results: {'; '.join(failures)}", file=sys.stderr)
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
