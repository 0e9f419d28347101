"""What a call may change in this process, and how it is put back: signals, torch, logging, threads, environment.

A command owns its process and ends with it. A notebook goes on: the next call, and the user's own code, must find
everything as it was.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import os
import threading
from collections.abc import Iterator

from hpcssl.distributed.launch import detect_launcher
from hpcssl.signals import StopFlag

_CALLS = itertools.count(1)  # the calls of this process
_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"


@contextlib.contextmanager
def call_session(stop: StopFlag | None = None) -> Iterator[StopFlag]:
    """Run a training or an evaluation from torch's default settings, and restore all settings of the process after it.

    Args:
        stop: The flag that stops the work, if the caller handles signals. By default the signals of a scheduler, and
            Ctrl-C, set a new one while the block runs; outside the main thread Python delivers no signals.

    Yields:
        The flag.
    """
    flag = stop or StopFlag()
    with contextlib.ExitStack() as stack:
        if stop is None and threading.current_thread() is threading.main_thread():
            flag.install(keyboard=True)
            stack.callback(flag.restore)
        stack.enter_context(_own_rendezvous())
        stack.enter_context(_restored_logging())
        stack.enter_context(_restored_torch())
        yield flag


@contextlib.contextmanager
def _own_rendezvous() -> Iterator[None]:
    """Let the ranks of a second call meet under another token than those of the first.

    torchrun keeps one store for the life of its processes, in which the first call has left its keys.
    """
    number, info = next(_CALLS), detect_launcher()
    if info is None or number == 1:
        yield
        return
    variables = dataclasses.replace(info, token=f"{info.token}.call{number}").environment()
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _restored_logging() -> Iterator[None]:
    logger, hook = logging.getLogger("hpcssl"), threading.excepthook
    handlers, level, propagate = logger.handlers[:], logger.level, logger.propagate
    try:
        yield
    finally:
        logger.handlers[:] = handlers
        logger.setLevel(level)
        logger.propagate = propagate
        threading.excepthook = hook


@contextlib.contextmanager
def _restored_torch() -> Iterator[None]:
    """Restore torch's settings after the block, and begin it with the defaults that change a result."""
    import torch

    try:
        import faiss
    except ImportError:
        faiss = None  # type: ignore[assignment]  # a module, where it is installed
    threads, cublas, dtype = torch.get_num_threads(), os.environ.get(_CUBLAS), torch.get_default_dtype()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    blas_threshold = faiss.cvar.distance_compute_blas_threshold if faiss is not None else 0
    benchmark, precision = torch.backends.cudnn.benchmark, torch.get_float32_matmul_precision()
    with contextlib.ExitStack() as stack:
        if torch.get_default_device().type != "cpu":  # torch.set_default_device of the user
            stack.enter_context(torch.device("cpu"))
        gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
        stack.enter_context(torch.random.fork_rng(gpus))  # torch draws initial weights, which are then replaced
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        torch.set_default_dtype(torch.float32)
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.benchmark = False
        if precision != "highest":
            torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            if faiss is not None:  # its threads follow torch's during the block
                faiss.omp_set_num_threads(threads)
                faiss.cvar.distance_compute_blas_threshold = blas_threshold
            torch.set_default_dtype(dtype)
            torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
            torch.backends.cudnn.benchmark = benchmark
            if precision != "highest":
                torch.set_float32_matmul_precision(precision)
            if cublas is None:
                os.environ.pop(_CUBLAS, None)
