"""``hpcssl.train``, ``hpcssl.evaluate`` and ``hpcssl.Run`` in one process, as a notebook calls them."""

from __future__ import annotations

import inspect
import logging
import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

import hpcssl
from hpcssl import cli
from hpcssl.api.overrides import collect_overrides, plain_source
from hpcssl.errors import ConfigError, DataError, HpcsslError, ResumeError, TrainingStopped
from hpcssl.files import append_line
from hpcssl.run_dir import RunDir
from hpcssl.signals import StopFlag
from hpcssl.train import recipe as recipes
from hpcssl.train.loop import Loop
from slurm.log.attempts import read_attempts
from tests.printed import printed_error

ROOT = Path(__file__).resolve().parents[2]
STEPS = 4
TINY = {
    "machine": {"devices": "cpu", "log_steps": 2, "loader_threads": 2},
    "views.size": 16,
    "optim": {"batch": 8},
    "schedule": {"steps": STEPS},
    "bank.size": 16,
}


@pytest.fixture
def train(shards):
    """train(run, *overrides, **values): a training of a few steps."""

    def train(run, *overrides, **values):
        data = {"train": shards.root, "val": shards.root}
        return hpcssl.train("digits_msf", *overrides, run=run, data=data, **TINY | values)

    return train


@pytest.fixture(scope="module")
def trained(shards, tmp_path_factory):
    """A finished run; tests read it."""
    data = {"train": shards.root, "val": shards.root}
    return hpcssl.train("digits_msf", run=tmp_path_factory.mktemp("api") / "run", data=data, **TINY)


def process_state():
    """What a call must leave as it was."""
    logger = logging.getLogger("hpcssl")
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGXCPU)
    return {
        "signals": [signal.getsignal(number) for number in numbers],
        "logging": (logger.handlers[:], logger.level, logger.propagate, threading.excepthook),
        "threads": {thread.name for thread in threading.enumerate()},
        "torch": (
            torch.get_num_threads(),
            torch.get_default_dtype(),
            torch.is_grad_enabled(),
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.backends.cudnn.benchmark,
            torch.get_float32_matmul_precision(),
        ),
        "random": (torch.random.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()),  # noqa: NPY002
        "environment": dict(os.environ),
        "group": torch.distributed.is_initialized(),
        "folder": Path.cwd(),
    }


# -- what the package offers ----------------------------------------------------------------------------------


