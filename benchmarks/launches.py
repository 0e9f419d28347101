"""What a step launches, without a GPU: ``python -m benchmarks launches [--recipes NAME …] [--ranks N …] [--out FILE]``.

Each recipe takes one step at its real size on a fake GPU (``fake_gpu.py``), as rank 0 of 1, 8 and 64. Listed are the
operations of the GPU per step, and their ratio to the same encoders with torch's norms and SGD; how often the host
waits for the GPU, and where; the bytes copied to the GPU; and the collectives with the bytes that a rank gives.

The file is the budget that ``tests/dist/test_fake_gpu.py`` keeps, and the table of collectives of the documentation.
With ``--out`` the rows of other recipes in it stay as they are.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.fake_step import Measured, measure

STORED = Path(__file__).parent / "results" / "launches.json"
LAUNCH_US = 5.0
# every method, and the options that change what a step sends or launches
RECIPES = (
    "msf_r50_ep200_128k",
    "nnclr_r50_ep1000",
    "cifar10_msf",
    "cifar10_nnclr",
    "cifar10_byol",
    "cifar10_moco_v2",
    "cifar10_simclr",
    "cifar10_simsiam",
    "cifar10_swav",
    "cifar10_nnsiam",
    "cifar10_cmsf_2q",
    "cifar10_cmsf_km",
    "cifar10_cmsf_sup",
    "cifar10_cmsf_semi",
    "cifar10_cmsf_cross",
    "cifar10_moco_v2_bsim",
    "cifar10_byol_wbsim",
    "byol_r50_ep200",
)
RANKS = (1, 8, 64)


def row_of(m: Measured) -> dict[str, Any]:
    """The figures of a step as JSON."""
    return {
        "torch": torch.__version__,
        "rows_per_gpu": m.rows,
        "operations": m.step.launches,
        "plain_operations": m.plain.launches,
        "ratio": round(m.step.launches / m.plain.launches, 3),
        "parts": dict(sorted(m.step.parts.items())),
        "ratio_without_views": round((m.step.launches - m.step.parts["views"]) / m.plain.launches, 3),
        "waits": dict(sorted(m.step.waits.items())),
        "copied_bytes": dict(sorted(m.step.copies.items())),
        "collectives": {kind: list(figures) for kind, figures in m.step.by_kind().items()},
        "plain_collectives": {kind: list(figures) for kind, figures in m.plain.by_kind().items()},
    }


def stored() -> dict[str, dict[str, Any]]:
    """The rows of the stored results: by recipe, and by number of ranks as text."""
    rows: dict[str, dict[str, Any]] = json.loads(STORED.read_text())["recipes"]
    return rows


def describe(name: str, ranks: str, row: dict[str, Any], launch_us: float) -> str:
    """The row as a line of text."""
    waits = ", ".join(f"{n} {kind}" for kind, n in row["waits"].items()) or "none"
    sent = ", ".join(f"{n} {kind} of {s / 1e6:.2f} MB" for kind, (n, s, _) in row["collectives"].items()) or "none"
    host = row["operations"] * launch_us / 1e3
    return (
        f"{name} on {ranks} GPU(s), {row['rows_per_gpu']} images each: {row['operations']} operations, "
        f"{row['ratio']:.2f} x the plain encoders, {row['ratio_without_views']:.2f} x without "
        f"the augmentations ({host:.1f} ms of launches at {launch_us:g} µs each); "
        f"waits: {waits}; collectives: {sent}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.launches", description=__doc__.splitlines()[0])
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), metavar="NAME")
    parser.add_argument("--ranks", type=int, nargs="+", default=list(RANKS))
    parser.add_argument("--launch-us", type=float, default=LAUNCH_US, help="assumed host time per operation")
    parser.add_argument("--stored", action="store_true", help="print the stored rows instead of counting")
    parser.add_argument("--out", type=Path, default=None, help="write the rows here as JSON")
    options = parser.parse_args()
    if options.stored and options.out is not None:
        parser.error("--out writes counts, and --stored makes none: leave one of them out")
    body: dict[str, Any] = {"benchmark": "launches", "recipes": {}}
    if options.out is not None and options.out.exists():
        body = json.loads(options.out.read_text())
    for name in options.recipes:
        for ranks in map(str, options.ranks):
            if options.stored:
                row = stored()[name][ranks]
            else:
                row = row_of(measure(name, int(ranks)))
                body["recipes"].setdefault(name, {})[ranks] = row
            print(describe(name, ranks, row, options.launch_us), flush=True)
            if options.out is not None:  # after each, so that a run that is stopped keeps its rows
                options.out.write_text(json.dumps(body, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
