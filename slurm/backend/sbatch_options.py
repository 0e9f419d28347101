"""Options of sbatch on the command line: split off, parsed and checked.

The command line is split with the tables of ``sbatch_table`` before the CLI library sees it. So ``hpcssl-submit`` takes
every option of sbatch, in any position and in every form that sbatch takes (``--opt=value``, ``--opt value``, ``-N2``,
``-N 2``). An option of a newer SLURM is passed with ``--sbatch "--name=value"``.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, field

from hpcssl.errors import ConfigError
from slurm.backend.sbatch_table import (
    ALIASES,
    LONG_NAMES,
    OPTIONAL_VALUE,
    OWN,
    OWN_WITH_VALUE,
    RESERVED,
    SBATCH,
    WITH_VALUE,
)
from slurm.log.job_log import SbatchOptions


@dataclass(frozen=True)
class SplitCommandLine:
    """A command line in two parts.

    Attributes:
        own: Arguments and options of hpcssl-submit, as words.
        sbatch: Options of sbatch by long name.
    """

    own: list[str] = field(default_factory=list)
    sbatch: SbatchOptions = field(default_factory=dict)


def split_command_line(argv: list[str]) -> SplitCommandLine:
    """Separate the options of sbatch from the arguments and options of hpcssl-submit.

    Raises:
        ConfigError: An option is unknown to both, lacks its value, or must not be set.
    """
    out, words = SplitCommandLine(), list(argv)
    while words:
        word = words.pop(0)
        if word == "--":
            out.own.extend(["--", *words])
            break
        if word.startswith("--"):
            _take_long_option(word, words, out)
        elif word.startswith("-") and len(word) > 1:
            _take_short_options(word, words, out)
        else:
            out.own.append(word)
    return out


def parse_option(text: str, option: str = "--sbatch") -> SbatchOptions:
    """Parse one option of sbatch, known or not, in the form ``--name=value`` or ``--name``.

    That is how ``--sbatch``, ``--eval-sbatch`` and cluster profiles give options.

    Args:
        text: The option.
        option: The option of ``hpcssl-submit`` whose value it is, for the message.

    Raises:
        ConfigError: The text has another form, or the option must not be set.
    """
    name, sign, value = text.strip().partition("=")
    if not re.fullmatch(r"--[a-z][a-z0-9_-]*", name):
        raise ConfigError(
            f"option {option}",
            got=repr(text),
            expected="one long option of sbatch",
            fix=f'write it as {option} "--name=value"',
        )
    return check_options({ALIASES.get(name[2:], name[2:]): value if sign else True})


def group_by_evaluation(texts: list[str]) -> dict[str, SbatchOptions]:
    """Return the options of ``--eval-sbatch`` by evaluation; those for all evaluations under an empty name.

    Args:
        texts: ``--name=value``, or ``EVALUATION:--name=value``.

    Raises:
        ConfigError: See ``parse_option``.
    """
    options: dict[str, SbatchOptions] = {}
    for text in texts:
        match = re.fullmatch(r"(?:([a-z]\w*):(?=--))?(.*)", text.strip(), re.S)
        assert match is not None  # both groups may be empty
        name, option = match.groups()
        options.setdefault(name or "", {}).update(parse_option(option, "--eval-sbatch"))
    return options


def check_options(sbatch: SbatchOptions) -> SbatchOptions:
    """Return the same options after checking their values.

    Raises:
        ConfigError: An option is reserved, or has a value with which a run could not be requeued.
    """
    for name, value in sbatch.items():
        if not str(value).isprintable():  # a line break would start a command in the batch script
            raise ConfigError(
                f"option --{name}",
                got=repr(value),
                expected="one line of printable text",
                fix="remove line breaks and control characters",
            )
        if name in RESERVED:
            reason, fix = RESERVED[name]
            raise ConfigError(
                f"option --{name}", got=_format_option(name, value), expected=f"no such option, since {reason}", fix=fix
            )
        if name == "clusters" and (not re.fullmatch(r"[^,\s]+", str(value)) or str(value).lower() == "all"):
            raise ConfigError(
                f"option --{name}",
                got=repr(value),
                expected="one cluster: a job number means another job on each of them",
                fix=f"name the cluster that the run is for, as in --{name}=NAME",
            )
        required = {"open-mode": "append", "kill-on-invalid-dep": "yes"}.get(name)
        if required and value != required:
            raise ConfigError(
                f"option --{name}",
                got=repr(value),
                expected=f"{required}, without which logs and dependent jobs do not survive a requeue",
                fix="leave it out",
            )
        if name == "signal":
            parse_signal(str(value))
        if name in ("time", "time-min"):
            parse_time(str(value))
    return sbatch


def parse_signal(text: str) -> tuple[str, int | None]:
    """Parse ``--signal``, such as ``USR2@120``.

    Returns:
        The name of the signal, and the seconds before the time limit at which it is sent (None if not given).

    Raises:
        ConfigError: The signal is not one that a run handles, or would not be sent to the job's steps.
    """
    match = re.fullmatch(r"(?:R:)?(?:SIG)?(USR1|USR2|TERM|10|12|15)?(?:@(\d+))?", text.upper())
    if not match or not text:
        raise ConfigError(
            "option --signal",
            got=repr(text),
            expected="USR1, USR2 or TERM, then @seconds, sent to the steps of the job",
            fix="write it as --signal=USR2@300, or leave it out",
        )
    name = {"10": "USR1", "12": "USR2", "15": "TERM"}.get(match[1], match[1]) or "USR2"
    return name, int(match[2]) if match[2] else None


def parse_time(text: str) -> int | None:
    """Parse a time limit in any form that sbatch takes.

    These are minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes and
    days-hours:minutes:seconds.

    Returns:
        Seconds; None for no limit.

    Raises:
        ConfigError: The text is not a time, or the time is zero.
    """
    if text.lower() in ("infinite", "unlimited", "-1"):
        return None
    days, dash, rest = text.rpartition("-")
    parts = rest.split(":")
    if not all(re.fullmatch(r"\d+", part) for part in ([days] if dash else []) + parts) or len(parts) > 3:
        raise ConfigError(
            "option --time",
            got=repr(text),
            expected="minutes, M:S, H:M:S, D-H, D-H:M, D-H:M:S or infinite",
            fix="write two hours as 120, 2:00:00 or 0-2",
        )
    numbers = [int(part) for part in parts]
    if dash:  # counted from the left: hours, minutes, seconds
        hours, minutes, seconds = numbers + [0] * (3 - len(numbers))
    elif len(numbers) == 3:
        hours, minutes, seconds = numbers
    else:
        hours, (minutes, seconds) = 0, numbers + [0] * (2 - len(numbers))
    total = int(days or 0) * 86_400 + hours * 3_600 + minutes * 60 + seconds
    if total == 0:
        raise ConfigError(
            "option --time",
            got=repr(text),
            expected="more than zero seconds",
            fix="leave it out for the default of the partition",
        )
    return total


def format_options(sbatch: SbatchOptions) -> str:
    """Return the options as they are typed on a command line."""
    return " ".join(_format_option(name, value) for name, value in sbatch.items())


def _format_option(name: str, value: str | bool) -> str:
    return f"--{name}" if value is True else f"--{name}={value}"


def _take_long_option(word: str, words: list[str], out: SplitCommandLine) -> None:
    name, sign, value = word[2:].partition("=")
    name = ALIASES.get(name, name)
    if name not in SBATCH and name not in OWN:
        raise _unknown_option(word.partition("=")[0], name)
    if name in WITH_VALUE or name in OWN_WITH_VALUE:
        _add_option(name, value if sign else _take_value(word, words), out)
    elif not sign:
        _add_option(name, True, out)
    elif name in OPTIONAL_VALUE:
        _add_option(name, value, out)
    else:
        raise ConfigError(
            f"option --{name}", got=f"the value {value!r}", expected="no value", fix=f"write --{name} alone"
        )


def _take_short_options(word: str, words: list[str], out: SplitCommandLine) -> None:
    rest = word[1:]
    while rest:
        letter, rest = rest[0], rest[1:]
        name = LONG_NAMES.get(letter)
        if name is None:
            raise _unknown_option(f"-{letter}", letter)
        if name in WITH_VALUE:
            _add_option(name, rest.removeprefix("=") or _take_value(f"-{letter}", words), out)
            return
        _add_option(name, True, out)


def _add_option(name: str, value: str | bool, out: SplitCommandLine) -> None:
    if name in OWN:
        out.own.append(_format_option(name, value))
    else:
        out.sbatch.update(check_options({name: value}))


def _take_value(word: str, words: list[str]) -> str:
    if not words:
        raise ConfigError(f"option {word}", got="no value", expected="a value after it", fix=f"write {word} VALUE")
    return words.pop(0)


def _unknown_option(word: str, name: str) -> ConfigError:
    similar = difflib.get_close_matches(name, SBATCH | OWN, n=1, cutoff=0.5)
    suggestion = f"did you mean --{similar[0]}; " if similar else ""
    return ConfigError(
        f"option {word}",
        got="an unknown option",
        expected="an option of sbatch (22.05 to 26.11) or of hpcssl-submit",
        fix=f'{suggestion}pass an option of a newer SLURM as --sbatch "{word}=VALUE"',
    )
