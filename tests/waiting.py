"""Waiting for events instead of for time.

A test that sleeps for as long as something "should take" fails on a slower or busier machine. The functions here wait
until the awaited thing has happened, and give up only after a time that no working machine needs.
"""

import time

PATIENCE_S = 120.0
"""Default limit in seconds. It exists to turn a hang into a failure with a message, and is not a measure of speed."""


def wait_until(condition, message, timeout=PATIENCE_S, pause=0.01):
    """Call ``condition`` until it returns something true, and return that.

    Args:
        condition: A function without arguments. It may look at files that others write or delete; where that raises
            ``FileNotFoundError``, the condition counts as not yet met.
        message: What is being waited for, as a text or as a function that returns one: for the failure message.
        timeout: Seconds after which the wait fails.
        pause: Seconds between two calls.

    Raises:
        AssertionError: The condition was not met in time.
    """
    deadline = time.monotonic() + timeout
    while True:
        # compared first: if this process was suspended in between, the condition is checked once more
        late = time.monotonic() > deadline
        try:
            value = condition()
        except FileNotFoundError:
            value = None
        if value:
            return value
        if late:
            raise AssertionError(f"no success within {timeout:g} s: {message() if callable(message) else message}")
        time.sleep(pause)


def wait_for_exit(process, timeout=PATIENCE_S):
    """Wait for a ``multiprocessing.Process`` to end and return its exit code.

    Raises:
        AssertionError: The process still runs after ``timeout`` seconds; it is killed then.
    """
    process.join(timeout)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise AssertionError(f"process {process.pid} did not end within {timeout:g} s")
    return process.exitcode
