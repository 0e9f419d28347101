"""The command ``hpcssl-submit doctor``, with its own options among those of sbatch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from hpcssl.cli_runner import print_message
from hpcssl.errors import EXIT_DONE, EXIT_FAILED, ConfigError
from slurm.backend import sbatch_options
from slurm.backend.sbatch_options import SplitCommandLine

WITH_VALUE = ("--folder", "--wait-minutes", "--cluster")
WITHOUT_VALUE = ("--json", "--help", "-h")
DEFAULT_NODES = "2"


def split_command_line(argv: list[str]) -> SplitCommandLine:
    """Separate the options of sbatch from those of the doctor.

    Raises:
        ConfigError: An option is unknown to both, lacks its value, or must not be set.
    """
    own, rest, words = [], [], list(argv)
    while words:
        word = words.pop(0)
        name, sign, _ = word.partition("=")
        if word in WITHOUT_VALUE or name in WITH_VALUE:
            own.append(word)
            own += words[:1] if name in WITH_VALUE and not sign else []
            del words[: 1 if name in WITH_VALUE and not sign else 0]
        else:
            rest.append(word)
    parts = sbatch_options.split_command_line(rest)
    return SplitCommandLine(own + parts.own, {"nodes": DEFAULT_NODES, **parts.sbatch})


class SplitDoctorOptions(TyperCommand):
    """Takes the options of sbatch out before the CLI library parses the rest."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # noqa: D102 - see the base class
        parts = split_command_line(list(args))
        ctx.obj = parts.sbatch
        return super().parse_args(ctx, parts.own)


SETTINGS = {"help_option_names": ["--help", "-h"]}
EPILOG = "All options of sbatch are allowed as well: --nodes 2 (the default), -p gpu, --gpus-per-node 8 …"


def doctor(
    ctx: typer.Context,
    recipe: Annotated[
        str | None, typer.Argument(help="A recipe, or a run folder: how much decoding its training needs.")
    ] = None,
    cluster: Annotated[str | None, typer.Option(help="A cluster profile: its name, or a YAML file.")] = None,
    folder: Annotated[Path, typer.Option(help="Where runs are kept: every node should see this folder.")] = Path(),
    wait_minutes: Annotated[float, typer.Option(min=0.0, help="How long to wait for the start of the job.")] = 10.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> int:
    """Check this node and, in a job of about a minute, the cluster: what is broken for hpcssl, and how to fix it."""
    from slurm.backend import profiles
    from slurm.doctor import capacity, command

    if not folder.is_dir():
        raise ConfigError("option --folder", got=str(folder), expected="an existing folder", fix="create it")
    request = command.DoctorRequest(
        folder=folder.resolve(),
        sbatch=ctx.obj,
        profile=profiles.load_profile(cluster),
        profile_name=cluster,
        need=capacity.find_need(recipe) if recipe else None,
        wait_minutes=wait_minutes,
    )
    report = command.run(
        request,
        write=lambda text: print_message(text, "hpcssl-submit"),
        show=lambda finding: None if as_json else print(finding.line(), flush=True),
    )
    if as_json:
        print(json.dumps(report.to_json(), indent=1))
    elif report.profile:
        print(f"\n# a cluster profile, for ~/.config/hpcssl/clusters/NAME.yaml\n{report.profile}", end="")
    return EXIT_FAILED if report.is_broken else EXIT_DONE
