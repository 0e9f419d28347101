"""``hpcssl-submit top``: what it shows, what its keys do, and that it never blocks."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from hpcssl import cli_runner, files
from hpcssl.errors import EXIT_USAGE, SubmitError
from slurm import cli
from slurm.backend import batch_script
from slurm.backend.profiles import Profile
from slurm.log import attempts, job_log
from slurm.manage import control, status
from slurm.top import rows as display
from slurm.top.app import TopApp
from slurm.top.screens import ConfirmScreen, LogScreen
from tests.printed import printed_error
from tests.slurm import stubs
from tests.slurm.job_runner import JOB_TIMEOUT_S, skip_requeue_delay
from tests.slurm.recorded_runs import Squeue, make_run, row

ROOT = Path(__file__).resolve().parents[2]
VALUES = {
    "run": "/x", "job": None, "state": "NONE", "reason": None, "expected_start": None, "attempt": 0, "step": 0,
    "steps": None, "epoch": None, "images_per_s": None, "loss": None, "scores": {}, "seconds_left": None,
    "finished": False, "last_end": None, "evaluations": {}, "effective": None, "hint": None,
}  # fmt: skip
SIZES = ((80, 24), (120, 40), (200, 50))


@pytest.fixture
def squeue(tmp_path, monkeypatch):
    stub = Squeue(tmp_path / "stub")
    monkeypatch.setenv("PATH", str(stub.bin), prepend=os.pathsep)
    return stub


def drive(script, roots, *, size=(120, 40), every=3600.0):
    """Run ``script(app, pilot)`` on the screen of some folders."""

    async def main():
        app = TopApp(roots, every)
        async with app.run_test(size=size) as pilot:
            await until(pilot, lambda: app.rows or app.error)
            await script(app, pilot)

    asyncio.run(main())


async def until(pilot, condition, timeout=60.0):
    """Let the screen run until a condition holds."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "the condition did not hold in time"
        await pilot.pause(0.02)
    await pilot.pause()


def read_table(app):
    """The table as a list of dicts of text."""
    table = app.query_one("#runs")
    names = [str(column.label) for column in table.columns.values()]
    return [dict(zip(names, map(str, table.get_row_at(i)), strict=True)) for i in range(table.row_count)]


def text_of(app, name):
    return str(app.query_one(name).content)


def fill(tmp_path, squeue, count=3):
    """Runs ``sweep/r1`` … of which the first one runs, and the others wait."""
    runs, answers = [], []
    for k in range(1, count + 1):
        run, token = make_run(tmp_path / "all" / "sweep" / f"r{k:02}", k)
        state = ("RUNNING",) if k == 1 else ("PENDING", "Priority", "2030-01-02T03:04:05")
        runs.append(run)
        answers.append(row(k, token, run, *state))
    squeue.answer(*answers)
    return runs


# -- what is shown --------------------------------------------------------------------------------------------------


def test_the_screen_shows_all_runs_by_one_call_of_squeue_per_refresh(tmp_path, squeue):
    fill(tmp_path, squeue, 30)

    async def script(app, pilot):
        assert len(squeue.calls) == 1
        table = read_table(app)
        assert [line["run"] for line in table] == [f"sweep/r{k:02}" for k in range(1, 31)]
        assert table[0] == {
            "run": "sweep/r01", "state": "RUNNING", "step": "31/100", "left": "14s", "epoch": "2.1", "img/s": "40",
            "k-NN": "88.50", "reason": "-", "start": "-",
        }  # fmt: skip
        assert (table[1]["reason"], table[1]["start"]) == ("Priority", "02 Jan 03:04")
        assert text_of(app, "#summary").startswith("30 runs: 29 pending, 1 running")
        await pilot.press("down", "down")
        assert "expected start: 2030-01-02 03:04:05" in text_of(app, "#details")
        assert str(tmp_path / "all" / "sweep" / "r03") in text_of(app, "#details")
        await pilot.press("space")
        await until(pilot, lambda: len(squeue.calls) == 2 and not app._is_reading.is_set())
        assert app.query_one("#runs").cursor_row == 2, "the cursor stays on its run"

    drive(script, [tmp_path / "all"])


