"""The arguments and options that commands of ``hpcssl-submit`` take, with their help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RunFolders = Annotated[list[Path] | None, typer.Argument(help="Run folders; by default those below this folder.")]
RunFolder = Annotated[Path, typer.Argument(help="The run folder.")]
Evals = Annotated[
    str,
    typer.Option(
        help="Evaluations after the training, with options after colons: "
        "knn,linear:protocol=msf,transfer:sets=dtd+pets."
    ),
]
EvalEvery = Annotated[
    int,
    typer.Option(
        min=0,
        metavar="EPOCHS",
        help="Also evaluate the weights of every EPOCHS-th epoch, in small jobs during the training (with knn if "
        "--evals is not given); 0: never.",
    ),
]
EvalSbatch = Annotated[
    list[str] | None,
    typer.Option(
        help='An option of sbatch for the evaluations only, such as "--time=30", or for one of them: '
        '"detect:--gpus-per-node=8".'
    ),
]

SpareNodes = Annotated[
    int, typer.Option(min=0, metavar="N", help="Allocate N more nodes than --nodes, to replace lost ones.")
]
RecipeAndValues = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="RECIPE [KEY=VALUE]...",
        help="Name of a packaged recipe or a .yaml file, then recipe values to change.",
    ),
]
Cluster = Annotated[str | None, typer.Option(help="A cluster profile: its name, or a YAML file.")]
Sbatch = Annotated[
    list[str] | None,
    typer.Option(help='An option that only a newer SLURM has, such as "--name=value".'),
]
Local = Annotated[bool, typer.Option("--local", help="Run on this machine, without SLURM.")]
AllowPipe = Annotated[
    bool,
    typer.Option("--allow-pipe", help="Allow data.train=pipe:COMMAND, a shell command that runs in the job."),
]
