"""``python -m benchmarks gpu``: goes on where it was cut, merges its pieces, and fails where a result is wrong."""

import json
import subprocess
import sys

import pytest

from benchmarks.gpu import __main__ as gpu


@pytest.fixture
def run(monkeypatch, tmp_path):
    calls = []

    def piece(name, result):
        def measure(_bench):
            calls.append(name)
            if isinstance(result, BaseException):
                raise result
            return result

        return measure

    def run(pieces, *options):
        monkeypatch.setattr(gpu, "PIECES", {name: piece(name, result) for name, result in pieces.items()})
        monkeypatch.setattr(sys, "argv", ["gpu", "--device", "cpu", "--tiny", "--out", str(tmp_path), *options])
        calls.clear()
        return gpu.main(), list(calls)

    run.folder = tmp_path
    return run


def test_a_cut_run_goes_on_with_the_missing_pieces(run):
    pieces = {"correct": {"failures": []}, "bank": KeyboardInterrupt(), "ema": {"ms": 1.0}}
    with pytest.raises(KeyboardInterrupt):
        run(pieces)
    merged = json.loads((run.folder / "gpu.json").read_text())
    assert list(merged["pieces"]) == ["correct"] and merged["missing"] == ["bank", "ema"]
    pieces["bank"] = {"ms": 2.0}
    assert run(pieces) == (0, ["bank", "ema"])
    merged = json.loads((run.folder / "gpu.json").read_text())
    assert merged["missing"] == [] and merged["pieces"]["bank"]["result"] == {"ms": 2.0}
    assert run(pieces, "--only", "ema", "--again") == (0, ["ema"])


def test_a_wrong_result_fails_the_run_each_time(run):
    pieces = {"correct": {"failures": ["recall_fp32_exact: 0.9"]}, "ema": {"ms": 1.0}}
    assert run(pieces) == (1, ["correct", "ema"])
    assert run(pieces) == (1, [])


@pytest.mark.full
def test_every_piece_runs_on_a_cpu(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "gpu", "--device", "cpu", "--tiny", "--out", str(tmp_path)]
    subprocess.run(command, check=True, timeout=900)
    assert json.loads((tmp_path / "gpu.json").read_text())["missing"] == []