@pytest.mark.parametrize("size", SIZES)
def test_columns_fit_into_the_terminal(tmp_path, squeue, size):
    fill(tmp_path, squeue, 2)

    async def script(app, pilot):
        table = app.query_one("#runs")
        assert table.virtual_size.width <= size[0]
        assert {"run", "state", "step", "left"} <= read_table(app)[0].keys()
        await pilot.resize_terminal(50, 15)
        await until(pilot, lambda: app.query_one("#runs").virtual_size.width <= 50)

    drive(script, [tmp_path / "all"], size=size)


def make_row(name="one", **values):
    """A row of the screen, with values of ``status --json``."""
    return display.to_row(VALUES | values, name)


def test_columns_without_values_and_those_of_less_importance_give_way():
    plain, full = make_row(), make_row(loss=0.25, reason="Priority", last_end="killed (signal 9)", seconds_left=3725)
    assert list(display.choose_columns([plain], 200)) == ["run", "state", "step"]
    assert list(display.choose_columns([plain, full], 200)) == [
        "run", "state", "step", "left", "loss", "reason", "last end",
    ]  # fmt: skip
    assert list(display.choose_columns([plain, full], 40)) == ["run", "state", "step", "left", "loss"]
    assert full.cells["left"] == "1h 02m" and full.cells["last end"] == "killed (signal 9)"
    long = make_row("a" * 60)
    assert display.choose_columns([long], 60)["run"] == 60 - 2 * 3 - len("state") - len("step")


def test_texts_are_short():
    spans = {0: "0s", 59.2: "1m 00s", 61: "1m 01s", 3600: "1h 00m", 90000: "1d 01h", None: "-"}
    assert {seconds: display.format_span(seconds) for seconds in spans} == spans
    assert display.shorten("abcdefghijklm", 10, keep_end=True) == "…efghijklm"
    assert display.shorten("abcdef", 4) == "abc…" and display.shorten("abc", 3) == "abc"


def test_an_error_keeps_the_table_and_is_shown(tmp_path, squeue):
    runs = fill(tmp_path, squeue)

    async def script(app, pilot):
        (runs[1].root / "attempts.jsonl").mkdir()  # cannot be read
        await pilot.press("space")
        await until(pilot, lambda: app.error)
        assert len(read_table(app)) == 3 and "attempts.jsonl" in text_of(app, "#summary")
        (runs[1].root / "attempts.jsonl").rmdir()
        (squeue.folder / "down").touch()
        await pilot.press("space")
        await until(pilot, lambda: not app.error)
        assert {line["state"] for line in read_table(app)} == {"UNKNOWN"}
        assert "contact" in text_of(app, "#details"), "the hint is SLURM's own message"

    drive(script, [tmp_path / "all"])


def test_new_runs_appear_and_an_empty_folder_is_no_error(tmp_path, squeue):
    (tmp_path / "all").mkdir()

    async def main():
        app = TopApp([tmp_path / "all"], 3600.0)
        async with app.run_test() as pilot:
            await until(pilot, lambda: "No runs below" in text_of(app, "#summary"))
            await pilot.press("l", "c", "p", "r")
            assert len(app.screen_stack) == 1
            fill(tmp_path, squeue)
            await pilot.press("space")
            await until(pilot, lambda: len(read_table(app)) == 3)

    asyncio.run(main())


def test_a_slow_controller_does_not_block_the_screen(tmp_path, squeue, monkeypatch):
    fill(tmp_path, squeue)
    release, threads, query = threading.Event(), [], status.query_runs

    def query_slowly(runs):
        threads.append(threading.current_thread())
        if len(threads) > 1:
            assert release.wait(60)
        return query(runs)

    monkeypatch.setattr(status, "query_runs", query_slowly)

    async def script(app, pilot):
        await pilot.press("space")
        await until(pilot, lambda: len(threads) == 2)
        await pilot.press("down", "space", "space")
        assert app.query_one("#runs").cursor_row == 1, "keys work meanwhile"
        assert len(threads) == 2, "one query at a time"
        release.set()
        await until(pilot, lambda: len(threads) == 3 and not app._is_reading.is_set())
        assert threading.main_thread() not in threads

    drive(script, [tmp_path / "all"])


