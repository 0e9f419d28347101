"""What the three command lines share: errors as one line, exit codes, and output that suits a pipe."""

from __future__ import annotations

import os
import sys
import traceback

from hpcssl.errors import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, EXIT_USAGE, HpcsslError, sentence


def run(app, argv: list[str] | None, name: str) -> int:
    """Run a Typer app and return its exit code. Tracebacks are for ``--debug``; a person gets one sentence."""
    import typer  # the job's own processes never need it

    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    argv = [a for a in argv if a != "--debug"]
    command = typer.main.get_command(app)
    try:
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
    print(f"{name}: {told}", file=sys.stderr)  # noqa: T201 - this is a door
    return code
