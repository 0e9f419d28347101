"""The whole check: the login node, then one short job, then a cluster profile with what was measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from hpcssl.errors import ConfigError, SubmitError
from slurm.backend import resources
from slurm.backend.profiles import Profile
from slurm.doctor import capacity, job, login, nodes
from slurm.doctor.findings import BROKEN, NOTE, OK, SKIPPED, Finding, is_broken, to_json
from slurm.doctor.job import JobResult
from slurm.log import job_log
from slurm.log.job_log import SbatchOptions


@dataclass(frozen=True, kw_only=True)
class DoctorRequest:
    """What to check.

    Attributes:
        folder: Where runs are kept: the folder that all nodes should see.
        sbatch: Options of sbatch, with ``nodes``.
        profile: The cluster profile.
        profile_name: Its name; None without one.
        need: What a recipe needs; None if none was named.
        wait_minutes: How long to wait for the job's start.
    """

    folder: Path
    sbatch: SbatchOptions
    profile: Profile
    profile_name: str | None = None
    need: capacity.Need | None = None
    wait_minutes: float = 10.0


@dataclass
class DoctorReport:
    """What was found.

    Attributes:
        findings: The results of all checks.
        result: What the job's nodes have reported.
        profile: The cluster profile to paste, as YAML.
    """

    findings: list[Finding] = field(default_factory=list)
    result: JobResult = field(default_factory=JobResult)
    profile: str = ""

    @property
    def is_broken(self) -> bool:
        """Whether something is broken."""
        return is_broken(self.findings)

    def to_json(self) -> dict[str, Any]:
        """Return the report as a JSON object."""
        return {
            "broken": self.is_broken,
            "job": self.result.job,
            "findings": to_json(self.findings),
            "nodes": self.result.records,
            "profile": self.profile,
        }


def run(request: DoctorRequest, write: Callable[[str], None], show: Callable[[Finding], None]) -> DoctorReport:
    """Run all checks.

    Args:
        request: What to check.
        write: Called with what happens meanwhile.
        show: Called with each finding as soon as it is known.
    """
    report = DoctorReport()

    def add(findings: list[Finding]) -> bool:
        """Show and keep findings. Returns whether none of them is broken."""
        for finding in findings:
            show(finding)
        report.findings += findings
        return not is_broken(findings)

    options = request.profile.to_sbatch_options() | request.sbatch
    has_commands = add(login.check_commands())
    settings, findings = login.read_settings(job_log.get_cluster(options)) if has_commands else ({}, [])
    munge_works = add(login.check_munge(settings)) if has_commands else True
    # a controller that does not answer because of munge is not a second problem
    controller_works = add(findings) if munge_works and has_commands else bool(settings)
    can_submit = has_commands and munge_works and controller_works
    if can_submit:
        add(login.check_settings(settings))
        can_submit = add(login.check_partition(settings, options))
    add([_describe_profile(request)])
    versions = login.read_versions()
    add([Finding("software", OK, ", ".join(f"{name} {version}" for name, version in versions.items()))])
    can_submit = add(login.check_folder(request.folder)) and can_submit
    if not can_submit:
        add([Finding("job", SKIPPED, "it needs what is broken above")])
        return report
    try:
        report.result = job.run(request.folder, options, request.profile, request.wait_minutes * 60, write)
    except SubmitError as error:
        add([Finding("job", BROKEN, error.got, error.expected, error.fix)])
        return report
    own_python = request.profile.python or request.profile.container
    add(judge(report.result, request, options, None if own_python else versions))
    report.profile = render_profile(request, report.result)
    return report


def judge(
    result: JobResult, request: DoctorRequest, options: SbatchOptions, versions: dict[str, str] | None
) -> list[Finding]:
    """Judge what the nodes have reported.

    Args:
        result: What the job has reported.
        request: What was to check.
        options: All options of sbatch.
        versions: Versions on the login node; None if the job uses another interpreter.
    """
    findings = nodes.judge_start(result, resources.count_nodes(options), request.wait_minutes)
    if not result.find("start"):
        return findings
    findings += nodes.judge_folder(result) + nodes.judge_clocks(result) + nodes.judge_network(result)
    findings += nodes.judge_disks(result)
    findings += capacity.judge_versions(result, versions)
    findings += capacity.judge_gpus(result, _count_gpus(options))
    findings += capacity.judge_all_reduce(result) + capacity.judge_decoding(result, request.need)
    return findings + nodes.judge_signals(result) + nodes.judge_requeue(result)


def render_profile(request: DoctorRequest, result: JobResult) -> str:
    """Return a cluster profile with the options that the job ran with; empty if it has not reported.

    A network interface is added only if all nodes were reached by it.
    """
    if not result.find("start"):
        return ""
    given = request.profile
    sbatch = {name: "true" if v is True else str(v) for name, v in request.sbatch.items()}
    values: dict[str, Any] = {
        "account": sbatch.pop("account", given.account),
        "partition": sbatch.pop("partition", given.partition),
        "sbatch": given.sbatch | {k: v for k, v in sbatch.items() if k not in ("nodes", "time", "ntasks-per-node")},
        "modules": given.modules,
        "environment": given.environment or {"OMP_NUM_THREADS": "1"},
        "interface": given.interface or nodes.find_interface(result),
        "container": given.container,
        "python": given.python,
        "host_python": given.host_python,
        "srun": given.srun,
        "setup": given.setup,
    }
    text: str = yaml.safe_dump({k: v for k, v in values.items() if v}, sort_keys=False, allow_unicode=True, width=120)
    return text


def _describe_profile(request: DoctorRequest) -> Finding:
    if request.profile_name is None:
        return Finding("cluster profile", NOTE, "none (--cluster); one to start from is printed at the end")
    options = request.profile.to_sbatch_options()
    text = " ".join(f"--{name}" + ("" if value is True else f"={value}") for name, value in options.items())
    return Finding("cluster profile", OK, f"{request.profile_name}: {text or 'no options of sbatch'}")


def _count_gpus(options: SbatchOptions) -> int:
    try:
        return resources.count_gpus_per_node(options)
    except ConfigError:
        return 0