# -- keys -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("key", "action"), [("c", "cancel"), ("p", "preempt"), ("r", "requeue")])
def test_what_stops_work_is_done_only_after_a_yes(tmp_path, squeue, monkeypatch, key, action):
    fill(tmp_path, squeue)
    calls = []

    def act(run):
        calls.append((run.root.name, threading.current_thread() is threading.main_thread()))
        return ["7"] if action == "cancel" else "done"

    monkeypatch.setattr(control, action, act)

    async def script(app, pilot):
        await pilot.press("down", key)
        assert isinstance(app.screen, ConfirmScreen)
        for answer in ("n", "escape", "enter"):
            await pilot.press(answer)
            assert not isinstance(app.screen, ConfirmScreen) and not calls
            await pilot.press(key)
        await pilot.press("y")
        await until(pilot, lambda: calls)
        assert calls == [("r02", False)]

    drive(script, [tmp_path / "all"])


def test_a_refused_action_is_reported(tmp_path, squeue):
    fill(tmp_path, squeue)
    notes = []

    async def script(app, pilot):
        app.notify = lambda text, **options: notes.append((text, options["severity"]))
        await pilot.press("down", "p", "y")
        await until(pilot, lambda: notes)
        assert notes[0][1] == "error" and "running job to preempt" in notes[0][0]

    (squeue.bin / "scontrol").write_text("#!/bin/bash\necho 'Invalid job id specified' >&2; exit 1\n")
    drive(script, [tmp_path / "all"])


def test_the_log_is_shown_and_followed(tmp_path, squeue):
    run = fill(tmp_path, squeue)[0]
    path = run.logs / "1_0_log.out"
    path.write_text("first line\nwith [brackets]\n")

    async def script(app, pilot):
        await pilot.press("enter")
        await until(pilot, lambda: isinstance(app.screen, LogScreen) and app.screen.query_one("#log").line_count >= 2)
        with open(path, "a") as file:
            file.write("a later line\n")
        await until(pilot, lambda: "a later line" in list(app.screen.query_one("#log").lines))
        assert list(app.screen.query_one("#log").lines)[:2] == ["first line", "with [brackets]"]
        await pilot.press("escape", "down", "l")
        await until(pilot, lambda: "no such file" in " ".join(app.screen.query_one("#log").lines))

    drive(script, [tmp_path / "all"])


# -- the command ----------------------------------------------------------------------------------------------------


def call(capsys, *words):
    code = cli_runner.run(cli.app, ["top", *words], "hpcssl-submit")
    return code, capsys.readouterr().err


def test_bad_input_is_refused(tmp_path, capsys, monkeypatch):
    code, err = call(capsys, str(tmp_path / "none"))
    assert code == EXIT_USAGE and printed_error(err).got == "no such folder"
    code, err = call(capsys, str(tmp_path))
    assert code == EXIT_USAGE and "no terminal" in printed_error(err).got and "status --watch" in printed_error(err).fix
    assert printed_error(err).what == "top", "the program's name stands before it already"
    monkeypatch.setattr(sys, "stdin", open(os.devnull))  # noqa: SIM115
    monkeypatch.setattr("slurm.top.command.sys", type("Terminal", (), {"stdin": TTY, "stdout": TTY}))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, err = call(capsys, str(tmp_path))
    assert code == EXIT_USAGE and "textual" in printed_error(err).got and "hpcssl[top]" in printed_error(err).fix


class TTY:
    @staticmethod
    def isatty():
        return True