def test_reading_a_run_does_not_import_torch(trained):
    code = (
        "import sys, hpcssl\n"
        "hpcssl.train, hpcssl.evaluate\n"
        f"run = hpcssl.Run({str(trained.path)!r})\n"
        "assert run.journal and run.attempts and run.weights and run.finished\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_the_package_train_is_also_the_function():
    assert inspect.signature(hpcssl.train) == inspect.signature(hpcssl.api.train)
    assert hpcssl.train.recipe is recipes
    assert {"train", "evaluate", "submit", "Run", "load_backbone"} <= set(dir(hpcssl))
    with pytest.raises(AttributeError):
        hpcssl.trian  # noqa: B018 - the access is what is tested


# -- recipes and overrides ------------------------------------------------------------------------------------


def test_every_way_to_write_a_change_means_the_same():
    expected = {"optim": {"lr": 0.1, "batch": 8}, "data": {"train": "a/b"}, "evals": {"knn": {"k": [5, 20]}}}
    words = ["optim.lr=0.1", "optim.batch=8", "data.train=a/b", "evals.knn.k=[5,20]"]
    assert collect_overrides(words, {}) == expected
    nested = {"optim": {"lr": 0.1, "batch": 8}, "data": {"train": Path("a/b")}, "evals": {"knn.k": (5, 20)}}
    assert collect_overrides([], nested) == expected
    dotted = {"optim.lr": np.float64(0.1), "data.train": "a/b", "evals.knn": {"k": [5, np.int64(20)]}}
    assert collect_overrides(["optim.batch=8", "optim.lr=9"], dotted) == expected


@pytest.mark.parametrize("value", [object(), {"lr": {1, 2}}, torch.zeros(2)])
def test_a_value_that_no_yaml_file_holds_is_refused(value):
    with pytest.raises(ConfigError) as caught:
        collect_overrides([], {"optim": value})
    assert "optim" in caught.value.what or "lr" in caught.value.what


def test_a_recipe_may_be_a_name_a_path_values_or_a_recipe(tmp_path):
    by_name = recipes.compose("digits_msf", ["optim.lr=0.1"])
    values = {"base": "digits_msf", "optim.lr": 0.1}
    path = tmp_path / "mine.yaml"
    path.write_text("base: digits_msf\noptim: {lr: 0.1}\n")
    for source in (path, str(path), values, by_name):
        composed = recipes.compose(plain_source(source))
        assert composed.science("data", 1) == by_name.science("data", 1)
    assert recipes.compose(path).name == "mine" and recipes.compose(plain_source(values)).name == "custom"
    assert recipes.compose(by_name, {"schedule": {"steps": 7}}).schedule.epochs is None
    with pytest.raises(ConfigError):
        plain_source(3)


@pytest.mark.parametrize("key", ["optim.lrr", "optm.lr"])
def test_an_unknown_key_gives_the_error_of_the_command_line(key, tmp_path, capsys):
    with pytest.raises(ConfigError) as caught:
        hpcssl.train("digits_msf", run=tmp_path / "run", **{key: 1})
    with pytest.raises(SystemExit):
        cli.main(["train", "digits_msf", "--run", str(tmp_path / "run"), f"{key}=1"])
    printed = printed_error(capsys.readouterr().err)
    parts = (caught.value.what, caught.value.got, caught.value.expected, caught.value.fix)
    assert parts == (printed.what, printed.got, printed.expected, printed.fix)
    assert not (tmp_path / "run").exists()


# -- training -------------------------------------------------------------------------------------------------


def test_two_trainings_in_one_process_do_not_know_of_each_other(train, trained, tmp_path):
    before = process_state()
    digest = train(tmp_path / "first", machine=TINY["machine"] | {"deterministic": True}).digest
    assert process_state() == before
    assert train(tmp_path / "second").digest == digest == trained.digest
    assert process_state() == before


def test_settings_of_the_user_neither_change_the_result_nor_get_lost(train, trained, tmp_path):
    before = process_state()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        torch.set_default_dtype(torch.float64)
        torch.use_deterministic_algorithms(True, warn_only=True)
        logging.getLogger("hpcssl").addHandler(logging.NullHandler())
        with torch.no_grad():
            own = process_state()
            assert train(tmp_path / "run").digest == trained.digest
            assert process_state() == own
    finally:
        torch.set_num_threads(threads)
        torch.set_default_dtype(torch.float32)
        torch.use_deterministic_algorithms(False)
        logging.getLogger("hpcssl").handlers.pop()
    assert process_state() == before


def raise_at(monkeypatch, step, act):
    """Call ``act()`` once, after the training step of this number."""
    record_step = Loop._record_step

    def record(loop, batch, report):
        record_step(loop, batch, report)
        if loop.training.step == step:
            monkeypatch.undo()
            act()

    monkeypatch.setattr(Loop, "_record_step", record)


def test_the_stop_button_saves_and_the_same_call_resumes(train, trained, tmp_path, monkeypatch):
    before = process_state()
    raise_at(monkeypatch, 2, lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(TrainingStopped) as caught:
        train(tmp_path / "run")
    assert process_state() == before
    assert "SIGINT" in caught.value.got and str(tmp_path / "run") in caught.value.what
    stopped = hpcssl.Run(tmp_path / "run")
    assert not stopped.finished and 0 < stopped.step < STEPS
    resumed = train(tmp_path / "run")
    assert [a["cause"] for a in resumed.attempts] == ["stopped", "done"]
    assert resumed.attempts[1]["first_step"] == resumed.attempts[0]["last_step"] == 3  # the step after the signal
    assert resumed.digest == trained.digest


def test_an_interrupt_in_the_middle_of_a_step_leaves_the_folder_usable(train, trained, tmp_path, monkeypatch):
    before = process_state()

    def interrupt_twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    raise_at(monkeypatch, 2, interrupt_twice)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run")
    assert process_state() == before
    assert train(tmp_path / "run").digest == trained.digest


def test_a_thread_can_train_and_be_stopped_by_a_flag(train, tmp_path, monkeypatch):
    stop, errors = StopFlag(), []
    raise_at(monkeypatch, 1, lambda: stop.set("a button"))

    def work():
        try:
            train(tmp_path / "run", stop=stop)
        except HpcsslError as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert [type(error) for error in errors] == [TrainingStopped] and "a button" in errors[0].got


def test_errors_are_typed_and_leave_nothing_behind(train, trained, tmp_path):
    before = process_state()
    with pytest.raises(DataError):
        hpcssl.train("digits_msf", run=tmp_path / "run", data={"train": tmp_path / "nowhere"})
    with pytest.raises(ResumeError) as caught:
        train(trained.path, **{"method.k": 3})
    assert "method.k=3" in caught.value.got
    assert process_state() == before and not (tmp_path / "run").exists()


def test_a_run_branches_from_another_one(trained, tmp_path):
    branch = hpcssl.train(run=tmp_path / "branch", parent=trained, **{"schedule.steps": STEPS + 2})
    assert branch.config.schedule.steps == STEPS + 2 and branch.config.data == trained.config.data
    assert [attempt["first_step"] for attempt in branch.attempts] == [STEPS] and branch.finished
    with pytest.raises(ConfigError):
        hpcssl.train("digits_msf", run=tmp_path / "both", parent=trained)
    with pytest.raises(ConfigError):
        hpcssl.train(run=tmp_path / "neither")


def test_an_attempt_counts_from_its_call(trained):
    (attempt,) = trained.attempts
    assert 0 <= attempt["started"] - attempt["began"] < 60  # not from the start of this process, long before
    assert attempt["cause"] == "done" and (attempt["first_step"], attempt["last_step"]) == (0, STEPS)


# -- reading a run --------------------------------------------------------------------------------------------


def test_a_run_shows_what_its_folder_holds(trained):
    run = hpcssl.Run(str(trained.path))
    assert (run.config.optim.batch, run.config.method.name) == (8, "msf")
    assert [row["step"] for row in run.journal if not row.get("eval")] == [1, 2, 3, 4]
    assert list(run.weights) == [0, STEPS] and all(path.is_file() for path in run.weights.values())
    assert run.finished and run.step == STEPS and Path(run) == run.path == trained.path
    frame = run.journal.frame()
    assert len(frame) == len(run.journal) and frame["loss"].iloc[0] == run.journal[0]["loss"]
    first, last = run.encoder("first")[0], run.encoder()[0]
    images = torch.zeros(2, 3, 16, 16)
    assert first(images).shape == last(images).shape and not torch.equal(first(images), last(images))


def test_a_folder_without_a_run_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ResumeError) as caught:
            hpcssl.Run(path)
        assert str(path) in caught.value.what


def test_records_without_pandas_remain_a_list(trained, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ConfigError) as caught:
        trained.journal.frame()
    assert "pandas" in caught.value.fix and trained.journal[0]["step"] == 1


def test_the_first_end_of_an_attempt_counts_unless_a_later_one_explains_more(tmp_path):
    folder = RunDir(tmp_path)
    folder.config.write_text("name: x\n")
    ends = [
        {"attempt": 1, "event": "end", "cause": "error", "why": "collective", "consequence": True},
        {"attempt": 1, "event": "end", "cause": "error", "why": "full disk"},
        {"attempt": 1, "event": "end", "cause": "error", "why": "later"},
    ]
    for line in ({"attempt": 1, "event": "start", "first_step": 0}, *ends, {"attempt": 2, "event": "start"}):
        append_line(folder.attempts, line)
    first, second = hpcssl.Run(tmp_path).attempts
    assert (first["cause"], first["why"], first["first_step"], second["cause"]) == ("error", "full disk", 0, None)


def test_attempts_have_the_causes_that_the_status_shows(tmp_path):
    folder = RunDir(tmp_path)
    folder.config.write_text("name: x\n")
    ends = [["killed", "node_fail", "error"], ["stopped", "preempted"], [], ["done"]]
    for number, causes in enumerate(ends, 1):
        append_line(folder.attempts, {"attempt": number, "event": "start", "first_step": number, "time": 1.0})
        for cause in causes:
            append_line(folder.attempts, {"attempt": number, "event": "end", "cause": cause, "last_step": 9})
    append_line(folder.attempts, {"attempt": 1, "event": "end", "cause": "error"})  # by a process that was left over
    causes = [attempt["cause"] for attempt in hpcssl.Run(tmp_path).attempts]
    assert causes == [attempt.cause for attempt in read_attempts(folder)] == ["node_fail", "preempted", "lost", "done"]


# -- evaluating -----------------------------------------------------------------------------------------------


def test_an_evaluation_is_stored_in_the_run_and_found_again(trained):
    before = process_state()
    rows = hpcssl.evaluate("knn", "temperature=0.1", run=trained, k=[3], devices="cpu")
    assert process_state() == before
    assert [row["step"] for row in rows] == [0, STEPS] and rows == trained.results
    assert rows[0]["options"]["k"] == [3] and rows[0]["options"]["temperature"] == 0.1
    again = hpcssl.evaluate("knn", run=trained.path, k=(3,), temperature=0.1, devices="cpu")
    assert [row["time"] for row in again] == [row["time"] for row in rows]
    folders = {"train": trained.config.data.train, "val": Path(trained.config.data.val)}
    (row,) = hpcssl.evaluate("knn", weights=trained.weights[STEPS], k=[3], temperature=0.1, devices="cpu", **folders)
    assert row["metrics"] == rows[1]["metrics"]


def test_wrong_evaluations_are_refused(trained):
    with pytest.raises(ConfigError) as caught:
        hpcssl.evaluate("knn", run=trained, kk=3)
    assert "'k'" in caught.value.fix
    for places in ({}, {"run": trained, "weights": trained.weights[0]}):
        with pytest.raises(ConfigError):
            hpcssl.evaluate("knn", **places)
    with pytest.raises(ResumeError):
        hpcssl.evaluate("knn", run=trained.path / "nowhere")


@pytest.mark.full
def test_ranks_of_torchrun_may_call_several_times(shards, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, hpcssl\n"
        f"values = {dict(TINY)!r} | {{'data': {{'train': {str(shards.root)!r}}}}}\n"
        "digests = {hpcssl.train('digits_msf', run=sys.argv[1] + name, **values).digest for name in 'ab'}\n"
        "sys.exit(len(digests) != 1)\n"
    )
    words = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(script),
        str(tmp_path / "run-"),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    assert subprocess.run([sys.executable, *words], env=environment, timeout=300).returncode == 0
