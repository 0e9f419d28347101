"""What the results of the job's nodes mean: versions, all-reduce, GPUs, and decoding next to what a recipe needs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcssl.errors import ConfigError
from hpcssl.run_dir import RunDir
from slurm.doctor.compute import IMAGE
from slurm.doctor.findings import BROKEN, NOTE, OK, SKIPPED, WARNING, Finding
from slurm.doctor.job import JobResult
from slurm.log import attempts

COMPARED = ("python", "torch", "hpcssl", "cuda", "nccl", "driver")
GRADIENT_GB = 0.094
"""Bytes of the gradient of ResNet-50 without its classifier (23.5 million float32), in GB."""


@dataclass(frozen=True)
class Need:
    """What a recipe needs of the nodes.

    Attributes:
        name: The recipe, or the run folder.
        batch: Images per step.
        images_per_s: Images per second that its run reached; None if it has not run.
    """

    name: str
    batch: int
    images_per_s: float | None = None


def find_need(name: str) -> Need:
    """Return what a recipe, or the run in a folder, needs.

    Args:
        name: The name or file of a recipe, or a run folder, whose journal then has the images per second.

    Raises:
        ConfigError: There is no such recipe or run.
    """
    from hpcssl.train.recipe import compose

    run = RunDir(name)
    if run.config.is_file():
        last = attempts.read_last_record(run.journal)
        rate = last.get("images_per_s")
        recipe = compose(str(run.config), run_exists=True)
        return Need(name, recipe.optim.batch, float(rate) if isinstance(rate, (int, float)) and rate > 0 else None)
    if Path(name).is_dir():
        raise ConfigError("RECIPE", got=f"{name}, a folder without a run", expected="a recipe or a run", fix="check it")
    return Need(name, compose(name).optim.batch)


def judge_versions(result: JobResult, login: dict[str, Any] | None) -> list[Finding]:
    """Judge whether all nodes have the same software, and the same as the login node.

    Args:
        result: What the job has reported.
        login: Versions on the login node; None if the job uses another interpreter.
    """
    records = {r["node"]: r for r in result.find("versions")}
    failed = {r["node"]: r["failure"] for r in result.find("compute") if r["node"] not in records}
    if failed:
        got = "; ".join(f"{node}: {failure}" for node, failure in sorted(failed.items()))
        fix = "install hpcssl where the nodes see it, or name their interpreter (python: in the cluster profile)"
        return [Finding("software on nodes", BROKEN, got, "torch and hpcssl can be imported", fix)]
    if not records:
        return [Finding("software on nodes", SKIPPED, "the job did not get that far")]
    differences = []
    for key in COMPARED:
        values = {node: _without_build(r[key]) for node, r in records.items()}
        if login is not None and key in ("python", "torch", "hpcssl"):
            values["this node"] = _without_build(login[key])
        if len(set(values.values())) > 1:
            differences.append(f"{key}: " + ", ".join(f"{node} {v or 'none'}" for node, v in sorted(values.items())))
    if differences:
        fix = "use one environment on a shared file system, or one container image, on all nodes"
        return [Finding("software on nodes", BROKEN, "; ".join(differences), "the same versions everywhere", fix)]
    first = next(iter(records.values()))
    text = ", ".join(f"{key} {first[key]}" for key in COMPARED if first[key])
    return [Finding("software on nodes", OK, text)]


def judge_all_reduce(result: JobResult) -> list[Finding]:
    """Judge the sum over all nodes: whether it is right, and its rate."""
    records = result.find("all_reduce")
    wrong = sorted({r["node"] for r in records if not r["correct"]})
    if wrong:
        fix = f"leave these nodes out (--exclude={','.join(wrong)}), and have their memory and network cards checked"
        return [Finding("all-reduce", BROKEN, f"a wrong sum on {', '.join(wrong)}", "the exact sum", fix)]
    decoded = {r["node"] for r in result.find("decode")}
    failed = {r["node"]: r["failure"] for r in result.find("compute") if r["together"] and r["node"] in decoded}
    if failed:
        got = "; ".join(f"{node}: {failure}" for node, failure in sorted(failed.items()))
        fix = "name the interface between the nodes (interface: in the profile); NCCL_DEBUG=INFO shows what NCCL tries"
        return [Finding("all-reduce", BROKEN, got, "a sum over all nodes", fix)]
    if not records:
        return [Finding("all-reduce", SKIPPED, "it needs two nodes that reach each other")]
    rate, device = min(r["gb_per_s"] for r in records), records[0]["device"]
    backend = "NCCL" if device == "cuda" else "gloo on the CPU"
    text = f"{rate:.2f} GB/s ({backend}); the gradient of ResNet-50 takes {1000 * GRADIENT_GB / rate:.0f} ms"
    return [Finding("all-reduce", OK, text)]


def judge_gpus(result: JobResult, requested: int) -> list[Finding]:
    """Judge the GPUs of the nodes.

    Args:
        result: What the job has reported.
        requested: GPUs per node that the job requested.
    """
    counts = {r["node"]: int(r["gpus"]) for r in result.find("versions")}
    short = {node: count for node, count in counts.items() if count < requested}
    if short:
        got = ", ".join(f"torch sees {count} on {node}" for node, count in sorted(short.items()))
        fix = "check the driver (`nvidia-smi` in a job), and that torch was built for its CUDA version"
        return [Finding("GPUs", BROKEN, got, f"{requested} per node", fix)]
    if not any(counts.values()):
        return [Finding("GPUs", SKIPPED, "none were requested (--gpus-per-node)")] if counts else []
    rates = [rate for r in result.find("gpu_copies") for rate in r["rates"].values()]
    text = ", ".join(f"{count} on {node}" for node, count in sorted(counts.items()))
    return [Finding("GPUs", OK, text + (f"; copies between them at {min(rates):.0f} GB/s or more" if rates else ""))]


def judge_decoding(result: JobResult, need: Need | None) -> list[Finding]:
    """Judge how fast images are decoded, next to what a recipe needs."""
    records = result.find("decode")
    if not records:
        return [Finding("decoding", SKIPPED, "the job did not get that far")]
    rate = min(r["images_per_s"] for r in records)
    cores = sum(r["cores"] for r in records)
    text = (
        f"{rate:.0f} images/s per core ({IMAGE[0]} × {IMAGE[1]} pixels), {cores} cores in all{_name_decoder(records)}"
    )
    if need is None:
        return [Finding("decoding", OK, text)]
    text += f"; a batch of {need.batch} takes at least {need.batch / rate / cores:.2f} s"
    if need.images_per_s is None:
        return [Finding("decoding", NOTE, f"{text}. The speed of {need.name} is unknown before its first run")]
    text += f"; {need.name} reached {need.images_per_s:.0f} images/s"
    if rate * cores >= need.images_per_s:
        return [Finding("decoding", OK, text)]
    fix = "request more --cpus-per-task, or store smaller images (hpcssl-shard)"
    return [Finding("decoding", WARNING, text, f"{need.images_per_s:.0f} images/s", fix)]


def _name_decoder(records: list[dict[str, Any]]) -> str:
    """Which decoder cuts crops (``machine.decoder=auto``), and why it is not the native one, as a clause."""
    faults = {r["node"]: r["native_fault"] for r in records}
    slow = "; ".join(f"{node}: {fault}" for node, fault in sorted(faults.items()) if fault)
    if not slow:
        return ", crops by the native decoder"
    if len(set(faults.values())) == 1:
        slow = next(iter(faults.values()))
    return f", crops by the plain decoder (native: {slow})"


def _without_build(version: object) -> str:
    """The version without what follows a plus sign: the name of a wheel may have it, and that of the package not."""
    return str(version).partition("+")[0]
