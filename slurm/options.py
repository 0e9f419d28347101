"""sbatch's options, as data: what each is called, its short form, and whether it takes a value.

The command line is split by this table before the CLI library sees it, so that any option of sbatch is taken, in
any position and in every spelling that sbatch takes (``--opt=value``, ``--opt value``, ``-N2``, ``-N 2``). The
table is the union of SLURM 22.05 to 26.11 (``src/common/slurm_opt.c``); what a still newer one knows goes through
``--sbatch "--any=thing"``.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, field

from hpcssl.errors import ConfigError

# name -> short form ("" where there is none)
WITH_VALUE = {
    "account": "A", "acctg-freq": "", "array": "a", "batch": "", "bb": "", "bbf": "", "begin": "b", "chdir": "D",
    "cluster-constraint": "", "clusters": "M", "comment": "", "constraint": "C", "container": "",
    "container-id": "", "container-type": "", "context": "", "core-spec": "S", "cores-per-socket": "",
    "cpu-freq": "", "cpus-per-gpu": "", "cpus-per-task": "c", "deadline": "", "delay-boot": "", "dependency": "d",
    "distribution": "m", "error": "e", "exclude": "x", "export": "", "export-file": "", "extra": "",
    "extra-node-info": "B", "gid": "", "gpu-bind": "", "gpu-freq": "", "gpus": "G", "gpus-per-node": "",
    "gpus-per-socket": "", "gpus-per-task": "", "gres": "", "gres-flags": "", "hint": "", "input": "i",
    "job-name": "J", "kill-on-invalid-dep": "", "licenses": "L", "mail-type": "", "mail-user": "",
    "mcs-label": "", "mem": "", "mem-bind": "", "mem-per-cpu": "", "mem-per-gpu": "", "mem-update": "",
    "mincpus": "", "network": "", "nodefile": "F", "nodelist": "w", "nodes": "N", "ntasks": "n",
    "ntasks-per-core": "", "ntasks-per-gpu": "", "ntasks-per-node": "", "ntasks-per-socket": "",
    "ntasks-per-tres": "", "open-mode": "", "output": "o", "partition": "p", "power": "", "prefer": "",
    "priority": "", "profile": "", "qos": "q", "reservation": "", "resources": "", "runtime": "", "segment": "",
    "signal": "", "sockets-per-node": "", "switches": "", "tasks-per-node": "", "thread-spec": "",
    "threads-per-core": "", "time": "t", "time-min": "", "tmp": "", "tres-bind": "", "tres-per-task": "",
    "uid": "", "wait-all-nodes": "", "wckey": "", "wrap": "",
}
MAYBE_VALUE = {  # a value only after "="
    "exclusive": "", "get-user-env": "", "nice": "", "no-kill": "k", "oom-kill-step": "", "propagate": "",
    "requeue": "", "resv-ports": "",
}
WITHOUT_VALUE = {
    "consolidate-segments": "", "contiguous": "", "external": "", "hold": "H", "ignore-pbs": "", "no-requeue": "",
    "overcommit": "O", "oversubscribe": "s", "quiet": "Q", "reboot": "", "spread-job": "", "spread-segments": "",
    "stepmgr": "", "test-only": "", "usage": "", "use-min-nodes": "", "verbose": "v",
    "version": "V",
}
SBATCH = WITH_VALUE | MAYBE_VALUE | WITHOUT_VALUE

OURS_WITH_VALUE = {"run": "", "evals": "", "eval-every": "", "eval-sbatch": "", "cluster": "", "sbatch": ""}
OURS_WITHOUT_VALUE = {"local": "", "wait": "W", "dry-run": "", "parsable": "", "allow-pipe": "", "help": "h"}
OURS = OURS_WITH_VALUE | OURS_WITHOUT_VALUE

_LONG_OF_SHORT = {short: name for name, short in (SBATCH | OURS).items() if short}
_SAME = {"tasks-per-node": "ntasks-per-node"}

OWNED = {  # options of sbatch that a run cannot leave to its user: why, and what to do instead
    "output": ("every rank's log lies in RUN/logs", "leave it out, and read logs by `hpcssl-submit logs RUN`"),
    "error": ("every rank's log lies in RUN/logs", "leave it out, and read logs by `hpcssl-submit logs RUN`"),
    "array": ("a run folder has one writer", "submit once per run folder, in a shell loop"),
    "wrap": ("the job's command is the training itself", "leave it out; `setup` lines of a cluster profile run "
             "before the training"),
    "no-requeue": ("a preempted run goes on by being requeued", "leave it out"),
    "test-only": ("nothing would be submitted", "use --dry-run"),
    "usage": ("this is not sbatch", "use --help"),
    "version": ("this is not sbatch", "use `pip show hpcssl`, or `sbatch --version`"),
    "quiet": ("the job's id is all that is printed", "use --parsable for the bare id"),
}


@dataclass(frozen=True)
class Split:
    """A command line in two parts: what is ours (options and positions), and sbatch's options by long name."""

    ours: list[str] = field(default_factory=list)
    sbatch: dict[str, str | bool] = field(default_factory=dict)


def split(argv: list[str]) -> Split:
    """Part our options and positions from sbatch's. Raises ``ConfigError`` for an option that neither knows."""
    out, words = Split(), list(argv)
    while words:
        word = words.pop(0)
        if word == "--":
            out.ours.extend(["--", *words])
            break
        if word.startswith("--"):
            _take_long(word, words, out)
        elif word.startswith("-") and len(word) > 1:
            _take_short(word, words, out)
        else:
            out.ours.append(word)
    return out


