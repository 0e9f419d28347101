"""The options of sbatch and of hpcssl-submit as data: name, short form, and whether a value follows.

The table of sbatch is the union of SLURM 22.05 to 26.11 (``src/common/slurm_opt.c``). Each dict maps a long name to
its short form, or to an empty string if there is none.
"""

from __future__ import annotations

WITH_VALUE = {
    "account": "A",
    "acctg-freq": "",
    "array": "a",
    "batch": "",
    "bb": "",
    "bbf": "",
    "begin": "b",
    "chdir": "D",
    "cluster-constraint": "",
    "clusters": "M",
    "comment": "",
    "constraint": "C",
    "container": "",
    "container-id": "",
    "container-type": "",
    "context": "",
    "core-spec": "S",
    "cores-per-socket": "",
    "cpu-freq": "",
    "cpus-per-gpu": "",
    "cpus-per-task": "c",
    "deadline": "",
    "delay-boot": "",
    "dependency": "d",
    "distribution": "m",
    "error": "e",
    "exclude": "x",
    "export": "",
    "export-file": "",
    "extra": "",
    "extra-node-info": "B",
    "gid": "",
    "gpu-bind": "",
    "gpu-freq": "",
    "gpus": "G",
    "gpus-per-node": "",
    "gpus-per-socket": "",
    "gpus-per-task": "",
    "gres": "",
    "gres-flags": "",
    "hint": "",
    "input": "i",
    "job-name": "J",
    "kill-on-invalid-dep": "",
    "licenses": "L",
    "mail-type": "",
    "mail-user": "",
    "mcs-label": "",
    "mem": "",
    "mem-bind": "",
    "mem-per-cpu": "",
    "mem-per-gpu": "",
    "mem-update": "",
    "mincpus": "",
    "network": "",
    "nodefile": "F",
    "nodelist": "w",
    "nodes": "N",
    "ntasks": "n",
    "ntasks-per-core": "",
    "ntasks-per-gpu": "",
    "ntasks-per-node": "",
    "ntasks-per-socket": "",
    "ntasks-per-tres": "",
    "open-mode": "",
    "output": "o",
    "partition": "p",
    "power": "",
    "prefer": "",
    "priority": "",
    "profile": "",
    "qos": "q",
    "reservation": "",
    "resources": "",
    "runtime": "",
    "segment": "",
    "signal": "",
    "sockets-per-node": "",
    "switches": "",
    "tasks-per-node": "",
    "thread-spec": "",
    "threads-per-core": "",
    "time": "t",
    "time-min": "",
    "tmp": "",
    "tres-bind": "",
    "tres-per-task": "",
    "uid": "",
    "wait-all-nodes": "",
    "wckey": "",
    "wrap": "",
}
OPTIONAL_VALUE = {  # a value only directly after "="
    "exclusive": "",
    "get-user-env": "",
    "nice": "",
    "no-kill": "k",
    "oom-kill-step": "",
    "propagate": "",
    "requeue": "",
    "resv-ports": "",
}
WITHOUT_VALUE = {
    "consolidate-segments": "",
    "contiguous": "",
    "external": "",
    "hold": "H",
    "ignore-pbs": "",
    "no-requeue": "",
    "overcommit": "O",
    "oversubscribe": "s",
    "quiet": "Q",
    "reboot": "",
    "spread-job": "",
    "spread-segments": "",
    "stepmgr": "",
    "test-only": "",
    "usage": "",
    "use-min-nodes": "",
    "verbose": "v",
    "version": "V",
}
SBATCH = WITH_VALUE | OPTIONAL_VALUE | WITHOUT_VALUE
"""All options of sbatch."""

OWN_WITH_VALUE = dict.fromkeys(
    (
        *("run", "from", "evals", "eval-every", "eval-sbatch", "cluster", "sbatch", "spare-nodes"),
        *("out", "parallel", "seeds", "step-seconds"),
        *("sampler", "sampler-seed", "trials", "objective"),
    ),
    "",
)
OWN_WITHOUT_VALUE = {"local": "", "wait": "W", "dry-run": "", "parsable": "", "allow-pipe": "", "help": "h"}
OWN_WITHOUT_VALUE |= {"prune": ""}
OWN = OWN_WITH_VALUE | OWN_WITHOUT_VALUE
"""The options of ``hpcssl-submit submit``, ``sweep`` and ``table``."""

ALIASES = {"tasks-per-node": "ntasks-per-node"}
"""Second names of options of sbatch."""

LONG_NAMES = {short: name for name, short in (SBATCH | OWN).items() if short}
"""Long names by short form."""

RESERVED = {
    "output": ("the log of each rank is in RUN/logs", "leave it out, and read logs with `hpcssl-submit logs RUN`"),
    "error": ("the log of each rank is in RUN/logs", "leave it out, and read logs with `hpcssl-submit logs RUN`"),
    "array": ("only one job may write a run folder", "submit many runs with `hpcssl-submit sweep`"),
    "wrap": (
        "the job runs the training itself",
        "leave it out; `setup` lines of a cluster profile run before the training",
    ),
    "no-requeue": ("a preempted run continues by being requeued", "leave it out"),
    "test-only": ("it would submit nothing", "use --dry-run"),
    "usage": ("it would print the usage of sbatch", "use --help"),
    "version": ("it would print the version of sbatch", "use `hpcssl-submit --version` alone, or `sbatch --version`"),
    "quiet": ("only the job ids are printed anyway", "use --parsable for the bare id"),
}
"""Options of sbatch that hpcssl sets itself, or that would submit nothing: the reason, and what to do instead."""
