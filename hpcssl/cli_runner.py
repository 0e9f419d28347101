"""Shared by the three command lines: errors as one line, exit codes, ``--version``, and output that suits a pipe."""

from __future__ import annotations

import atexit
import contextlib
import importlib
import importlib.util
import os
import sys
import threading
import traceback
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, NoReturn

import hpcssl
from hpcssl.errors import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_STOPPED,
    EXIT_USAGE,
    ConfigError,
    HpcsslError,
    describe_error,
)

if TYPE_CHECKING:
    import typer

EPILOG = "Also: --version prints the version, and --debug shows the traceback of an error."
RETIRED_OPTIONS: dict[str, str] = {
    "hpcssl-shard --second": "--second-modality",
    "hpcssl-shard --under": "--subdir",
    "hpcssl --html": "hpcssl report RUN --to FILE",
}
"""Former options, as ``program --option``, and the options that replace them. They are refused with the new name."""


def run(app: typer.Typer, argv: list[str] | None, program: str) -> int:
    """Run a Typer app.

    Errors are printed as one line; ``--debug`` adds the traceback.

    Args:
        app: The command line.
        argv: Arguments without the program's name; None for those of this process.
        program: Name of the program, for messages.

    Returns:
        The exit code: 0 done, 1 failed, 2 wrong usage, 75 stopped.
    """
    import typer  # processes of a job never need it

    _open_streams()
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    argv = [a for a in argv if a != "--debug"]
    if argv[:1] == ["--version"]:
        sys.stdout.write(f"{program} {hpcssl.__version__}\n")
        return EXIT_DONE
    command = typer.main.get_command(app)
    try:
        if "--run=" in argv or ("--run", "") in pairwise(argv):  # an empty path would mean the current folder
            raise ConfigError("--run", got="an empty value", expected="a folder", fix="set the shell variable")
        code = command.main(args=argv, prog_name=program, standalone_mode=False)
        if code == 130:  # newer versions of Typer return this for a KeyboardInterrupt
            return _fail(program, "stopped by the keyboard", EXIT_STOPPED, debug)
        return code if isinstance(code, int) else EXIT_DONE
    except HpcsslError as error:
        shown = _retired_option(program, argv) if isinstance(error, ConfigError) else None
        return _fail(program, str(shown or error), error.exit_code, debug)
    except (KeyboardInterrupt, typer.Abort):
        return _fail(program, "stopped by the keyboard", EXIT_STOPPED, debug)
    except BrokenPipeError:  # the reader of the pipe, such as `head`, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_DONE
    except Exception as error:  # noqa: BLE001 - whatever it was, the user gets one line
        if hasattr(error, "format_message"):  # a usage error of Typer
            text = str(_retired_option(program, argv) or " ".join(error.format_message().split()))
            return _fail(program, text, EXIT_USAGE, debug)
        text = describe_error(error) or f"unexpected {type(error).__name__}: {error} (--debug shows where)"
        return _fail(program, text, EXIT_FAILED, debug)


def end_process(code: int) -> NoReturn:
    """End the process with an exit code, whatever its daemon threads do.

    Python before 3.14 aborts if it ends while a daemon thread returns from C++, such as from torch's store, whose calls
    can take as long as the network does. If there is such a thread, the interpreter is not torn down.

    Args:
        code: The exit code.
    """
    if any(thread.daemon and thread is not threading.current_thread() for thread in threading.enumerate()):
        threading._shutdown()  # type: ignore[attr-defined]  # this and the next line are what sys.exit does first;
        atexit._run_exitfuncs()  # they have no public names
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)
    sys.exit(code)


def print_message(text: str, program: str = "hpcssl") -> None:
    """Write ``program: text`` as one line to standard error, at once. Nothing happens if nobody can read it.

    Args:
        text: One or more sentences.
        program: The program that reports.
    """
    with contextlib.suppress(OSError):
        print(f"{program}: {text}", file=sys.stderr, flush=True)  # noqa: T201 - a command line prints


def _fail(program: str, text: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print_message(text, program)
    return code


def _retired_option(program: str, argv: list[str]) -> ConfigError | None:
    """The error for the first retired option of a command line that was refused; None if there is none."""
    for word in argv:
        option = word.partition("=")[0]
        current = RETIRED_OPTIONS.get(f"{program} {option}")
        if current is not None:
            return ConfigError(option, got="a retired option", expected=current, fix=f"write {current}")
    return None


def _open_streams() -> None:
    """Open the standard streams that the caller has closed (``2>&-``).

    Otherwise a file of the run would get the number of the stream, and what libraries write to it.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest free number is this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115 - open as long as the process lives


# -- entry points -------------------------------------------------------------------------------------------


def submit_main(argv: list[str] | None = None) -> None:
    """Entry point of ``hpcssl-submit``."""
    _run_package("slurm", "hpcssl-submit", argv)


def shard_main(argv: list[str] | None = None) -> None:
    """Entry point of ``hpcssl-shard``."""
    _run_package("data_prep", "hpcssl-shard", argv)


def _run_package(package: str, program: str, argv: list[str] | None) -> None:
    """Run ``main`` of ``package.cli``, after a check that this is our package and not another one of its name."""
    try:
        module = import_own(f"{package}.cli")
    except ConfigError as error:
        print_message(str(error), program)
        sys.exit(error.exit_code)
    module.main(argv)


def import_own(name: str) -> ModuleType:
    """Import a module of one of the three packages.

    Args:
        name: The module, such as ``slurm.api``.

    Raises:
        ConfigError: Another package of this name, which is not a part of hpcssl, is found first.
    """
    package = name.partition(".")[0]
    spec = importlib.util.find_spec(package)
    home = Path(hpcssl.__file__).resolve().parents[1]
    location = Path(spec.origin).resolve().parent if spec is not None and spec.origin else None
    path = home.joinpath(*name.split("."))
    is_there = path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()
    if location != home / package or not is_there:
        raise _other_package_error(package, home, location)
    return importlib.import_module(name)


def _other_package_error(package: str, home: Path, location: Path | None) -> ConfigError:
    owners = [name for name in metadata.packages_distributions().get(package, []) if name != "hpcssl"]
    return ConfigError(
        f"package {package}",
        got=f"another package of this name at {location}" if location else "no such package",
        expected=f"{home / package}, which was installed with hpcssl",
        fix=f"uninstall {' and '.join(owners)}" if owners else "install hpcssl in an environment of its own",
    )
