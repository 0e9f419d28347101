"""What the demo concludes from its runs. CI runs the whole demo on its own."""

import json

import pytest

from hpcssl import files
from hpcssl.errors import EXIT_DONE, EXIT_FAILED
from hpcssl.run_dir import RunDir
from slurm import demo


def write_run(root, preemptions=0, trained=95.0):
    """A finished run that was preempted some times, with the scores of an untrained and a trained encoder."""
    run = RunDir(root)
    lines = []
    for number in range(1, preemptions + 2):
        cause = "preempted" if number <= preemptions else "done"
        about = {"attempt": number, "job": "local-1", "restart": number - 1}
        lines += [about | {"event": "start", "first_step": 10 * number, "time": 1.0}]
        lines += [about | {"event": "end", "cause": cause, "time": 2.0}]
    files.atomic_write(run.attempts, "".join(json.dumps(line) + "\n" for line in lines))
    rows = [{"step": step, "metrics": {"knn20": knn, "one_label": 30.0}} for step, knn in ((0, 80.0), (9, trained))]
    files.atomic_write(run.eval_rows("knn"), "".join(json.dumps(row) + "\n" for row in rows))
    return run


@pytest.mark.parametrize(
    "digests, preemptions, trained, code",
    [
        ("aa", (1, 0), 95.0, EXIT_DONE),
        ("ab", (1, 0), 95.0, EXIT_FAILED),
        ("aa", (0, 0), 95.0, EXIT_FAILED),  # nothing was shown
        ("aa", (1, 1), 95.0, EXIT_FAILED),
        ("aa", (1, 0), 85.0, EXIT_FAILED),
    ],
)
def test_the_demo_fails_unless_digests_agree_and_the_encoder_has_learned(
    tmp_path, capsys, digests, preemptions, trained, code
):
    run = write_run(tmp_path / "demo", 1, trained)
    pair = [write_run(tmp_path / str(number), count) for number, count in enumerate(preemptions)]
    assert demo._judge(run, pair, [64 * digest for digest in digests], 1.0) == code
    printed = capsys.readouterr().out
    assert [line[:2] for line in printed.splitlines() if line[:1].isdigit()] == ["1.", "2.", "3.", "4.", "5."]
    assert str(run.root / demo.PAGE) in printed


@pytest.mark.parametrize(
    ("preemptions", "finished", "removed"),
    [((0, 0), True, True), ((1, 1), True, True), ((1, 0), True, False), ((0, 0), False, False)],
)
def test_runs_of_an_interrupted_demo_that_prove_nothing_start_again(tmp_path, preemptions, finished, removed):
    pair = [write_run(tmp_path / str(number), count) for number, count in enumerate(preemptions)]
    for run in pair if finished else []:
        files.write_record(run.done, {"step": 9, "weights": ""})
    demo._remove_unusable(pair)
    assert [run.root.exists() for run in pair] == [not removed] * 2
