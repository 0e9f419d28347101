"""``hpcssl track``: only durable steps, each exactly once, in a tracker in memory and in real local ones."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import sqlite3
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from hpcssl import files
from hpcssl.cli import main
from hpcssl.errors import ConfigError
from hpcssl.run_dir import RunDir
from hpcssl.tracking import backends, pending, sender

ROOT = Path(__file__).resolve().parents[2]


def make_run(root, *, steps=20, durable=None, finished=False):
    """A run with a score every ten steps, and a checkpoint at ``durable``."""
    run = RunDir(root)
    files.atomic_write(run.config, json.dumps({"name": "it", "optim": {"lr": 0.1, "batch": 8}}))
    write_journal(run, steps)
    if durable is not None:
        write_checkpoint(run, durable)
    if finished:
        files.write_record(run.done, {"step": steps, "weights": ""})
    return run


def write_journal(run, steps, shift=0.0):
    lines = [{"step": 0, "eval": True, "knn20": 50.0}]
    for step in range(1, steps + 1):
        lines.append({"step": step, "loss": "nan" if step == 3 else 1 / step + shift, "images_per_s": 10.0 * step})
        lines += [{"step": step, "eval": True, "knn20": 50.0 + step}] if step % 10 == 0 else []
    files.atomic_write(run.journal, "".join(json.dumps(line) + "\n" for line in lines))


def write_checkpoint(run, step, part="whole"):
    folder = run.checkpoint(step)
    files.atomic_write(folder / "part-0.safetensors", part)
    parts = [{"file": "part-0.safetensors", "bytes": 5}]
    files.write_record(folder / "manifest.json", {"step": step, "parts": parts})


class MemoryTracker:
    """Keeps every value that it is sent, and breaks before or after a batch on request.

    Args:
        received: Values by step, in the order of their arrival; survives the process.
        fail: ``before``, ``middle`` or ``after`` the batch is stored; empty for never.
    """

    destination = "memory"

    def __init__(self, received: list[tuple[int, dict[str, float]]], fail: str = ""):
        self.received, self.fail = received, fail

    def recover(self, first, last):
        return max([step for step, _ in self.received if first <= step <= last], default=first - 1)

    def send(self, steps):
        if self.fail == "before":
            raise KeyboardInterrupt
        for k, step in enumerate(steps):
            if self.fail == "middle" and k == len(steps) // 2:
                raise KeyboardInterrupt
            self.received.append((step.step, step.values))
        if self.fail == "after":
            raise KeyboardInterrupt


def test_only_steps_that_a_checkpoint_covers_are_sent(tmp_path):
    run, received = make_run(tmp_path / "run"), []
    assert sender.send_pending(run, "memory", MemoryTracker(received)) == 0, "no checkpoint yet"
    write_checkpoint(run, 8)
    assert sender.send_pending(run, "memory", MemoryTracker(received)) == 9
    assert [step for step, _ in received] == list(range(9))
    assert received[0] == (0, {"eval/knn20": 50.0}) and received[1] == (1, {"loss": 1.0, "images_per_s": 10.0})
    assert math.isnan(received[3][1]["loss"])
    write_checkpoint(run, 12, part="cut")  # a part that has not the size that the manifest says
    (run.checkpoint(15)).mkdir()  # a save that was not completed
    assert sender.send_pending(run, "memory", MemoryTracker(received)) == 0
    write_checkpoint(run, 12)
    assert sender.send_pending(run, "memory", MemoryTracker(received)) == 4
    assert received[10] == (10, {"loss": 0.1, "images_per_s": 100.0, "eval/knn20": 60.0}), "one record per step"


def test_a_step_waits_for_its_evaluation(tmp_path):
    run, received = make_run(tmp_path / "run", steps=10, durable=10), []
    whole = run.journal.read_text()
    files.atomic_write(run.journal, whole[: whole.rindex('{"step": 10, "eval"')])
    sender.send_pending(run, "memory", MemoryTracker(received))
    assert received[-1][0] == 9, "the evaluation of step 10 may still run"
    files.atomic_write(run.journal, whole)
    assert sender.send_pending(run, "memory", MemoryTracker(received)) == 0
    files.write_record(run.done, {"step": 10, "weights": ""})
    assert sender.send_pending(run, "memory", MemoryTracker(received)) == 1
    assert received[-1] == (10, {"loss": 0.1, "images_per_s": 100.0, "eval/knn20": 60.0})


def test_a_requeue_rewinds_no_curve(tmp_path):
    run, received = make_run(tmp_path / "run", steps=15, durable=8), []
    sender.send_pending(run, "memory", MemoryTracker(received))
    write_journal(run, 8)  # the resumed attempt has cut its journal to the checkpoint
    assert sender.send_pending(run, "memory", MemoryTracker(received)) == 0
    write_journal(run, 20)
    write_checkpoint(run, 16)
    sender.send_pending(run, "memory", MemoryTracker(received))
    assert [step for step, _ in received] == list(range(17))


@pytest.mark.parametrize("fail", ["before", "middle", "after"])
def test_each_step_arrives_once_however_often_the_sender_is_interrupted(tmp_path, monkeypatch, fail):
    monkeypatch.setattr(sender, "MAX_STEPS", 7)
    run, received = make_run(tmp_path / "run", steps=40, durable=40, finished=True), []
    for _ in range(4):
        with pytest.raises(KeyboardInterrupt):
            sender.send_pending(run, "memory", MemoryTracker(received, fail))
        sender.send_pending(run, "memory", MemoryTracker(received)) if fail == "before" else None
        if fail == "before":
            break
    sender.send_pending(run, "memory", MemoryTracker(received))
    assert [step for step, _ in received] == list(range(41))


def test_a_cursor_that_cannot_be_written_is_no_second_transmission(tmp_path, monkeypatch):
    run, received = make_run(tmp_path / "run", steps=10, durable=10, finished=True), []
    write = files.write_record

    def fail_after_the_batch(path, record, **options):
        if record["sending"] is None:
            raise OSError(28, "No space left on device")
        write(path, record, **options)

    monkeypatch.setattr(files, "write_record", fail_after_the_batch)
    with pytest.raises(OSError, match="No space"):
        sender.send_pending(run, "memory", MemoryTracker(received))
    monkeypatch.undo()
    assert sender.send_pending(run, "memory", MemoryTracker(received)) == 0
    assert [step for step, _ in received] == list(range(11))


def test_what_would_send_twice_is_refused(tmp_path):
    run, received = make_run(tmp_path / "run", durable=8), []
    sender.send_pending(run, "memory", MemoryTracker(received))
    other = MemoryTracker([])
    other.destination = "elsewhere"
    with pytest.raises(ConfigError) as moved:
        sender.send_pending(run, "memory", other)
    assert "memory" in moved.value.got and moved.value.expected == "elsewhere"
    with sender._only_sender(run.tracking("memory")), pytest.raises(ConfigError) as second:
        sender.send_pending(run, "memory", MemoryTracker(received))
    assert "another process" in second.value.got
    run.tracking("memory").write_text("{}")
    with pytest.raises(ConfigError) as damaged:
        sender.send_pending(run, "memory", MemoryTracker(received))
    assert "damaged" in damaged.value.got and len(received) == 9


def test_following_ends_with_the_run(tmp_path):
    run, received, counts = make_run(tmp_path / "run", durable=8), [], []

    def sleep(seconds):
        assert seconds == 5.0
        write_checkpoint(run, 20)
        files.write_record(run.done, {"step": 20, "weights": ""})

    sender.send_until_finished(run, "memory", MemoryTracker(received), counts.append, every=5.0, sleep=sleep)
    assert counts == [9, 12] and [step for step, _ in received] == list(range(21))


def test_the_end_of_a_long_journal_is_read_backward(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run", steps=300, durable=300, finished=True)
    parsed = []
    real = pending.parse_record
    monkeypatch.setattr(pending, "parse_record", lambda *words: parsed.append(1) or real(*words))
    assert [s.step for s in pending.read_pending(run, 297)] == [298, 299, 300] and len(parsed) < 8


def test_an_unknown_tracker_and_a_missing_package_are_refused(tmp_path, monkeypatch, capsys):
    run = make_run(tmp_path / "run")
    with pytest.raises(ConfigError) as unknown:
        backends.open_tracker("other", run, {}, project="p", where="")
    assert unknown.value.what == "--to" and unknown.value.expected == "mlflow, trackio, wandb"
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(SystemExit) as ended:
        main(["track", str(run.root), "--to", "mlflow"])
    assert ended.value.code == 2 and "hpcssl[track-mlflow]" in capsys.readouterr().err


def test_tracking_imports_no_torch():
    code = "import sys, hpcssl.cli, hpcssl.tracking.backends, hpcssl.tracking.sender; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})


# -- real trackers, without a server ------------------------------------------------------------------------


def interrupt_after(tracker):
    """Let the next batch be stored but not confirmed, as if the process was killed in between."""
    send = tracker.send

    def stored_and_killed(steps):
        send(steps)
        raise KeyboardInterrupt

    tracker.send = stored_and_killed
    return tracker


def test_mlflow_with_sqlite_has_each_step_once(tmp_path):
    mlflow = pytest.importorskip("mlflow", reason="needs hpcssl[track-mlflow]")
    run = make_run(tmp_path / "run", durable=8)
    address = f"sqlite:///{tmp_path / 'mlflow.db'}"

    def open_it():
        return backends.open_tracker("mlflow", run, {"optim": {"lr": 0.1}}, project="p", where=address)

    with pytest.raises(KeyboardInterrupt):
        sender.send_pending(run, "mlflow", interrupt_after(open_it()))
    assert sender.send_pending(run, "mlflow", open_it()) == 9
    write_checkpoint(run, 20)
    files.write_record(run.done, {"step": 20, "weights": ""})
    assert sender.send_pending(run, "mlflow", open_it()) == 12
    client = mlflow.MlflowClient(address)
    (found,) = client.search_runs([client.get_experiment_by_name("p").experiment_id])
    assert found.data.params["optim.lr"] == "0.1"
    loss = client.get_metric_history(found.info.run_id, "loss")
    assert sorted(m.step for m in loss) == list(range(1, 21))
    values = {m.step: m.value for m in loss}
    assert values[7] == 1 / 7 and math.isnan(values[3])
    assert sorted(m.step for m in client.get_metric_history(found.info.run_id, "eval/knn20")) == [0, 10, 20]


def test_trackio_with_a_local_store_has_each_step_once(tmp_path, monkeypatch):
    if importlib.util.find_spec("trackio") is None:  # it reads its folder when it is imported
        pytest.skip("needs hpcssl[track-trackio]")
    monkeypatch.setenv("TRACKIO_DIR", "")
    run = make_run(tmp_path / "run", durable=8)

    def open_it():
        return backends.open_tracker("trackio", run, {"optim": {"lr": 0.1}}, project="p", where=str(tmp_path / "store"))

    with pytest.raises(KeyboardInterrupt):
        sender.send_pending(run, "trackio", interrupt_after(open_it()))
    assert sender.send_pending(run, "trackio", open_it()) == 9
    write_checkpoint(run, 20)
    files.write_record(run.done, {"step": 20, "weights": ""})
    assert sender.send_pending(run, "trackio", open_it()) == 12
    (database,) = (tmp_path / "store").rglob("*.db")
    with sqlite3.connect(database) as store:
        rows = store.execute("select run_name, step, metrics from metrics").fetchall()
        ((recipe,),) = store.execute("select config from configs").fetchall()
    assert sorted(step for _, step, _ in rows) == list(range(21)) and {name for name, _, _ in rows} == {"run"}
    values = {step: json.loads(text) for _, step, text in rows}
    assert values[7]["loss"] == 1 / 7 and values[10]["eval/knn20"] == 60.0
    assert json.loads(recipe) == {"optim.lr": "0.1"}
    with pytest.raises(ConfigError) as caught:
        backends.open_tracker("trackio", run, {}, project="p", where="https://x.example")
    assert caught.value.what == "--where"


def read_wandb_file(path):
    """The records of a file of W&B: a header of 7 bytes, then the log format of LevelDB in blocks of 32 KiB."""
    body, position, record = path.read_bytes(), 7, b""
    assert body[:4] == b":W&B"
    while position + 7 <= len(body):
        if (rest := 32768 - position % 32768) < 7:
            position += rest
            continue
        _, size, kind = struct.unpack_from("<IHB", body, position)
        record += body[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):  # a whole record, or the last part of one
            yield record
            record = b""


def test_wandb_offline_has_each_step_once(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="needs hpcssl[track-wandb]")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    run = make_run(tmp_path / "run", durable=8)

    def open_it():
        return backends.open_tracker("wandb", run, {"optim": {"lr": 0.1}}, project="p", where="offline")

    with pytest.raises(KeyboardInterrupt):
        sender.send_pending(run, "wandb", interrupt_after(open_it()))
    assert sender.send_pending(run, "wandb", open_it()) == 9
    write_checkpoint(run, 20)
    files.write_record(run.done, {"step": 20, "weights": ""})
    assert sender.send_pending(run, "wandb", open_it()) == 12
    from wandb.proto import wandb_internal_pb2

    steps = []
    for path in run.root.rglob("*.wandb"):
        for data in read_wandb_file(path):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "history":
                values = {i.key or ".".join(i.nested_key): i.value_json for i in record.history.item}
                steps.append((int(values["_step"]), values.get("loss")))
    assert sorted(step for step, _ in steps) == list(range(21))
    assert float(dict(steps)[7]) == 1 / 7


def test_pending_steps_are_read_once_however_many_batches_they_make(tmp_path, monkeypatch):
    run, received, reads = make_run(tmp_path / "run", steps=40, durable=40, finished=True), [], []
    read = sender.read_pending
    monkeypatch.setattr(sender, "MAX_STEPS", 7)
    monkeypatch.setattr(sender, "read_pending", lambda run, last: reads.append(last) or read(run, last))
    assert sender.send_pending(run, "memory", MemoryTracker(received)) == 41
    assert [step for step, _ in received] == list(range(41)) and reads == [-1, 40]


class MLflowClient:
    """As much of MLflow as keeps a run and its parameters. ``fail``: break before parameters are stored."""

    def __init__(self):
        self.runs, self.parameters, self.fail = [], {}, False

    def get_experiment_by_name(self, name):
        return SimpleNamespace(experiment_id=name)

    def search_runs(self, *_arguments, **_options):
        return self.runs

    def create_run(self, *_arguments, **_options):
        self.runs.append(SimpleNamespace(info=SimpleNamespace(run_id="1")))
        return self.runs[0]

    def log_batch(self, run, params):
        if self.fail:
            raise KeyboardInterrupt
        self.parameters |= dict(params)


def test_a_run_whose_creation_was_interrupted_gets_its_parameters(tmp_path, monkeypatch):
    client = MLflowClient()
    module = SimpleNamespace(
        MlflowClient=lambda _where: client, entities=SimpleNamespace(Param=lambda key, value: (key, value))
    )
    monkeypatch.setattr(backends, "_import", lambda _name: module)
    run, recipe = make_run(tmp_path / "run"), {"optim": {"lr": 0.1}}
    client.fail = True
    with pytest.raises(KeyboardInterrupt):
        backends.open_tracker("mlflow", run, recipe, project="p", where="")
    client.fail = False
    backends.open_tracker("mlflow", run, recipe, project="p", where="")
    assert len(client.runs) == 1 and client.parameters == {"optim.lr": "0.1"}


def test_a_session_that_cannot_be_removed_is_an_error(tmp_path, monkeypatch):
    """Its files would be sent beside those of the repeated batch."""
    monkeypatch.setattr(backends, "_import", lambda _name: None)
    run = make_run(tmp_path / "run")
    tracker = backends.open_tracker("wandb", run, {}, project="p", where="offline")
    assert tracker.recover(1, 5) == 0, "no session was begun"
    (run.tracking("wandb").with_suffix("") / "until-00000005").mkdir(parents=True)

    def refuse(_path):
        raise PermissionError

    with monkeypatch.context() as patch:
        patch.setattr(backends.shutil, "rmtree", refuse)
        with pytest.raises(PermissionError):
            tracker.recover(1, 5)
    assert tracker.recover(1, 5) == 0 and not list(run.tracking("wandb").with_suffix("").iterdir())


def test_a_folder_that_is_no_run_is_refused(tmp_path, capsys):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(SystemExit) as ended:
            main(["track", str(folder), "--to", "mlflow"])
        assert ended.value.code == 1 and f"run folder {folder}" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