def test_top_imports_no_torch(tmp_path, squeue):
    fill(tmp_path, squeue)
    code = f"""
import asyncio, sys
from pathlib import Path
from slurm import cli
from slurm.top.app import TopApp
async def main():
    app = TopApp([Path({str(tmp_path / "all")!r})], 3600.0)
    async with app.run_test() as pilot:
        while not app.rows:
            await pilot.pause(0.02)
asyncio.run(main())
assert not {{"torch", "matplotlib", "sklearn"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})


# -- requeue ----------------------------------------------------------------------------------------------------------


def test_a_requeue_needs_a_running_or_held_job_of_slurm(tmp_path, squeue, monkeypatch):
    run, _ = make_run(tmp_path / "run")
    calls = []
    state = {"name": "PENDING", "reason": "Priority"}
    monkeypatch.setattr(status, "query_job", lambda *_: status.JobState(**state))
    monkeypatch.setattr(control, "_run_or_raise", lambda *words, job: calls.append(words))
    with pytest.raises(SubmitError) as caught:
        control.requeue(run)
    assert caught.value.got == "no running or held job" and not calls
    state["reason"] = "launch_failed_requeued_held"
    assert control.requeue(run) == "Released job 7" and calls.pop() == ("scontrol", "release", "7")
    state.update(name="RUNNING", reason="")
    assert control.requeue(run) == "Requeued job 7" and calls.pop() == ("scontrol", "requeue", "7")
    job_log.record_event(run, "submit", "local-1", what="train", kind="local", options={}, token="", user="me")
    with pytest.raises(SubmitError) as caught:
        control.requeue(run)
    assert "preempt" in caught.value.fix


@pytest.mark.full
@pytest.mark.slurm
@pytest.mark.timeout(1200)
def test_thirty_runs_on_a_cluster(cluster, tmp_path, monkeypatch):
    options = {"ntasks": "1", "cpus-per-task": "1", "mem": "0", "time": "20"}
    runs = [stubs.create_run(tmp_path / "runs" / f"r{k:02}", steps=12, hold_at=6) for k in range(30)]
    for run in runs:
        files.atomic_write(run.config, "schedule: {steps: 12}\noptim: {batch: 8}\n")
    first = [batch_script.submit(run, "train", options, Profile()) for run in runs[:4]]
    for k, run in enumerate(runs[4:]):
        batch_script.submit(run, "train", options | {"dependency": f"afterany:{first[k % 4]}"}, Profile())
    queries, run_command = [], status.scheduler.run_command

    def count(program, *words, **more):
        queries.append(program)
        return run_command(program, *words, **more)

    monkeypatch.setattr(status.scheduler, "run_command", count)

    async def refresh(app, pilot, condition):
        async def once():
            skip_requeue_delay(cluster)
            await pilot.press("space")
            await until(pilot, lambda: not app._is_reading.is_set())
            return condition({line["run"]: line for line in read_table(app)})

        deadline = time.monotonic() + JOB_TIMEOUT_S
        while not await once():
            assert time.monotonic() < deadline, read_table(app)[:5]
            await pilot.pause(0.5)

    async def script(app, pilot):
        await refresh(app, pilot, lambda t: all(t[f"r0{k}"]["state"] == "RUNNING" for k in range(4)))
        assert len(read_table(app)) == 30
        assert [line["reason"] for line in read_table(app)][4:] == ["Dependency"] * 26
        await refresh(app, pilot, lambda t: all(t[f"r0{k}"]["step"].startswith("6") for k in range(4)))
        queries.clear()
        await refresh(app, pilot, lambda t: True)
        assert queries == ["squeue"], "one call for thirty runs"
        for key, cause in (("p", "preempted"), ("r", "preempted")):
            before = len(attempts.read_attempts(runs[0]))
            await pilot.press("home", key, "y")
            await refresh(
                app,
                pilot,
                lambda t, n=before: (
                    len(attempts.read_attempts(runs[0])) > n
                    and t["r00"]["state"] == "RUNNING"
                    and t["r00"]["step"].startswith("6")
                ),
            )
            assert attempts.read_attempts(runs[0])[before - 1].cause == cause
        await pilot.press("home", "down", "c", "y")
        await refresh(app, pilot, lambda t: t["r01"]["state"] == "CANCELLED")
        await refresh(app, pilot, lambda t: t["r05"]["state"] == "RUNNING")
        assert attempts.read_attempts(runs[1])[-1].cause == "cancelled"
        await pilot.press("home", "l")
        await until(pilot, lambda: isinstance(app.screen, LogScreen))
        await pilot.press("escape")

    try:
        drive(script, [tmp_path / "runs"])
    finally:
        cluster("scancel", *[job_log.latest_jobs(run)["train"].id for run in runs])
