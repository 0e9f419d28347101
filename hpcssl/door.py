"""What the three command lines share: errors as one line, exit codes, and output that suits a pipe."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from itertools import pairwise

from hpcssl.errors import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, EXIT_USAGE, ConfigError, HpcsslError, sentence


def run(app, argv: list[str] | None, name: str) -> int:
    """Run a Typer app and return its exit code. Tracebacks are for ``--debug``; a person gets one sentence."""
    import typer  # the job's own processes never need it

    _three_streams()
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    argv = [a for a in argv if a != "--debug"]
    command = typer.main.get_command(app)
    try:
        if "--run=" in argv or ("--run", "") in pairwise(argv):  # it would mean the folder we are in
            raise ConfigError("--run", got="nothing", expected="a folder",
                              mend="see whether the shell's variable is set")
        code = command.main(args=argv, prog_name=name, standalone_mode=False)
        if code == 130:  # how newer Typers hand on a KeyboardInterrupt
            return _say(name, "stopped by the keyboard", EXIT_STOPPED, debug)
        return code if isinstance(code, int) else EXIT_DONE
    except HpcsslError as error:
        return _say(name, str(error), error.exit_code, debug)
    except (KeyboardInterrupt, typer.Abort):
        return _say(name, "stopped by the keyboard", EXIT_STOPPED, debug)
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_DONE
    except Exception as error:  # noqa: BLE001 - the last catcher: whatever it was, a person reads one line
        if hasattr(error, "format_message"):  # the CLI library's own usage errors
            return _say(name, " ".join(error.format_message().split()), EXIT_USAGE, debug)
        told = sentence(error) or f"unexpected {type(error).__name__}: {error} (--debug shows where)"
        return _say(name, told, EXIT_FAILED, debug)


def _say(name: str, told: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    with contextlib.suppress(OSError):  # nobody may be listening; the code still says it
        print(f"{name}: {told}", file=sys.stderr, flush=True)  # noqa: T201 - this is a door
    return code


def _three_streams() -> None:
    """Open what the caller has closed (`2>&-`): else a file of the run gets its number, and with it what libraries
    write to their standard error."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest free number is this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115 - for as long as the process lives