def one(text: str) -> dict[str, str | bool]:
    """One option of sbatch, known or not, as ``--sbatch`` and profiles spell it: ``--name=value`` or ``--name``."""
    name, sign, value = text.strip().partition("=")
    if not re.fullmatch(r"--[a-z][a-z0-9_-]*", name):
        raise ConfigError("option --sbatch", got=repr(text), expected="one long option of sbatch",
                          mend='write it as --sbatch "--name=value"')
    return checked({_SAME.get(name[2:], name[2:]): value if sign else True})


def checked(sbatch: dict[str, str | bool]) -> dict[str, str | bool]:
    """The same options. Raises ``ConfigError`` for one that a run owns and that cannot be merged."""
    for name, value in sbatch.items():
        if not str(value).isprintable():  # a line break would start a command in the batch script
            raise ConfigError(f"option --{name}", got=repr(value), expected="one line of printable text",
                              mend="leave out line breaks and control characters")
        if name in OWNED:
            why, mend = OWNED[name]
            raise ConfigError(f"option --{name}", got=_spelled(name, value), expected=f"none, since {why}", mend=mend)
        wanted = {"open-mode": "append", "kill-on-invalid-dep": "yes"}.get(name)
        if wanted and value != wanted:
            raise ConfigError(f"option --{name}", got=repr(value), mend="leave it out",
                              expected=f"{wanted}, or logs and chained jobs would not outlive a requeue")
        if name == "signal":
            signal_of(str(value))
        if name in ("time", "time-min"):
            seconds(str(value))
    return sbatch


def signal_of(text: str) -> tuple[str, int | None]:
    """``USR2@120`` as its name and its seconds before the limit. Raises ``ConfigError`` for what a run ignores."""
    found = re.fullmatch(r"(?:R:)?(?:SIG)?(USR1|USR2|TERM|10|12|15)?(?:@(\d+))?", text.upper())
    if not found or not text:
        raise ConfigError("option --signal", got=repr(text), expected="USR1, USR2 or TERM, then @seconds, sent to "
                          "the job's steps", mend="write it as --signal=USR2@300, or leave it out")
    name = {"10": "USR1", "12": "USR2", "15": "TERM"}.get(found[1], found[1]) or "USR2"
    return name, int(found[2]) if found[2] else None


def seconds(text: str) -> int | None:
    """A time limit in seconds, in any of sbatch's forms; None for no limit. Raises ``ConfigError``.

    minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes, days-hours:minutes:seconds.
    """
    if text.lower() in ("infinite", "unlimited", "-1"):
        return None
    days, dash, rest = text.rpartition("-")
    parts = rest.split(":")
    if not all(re.fullmatch(r"\d+", p) for p in ([days] if dash else []) + parts) or len(parts) > 3:
        raise ConfigError("option --time", got=repr(text), expected="minutes, M:S, H:M:S, D-H, D-H:M, D-H:M:S or "
                          "infinite", mend="write two hours as 120, 2:00:00 or 0-2")
    numbers = [int(p) for p in parts]
    if dash:  # counted from the left: hours, minutes, seconds
        hours, minutes, secs = numbers + [0] * (3 - len(numbers))
    elif len(numbers) == 3:
        hours, minutes, secs = numbers
    else:
        hours, (minutes, secs) = 0, numbers + [0] * (2 - len(numbers))
    total = int(days or 0) * 86_400 + hours * 3_600 + minutes * 60 + secs
    if total == 0:
        raise ConfigError("option --time", got=repr(text), expected="more than no time",
                          mend="leave it out for the partition's own limit")
    return total


def spelled(sbatch: dict[str, str | bool]) -> str:
    """The options as a person would type them."""
    return " ".join(_spelled(name, value) for name, value in sbatch.items())


def _spelled(name: str, value: str | bool) -> str:
    return f"--{name}" if value is True else f"--{name}={value}"


def _take_long(word: str, words: list[str], out: Split) -> None:
    name, sign, value = word[2:].partition("=")
    name = _SAME.get(name, name)
    if name not in SBATCH and name not in OURS:
        raise _unknown(word.partition("=")[0], name)
    if name in WITH_VALUE or name in OURS_WITH_VALUE:
        value = value if sign else _next(word, words)
    elif sign and name not in MAYBE_VALUE:
        raise ConfigError(f"option --{name}", got=f"the value {value!r}", expected="no value",
                          mend=f"write --{name} alone")
    _put(name, value if sign or name in WITH_VALUE or name in OURS_WITH_VALUE else True, out)


def _take_short(word: str, words: list[str], out: Split) -> None:
    rest = word[1:]
    while rest:
        letter, rest = rest[0], rest[1:]
        name = _LONG_OF_SHORT.get(letter)
        if name is None:
            raise _unknown(f"-{letter}", letter)
        if name in WITH_VALUE:
            value, rest = (rest.removeprefix("=") or _next(f"-{letter}", words)), ""
            _put(name, value, out)
        else:
            _put(name, True, out)


def _put(name: str, value: str | bool, out: Split) -> None:
    if name in OURS:
        out.ours.append(_spelled(name, value))
    else:
        out.sbatch.update(checked({name: value}))


def _next(word: str, words: list[str]) -> str:
    if not words:
        raise ConfigError(f"option {word}", got="no value", expected="a value after it", mend=f"write {word} VALUE")
    return words.pop(0)


def _unknown(word: str, name: str) -> ConfigError:
    close = difflib.get_close_matches(name, SBATCH | OURS, n=1, cutoff=0.5)
    return ConfigError(f"option {word}", got="an option that neither sbatch (22.05 to 26.11) nor hpcssl-submit knows",
                       expected="one of theirs",
                       mend=(f"did you mean --{close[0]}; " if close else "")
                       + f'what a newer SLURM knows goes through --sbatch "{word}=VALUE"')
