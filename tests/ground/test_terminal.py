"""What is written to terminals of any width: whole names, whole bars, and one line per tenth in a log."""

import io
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from data_prep import cli as shard_cli
from hpcssl import cli, cli_runner
from hpcssl.cli import recipe_table
from hpcssl.planning.dry_run import format_duration
from hpcssl.recipes import table
from hpcssl.terminal.progress import LogHandler, ProgressBar, ProgressLog, format_seconds
from hpcssl.terminal.tables import print_table
from hpcssl.train import gpu_memory, recipe
from slurm import cli as submit_cli
from tests.printed import numbers_in

ROOT = Path(__file__).resolve().parents[2]
WIDTHS = (30, 60, 80, 200)


@pytest.fixture(scope="module")
def stored():
    rows = table.read_rows()
    assert rows is not None, "a recipe has changed: run `python -m hpcssl.cli.recipe_table`"
    return {row.name: row for row in rows}


def test_the_stored_table_has_every_recipe(stored):
    assert list(stored) == recipe.names()


SAMPLE = ["cifar10_cmsf_cross", "digits_nnclr_mc", "msf_r50_ep200_1m"]


@pytest.mark.parametrize(
    "name", [n if n in SAMPLE else pytest.param(n, marks=pytest.mark.full) for n in recipe.names()]
)
def test_the_stored_table_is_that_of_the_networks(stored, name):
    assert stored[name] == recipe_table.describe(name)
    ranks = stored[name].usual_gpus
    assert stored[name].memory.of_rank(ranks) == gpu_memory.estimate(recipe.compose(name), ranks)


def test_a_changed_recipe_makes_the_stored_table_invalid(monkeypatch):
    monkeypatch.setattr(table, "digest", lambda: "other")
    assert table.read_rows() is None


def test_recipes_and_help_pages_do_not_import_torch():
    """The import takes seconds, and the commands should answer at once."""
    code = (
        "import sys; from hpcssl import cli, cli_runner\n"
        "codes = [cli_runner.run(cli.app, words, 'hpcssl') for words in (['recipes'], ['--help'], ['recipes', '-h'])]\n"
        "sys.exit(any(codes) or 'torch' in sys.modules or 'omegaconf' in sys.modules)"
    )
    printed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert printed.returncode == 0, printed.stderr
    assert all(name in printed.stdout for name in recipe.names())


def test_no_memory_is_estimated_for_more_gpus_than_images_in_a_step(stored, capsys):
    gpus = stored["digits_msf"].memory.batch + 1
    assert cli_runner.run(cli.app, ["recipes", "--gpus", str(gpus)], "hpcssl") == 0
    head, *lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    memory = {line[0]: line[head.index("memory per GPU")] for line in lines}
    assert {name for name, text in memory.items() if text == "-"} == {
        name for name, row in stored.items() if row.memory.batch < gpus
    }
    assert memory["digits_msf"] == "-" and "GiB" in memory["byol_r50_ep200"]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("app", [cli.app, shard_cli.app, submit_cli.app], ids=["hpcssl", "hpcssl-shard", "submit"])
def test_the_list_of_commands_has_whole_sentences(app, width):
    help_page = CliRunner().invoke(app, ["--help"], env={"COLUMNS": str(width)}, terminal_width=width).stdout
    words = help_page.split()
    for name, command in typer.main.get_command(app).commands.items():
        assert name in words
        sentence = command.get_short_help_str(limit=10**6).split()
        # hyphens are where long words may be broken
        assert "".join(sentence) in "".join(words), f"{name} is cut at {width} columns"


