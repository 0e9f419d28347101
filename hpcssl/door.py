"""What the three command lines share: errors as one line, exit codes, and output that suits a pipe."""

from __future__ import annotations

import errno
import os
import sys
import traceback

from hpcssl.errors import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, EXIT_USAGE, HpcsslError


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
    except OSError as error:
        return _say(name, os_sentence(error), EXIT_FAILED, debug)
    except Exception as error:  # noqa: BLE001 - the last catcher: whatever it was, a person reads one line
        if hasattr(error, "format_message"):  # the CLI library's own usage errors
            return _say(name, " ".join(error.format_message().split()), EXIT_USAGE, debug)
        return _say(name, f"unexpected {type(error).__name__}: {error} (--debug shows where)", EXIT_FAILED, debug)


def os_sentence(error: OSError) -> str:
    """One sentence for an error of the operating system, with its mend where there is one."""
    where = error.filename or "a file"
    mend = {
        errno.ENOSPC: "free room there or choose another folder, then run the same command again",
        errno.EDQUOT: "free room in your quota or choose another folder, then run the same command again",
        errno.EACCES: "ask for the right to read or write it, or choose another folder",
        errno.EPERM: "ask for the right to read or write it, or choose another folder",
        errno.EROFS: "choose a folder that can be written",
        errno.ENOENT: "check the path",
    }.get(error.errno, "see the message; --debug shows where it came from")
    expected = "enough free space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "a path that can be used"
    return f"{where}: got {error.strerror or error}; expected {expected}; to mend: {mend}"


def _say(name: str, sentence: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(f"{name}: {sentence}", file=sys.stderr)  # noqa: T201 - this is a door
    return code
