"""Cluster profiles: what one site needs and another does not, as YAML beside the command line.

Found by name in the user's ``~/.config/hpcssl/clusters/NAME.yaml``, then among the packaged examples
(``slurm/clusters``), or by path. Options on the command line win over the profile's.
"""

from __future__ import annotations

import os
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

from hpcssl import config
from hpcssl.errors import ConfigError, nearest
from slurm import options

PACKAGED = Path(__file__).parent / "clusters"


@dataclass(frozen=True, kw_only=True)
class Profile:
    """One site. All of it is optional."""

    account: str | None = None
    partition: str | None = None
    sbatch: dict[str, str] = field(default_factory=dict)
    """Further options of sbatch by long name; ``"true"`` for one without a value."""
    modules: list[str] = field(default_factory=list)
    """Arguments of ``module load``, in order."""
    environment: dict[str, str] = field(default_factory=dict)
    interface: str | None = None
    """Network interface that the ranks talk through (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME)."""
    container: str = ""
    """A command that starts its arguments in a container, such as ``apptainer exec --nv image.sif``. SLURM's
    ``scontrol`` must work inside."""
    python: str | None = None
    """The interpreter on the nodes; by default the one that submits."""
    srun: list[str] = field(default_factory=list)
    """Further arguments of srun."""
    setup: list[str] = field(default_factory=list)
    """Lines of shell that run once, on the first node, before the training. Write $NAME without braces."""

    def options(self) -> dict[str, str | bool]:
        """The profile's part of sbatch's options. Raises ``ConfigError``."""
        found: dict[str, str | bool] = {}
        for name, value in self.sbatch.items():
            found |= options.one(f"--{name}" if value.lower() == "true" else f"--{name}={value}")
        found |= {name: value for name in ("account", "partition") if (value := getattr(self, name))}
        return found

    def lines(self) -> list[str]:
        """The shell lines that make the site's environment, quoted."""
        variables = dict(self.environment)
        if self.interface:
            variables |= {"GLOO_SOCKET_IFNAME": self.interface, "NCCL_SOCKET_IFNAME": self.interface}
        return ([f"module load {shlex.quote(m)}" for m in self.modules]
                + [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]
                + list(self.setup))


def find(name: str | None) -> Profile:
    """The profile called ``name`` (a name or a path to a YAML file); an empty one for None. ``ConfigError``."""
    if name is None:
        return Profile()
    path = _path(name)
    try:
        profile = config.load(Profile, config.read_yaml(path), where=f"cluster profile {path}")
    except ConfigError as error:
        what = error.what.replace("recipe file", "cluster profile")
        mend = error.mend.replace("hpcssl show RECIPE", "the packaged profiles in slurm/clusters")
        raise ConfigError(what, got=error.got, expected=error.expected, mend=mend) from error
    bad = [k for k in profile.environment if not re.fullmatch(r"[A-Za-z_]\w*", k)]
    if bad:
        raise ConfigError(f"cluster profile {path}, environment", got=repr(bad[0]), expected="a variable's name",
                          mend="use letters, digits and underscores")
    profile.options()  # refuses unknown spellings now rather than at sbatch
    return profile


def names() -> list[str]:
    """Profiles that can be named: the user's own and the packaged ones."""
    return sorted({p.stem for folder in (_own(), PACKAGED) for p in folder.glob("*.yaml")})


def _path(name: str) -> Path:
    if name.endswith((".yaml", ".yml")) or os.sep in name:
        path = Path(name).expanduser()
        if not path.is_file():
            raise ConfigError("option --cluster", got=f"{name}, which is no file", expected="a YAML file",
                              mend="check the path")
        return path
    for folder in (_own(), PACKAGED):
        if (path := folder / f"{name}.yaml").is_file():
            return path
    raise ConfigError("option --cluster", got=repr(name), expected="a profile's name or a path to a YAML file",
                      mend=f"{nearest(name, names())}; your own ones go to {_own()}/NAME.yaml")


def _own() -> Path:
    base = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(base).expanduser() / "hpcssl" / "clusters"