HEAD = ["run", "state", "what", "hint"]
ROWS = [
    ["runs/a_rather_long_name_of_a_run", "RUNNING", "one [n 2] of them", "nothing to do"],
    ["runs/b", "FAILED", "linear done\nknn failed", "submit the run again when the disk has space"],
]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("optional", [(), ("what",)])
def test_a_table_never_cuts_or_breaks_a_name(width, optional):
    out = io.StringIO()
    left_out = print_table(HEAD, ROWS, wrapped={"hint": 15}, optional=optional, width=width, file=out)
    printed = out.getvalue()
    assert "…" not in printed
    assert left_out == ([] if width > 60 else list(optional)) or (width == 30 and not left_out)
    for row in ROWS:
        assert row[0] in printed and row[1] in printed
        assert "what" in left_out or all(word in printed for word in row[2].split())
        assert all(word in printed for word in row[3].split())
    widest = max(map(len, printed.splitlines()))
    assert widest <= max(width, len(f"run {ROWS[0][0]}"))


SCALARS = {"images/s": "512", "loss": "1.234", "purity": "0.98765", "lr": "0.03", "another_long_name": "1.234e+05"}


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_the_bar_stays_in_its_line_with_many_scalars(width):
    out = io.StringIO()
    bar = ProgressBar(12000, first=3000, width=width, file=out)
    for step in range(3001, 3050):
        bar.update(step, SCALARS)
    bar.close()
    last = out.getvalue().replace("\n", "\r").rstrip("\r").split("\r")[-1].rstrip()
    assert len(last) <= width and "3049/12000" in last and last.count("|") == 2
    assert len(last.split("|")[1]) >= (8 if width >= 60 else 1)
    assert ("512 images/s" in last) == (width >= 60)
    assert ("another_long_name 1.234e+05" in last) == (width == 200)
    assert last.split("]")[0].count("<") == 1  # time spent and time left


def test_lines_of_the_log_stand_above_the_bar(monkeypatch):
    out = io.StringIO()
    logger = logging.Logger("test")
    logger.addHandler(LogHandler(out))
    bar = ProgressBar(100, width=60, file=out)
    bar.update(50, {"loss": "1"})
    logger.warning("a line")
    bar.close()
    assert "a line" in [line.split("\r")[-1].strip() for line in out.getvalue().split("\n")]


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_long_work_logs_one_line_per_tenth(caplog):
    clock = Clock()
    caplog.set_level(logging.INFO, "hpcssl")
    progress = ProgressLog("features of val", 1000, "images", now=clock)
    for _ in range(250):
        clock.now += 0.5
        progress.add(4, "a note")
    assert len(caplog.messages) == 10
    for tenth, line in enumerate(caplog.messages, 1):
        percent, done, total, rate, *left = numbers_in(line)
        assert (percent, done, total, rate) == (10 * tenth, 100 * tenth, 1000, 8)
        assert format_seconds((1000 - done) / 8) in line or not left
        assert line.endswith("a note")


def test_quick_and_continued_work_logs_less(caplog):
    clock = Clock()
    caplog.set_level(logging.INFO, "hpcssl")
    quick = ProgressLog("quick", 100, "steps", now=clock)
    for step in range(100):
        quick.update(step + 1)
    assert len(caplog.messages) == 1 and numbers_in(caplog.messages[0])[0] == 100
    continued = ProgressLog("continued", 100, "steps", first=75, now=clock)
    for step in range(75, 100):
        clock.now += 1
        continued.update(step + 1)
    assert [numbers_in(line)[0] for line in caplog.messages[1:]] == [80, 90, 100]
    assert numbers_in(caplog.messages[1])[3] == 1  # steps of the earlier attempt do not count for the rate
    ProgressLog("nothing", 0, "steps", now=clock).update(0)
    assert len(caplog.messages) == 4


def test_durations():
    words = ["0 ms", "31.2 ms", "999 ms", "1 s", "1 s", "119 s", "2 min", "2 h 0 min", "2 days 1 h"]
    assert [format_duration(s) for s in (0, 0.0312, 0.9994, 0.9997, 1, 119.4, 120, 7200, 49 * 3600)] == words
    assert [format_seconds(s) for s in (0, 65.4, 3725, 360000)] == ["0:00", "1:05", "1:02:05", "100:00:00"]
