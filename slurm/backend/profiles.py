"""Cluster profiles: the settings of one site, as a YAML file.

A profile is found by path, or by name: first in the user's ``~/.config/hpcssl/clusters/NAME.yaml``, then among the
packaged examples in ``slurm/clusters``. Options on the command line replace those of the profile.
"""

from __future__ import annotations

import os
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

from hpcssl import config
from hpcssl.errors import ConfigError, suggest
from slurm.backend import sbatch_options
from slurm.log.job_log import SbatchOptions

PACKAGED = Path(__file__).parents[1] / "clusters"


@dataclass(frozen=True, kw_only=True)
class Profile:
    """The settings of one site. All of them are optional.

    Attributes:
        account: The account to charge (``--account``). None: SLURM's default.
        partition: The partition to submit to (``--partition``). None: SLURM's default.
        sbatch: Further options of sbatch by long name; ``"true"`` for one without a value.
        modules: Arguments of ``module load``, in this order.
        environment: Environment variables of the job.
        interface: Network interface between the ranks, such as ``ib0``. It becomes ``GLOO_SOCKET_IFNAME`` and
            ``NCCL_SOCKET_IFNAME``. None: those libraries choose.
        container: A command that runs its arguments in a container, such as ``apptainer exec --nv image.sif``. SLURM's
            ``scontrol`` must work inside. Empty: no container.
        python: The Python interpreter on the nodes. None: the path of the one that submits.
        host_python: The interpreter of what the batch script runs besides the tasks, where srun starts the container
            (pyxis): Python 3.11 with submitit and omegaconf, on the nodes. None: that of the tasks.
        srun: Further arguments of srun.
        setup: Shell lines that run once, on the first node, before the training. Write ``$NAME`` without braces.
    """

    account: str | None = None
    partition: str | None = None
    sbatch: dict[str, str] = field(default_factory=dict)
    modules: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    interface: str | None = None
    container: str = ""
    python: str | None = None
    host_python: str | None = None
    srun: list[str] = field(default_factory=list)
    setup: list[str] = field(default_factory=list)

    def to_sbatch_options(self) -> SbatchOptions:
        """Return the profile's options of sbatch.

        Raises:
            ConfigError: An option is misspelled, or must not be set.
        """
        options: SbatchOptions = {}
        for name, value in self.sbatch.items():
            options |= sbatch_options.parse_option(f"--{name}" if value.lower() == "true" else f"--{name}={value}")
        options |= {name: value for name in ("account", "partition") if (value := getattr(self, name))}
        return options

    def setup_lines(self) -> list[str]:
        """Return the shell lines that prepare the site's environment, with values quoted."""
        variables = dict(self.environment)
        if self.interface:
            variables |= {"GLOO_SOCKET_IFNAME": self.interface, "NCCL_SOCKET_IFNAME": self.interface}
        return (
            [f"module load {shlex.quote(module)}" for module in self.modules]
            + [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]
            + list(self.setup)
        )


def load_profile(name: str | None) -> Profile:
    """Load a profile.

    Args:
        name: The name of a profile, or the path of a YAML file; None for an empty profile.

    Raises:
        ConfigError: There is no such profile, or it is invalid.
    """
    if name is None:
        return Profile()
    path = _find_file(name)
    try:
        profile: Profile = config.load(Profile, config.read_yaml(path), where=f"cluster profile {path}")
    except ConfigError as error:
        what = error.what.replace("recipe file", "cluster profile")
        fix = error.fix.replace("hpcssl show RECIPE", "the packaged profiles in slurm/clusters")
        raise ConfigError(what, got=error.got, expected=error.expected, fix=fix) from error
    invalid = [name for name in profile.environment if not re.fullmatch(r"[A-Za-z_]\w*", name)]
    if invalid:
        raise ConfigError(
            f"cluster profile {path}, environment",
            got=repr(invalid[0]),
            expected="the name of a variable",
            fix="use letters, digits and underscores",
        )
    profile.to_sbatch_options()  # refuses misspelled options now rather than at sbatch
    return profile


def list_profiles() -> list[str]:
    """Return the names of all profiles: the user's own and the packaged ones."""
    return sorted({path.stem for folder in (_user_folder(), PACKAGED) for path in folder.glob("*.yaml")})


def _find_file(name: str) -> Path:
    if name.endswith((".yaml", ".yml")) or os.sep in name:
        path = Path(name).expanduser()
        if not path.is_file():
            raise ConfigError(
                "option --cluster", got=f"{name}, which is not a file", expected="a YAML file", fix="check the path"
            )
        return path
    for folder in (_user_folder(), PACKAGED):
        if (path := folder / f"{name}.yaml").is_file():
            return path
    raise ConfigError(
        "option --cluster",
        got=repr(name),
        expected="the name of a profile, or the path of a YAML file",
        fix=f"put your own profiles into {_user_folder()}/NAME.yaml; {suggest(name, list_profiles())}",
    )


def _user_folder() -> Path:
    base = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(base).expanduser() / "hpcssl" / "clusters"
