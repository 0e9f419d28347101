"""``hpcssl.embed`` and ``hpcssl embed``: the features of the evaluations, resumable, with damaged images left out."""

import csv
import multiprocessing
import os
import signal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import hpcssl
from hpcssl.distributed.world import World
from hpcssl.errors import ConfigError, DataError, EvalError, ResumeError, Stopped
from hpcssl.evals.common.encoder import FrozenEncoder
from hpcssl.evals.common.extract import extract_features
from hpcssl.evals.common.options import FeatureOptions
from hpcssl.files import sha256_of_file
from hpcssl.inference import compute, embed, embeddings
from tests.inference.photographs import BROKEN
from tests.waiting import wait_for_exit


def test_features_of_shards_are_those_of_the_evaluations(run, shards):
    result = hpcssl.embed(run.root, shards.root, batch=16, devices="cpu")
    world = World.single_process()
    encoder = FrozenEncoder.open(run.weights_at(5), world)
    expected = extract_features(encoder, shards, FeatureOptions(forward_batch=16), world)
    np.testing.assert_array_equal(result.features, np.concatenate([part.numpy() for part in expected.parts]))
    assert result.labels.tolist() == shards.labels.tolist() and result.keys[3] == "p/003"
    assert result.classes == shards.classes and result.metadata["step"] == 5 and result.metadata["recipe"] == "mine"
    first = hpcssl.embed(run.root, shards.root, step="first", batch=16, devices="cpu")
    assert first.metadata["step"] == 0


def test_a_folder_and_single_images_have_the_same_features(run, photos):
    result = hpcssl.embed(run.root, photos, batch=1, normalize=True, skip_bad=2, devices="cpu")
    assert len(result) == 22 and result.labels is None and sorted(key for key, _ in result.damaged) == sorted(BROKEN)
    assert result.keys == sorted(result.keys) and not set(result.keys) & set(BROKEN)
    np.testing.assert_allclose(np.linalg.norm(result.features, axis=1), 1, rtol=1e-6)
    chosen = [3, 20]
    paths = [photos / result.keys[row] for row in chosen]
    few = hpcssl.embed(run.weights_at(5), paths, batch=1, normalize=True, devices="cpu")
    np.testing.assert_array_equal(few.features, result.features[chosen])


def test_both_formats_hold_names_labels_features_and_the_record(run, shards, tmp_path):
    table, array = (
        hpcssl.embed(run.root, shards.root, tmp_path / name, devices="cpu") for name in ("e.parquet", "e.npy")
    )
    for one in (table, array):
        assert one.keys == table.keys and one.labels.tolist() == shards.labels.tolist()
        assert one.metadata["weights_sha256"] == sha256_of_file(run.weights_at(5))
        assert (one.metadata["normalized"], one.metadata["mean"]) == (False, [0.5, 0.4, 0.3])
    np.testing.assert_array_equal(np.load(tmp_path / "e.npy"), table.features)
    schema = pq.read_schema(tmp_path / "e.parquet")
    assert schema.field("embedding").type == pa.list_(pa.float32(), table.features.shape[1])
    rows = [(row["label"], row["index"]) for row in csv.DictReader((tmp_path / "e.npy.csv").open())]
    assert rows == [(str(i % 2), str(i)) for i in range(40)] and table.index.tolist() == list(range(40))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["e.npy", "e.npy.csv", "e.npy.json", "e.parquet"]


@pytest.mark.parametrize("suffix", ["parquet", "npy"])
def test_a_killed_command_goes_on_and_writes_the_same_bytes(run, photos, tmp_path, monkeypatch, suffix):
    options = {"batch": 4, "skip_bad": 2, "devices": "cpu"}
    hpcssl.embed(run.root, photos, tmp_path / "whole" / f"e.{suffix}", **options)
    target, written = tmp_path / "killed" / f"e.{suffix}", []
    process = multiprocessing.get_context("fork").Process(
        target=killed_after_two_parts, args=(run.root, photos, target, options, monkeypatch)
    )
    process.start()
    assert wait_for_exit(process) == -signal.SIGKILL
    (parts,) = target.parent.iterdir()  # nothing but the parts
    damaged, *_ = sorted(parts.glob("*/part-*"))
    damaged.write_bytes(damaged.read_bytes()[:-1])  # is computed again
    write = compute.Part.write
    monkeypatch.setattr(compute.Part, "write", lambda part, path: written.append(path.name) or write(part, path))
    hpcssl.embed(run.root, photos, target, **options)
    assert written == [f"part-{number:05d}.safetensors" for number in (0, 2, 3, 4, 5)]
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (target.parent / path.name).read_bytes(), path.name
    assert len(list(target.parent.iterdir())) == len(list((tmp_path / "whole").iterdir()))


def killed_after_two_parts(weights, images, target, options, monkeypatch):
    write, parts = compute.Part.write, []

    def write_and_die(part, path):
        write(part, path)
        parts.append(path)
        if len(parts) == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(compute.Part, "write", write_and_die)
    hpcssl.embed(weights, images, target, **options)


def test_a_request_to_stop_keeps_parts_and_other_options_do_not_take_them(run, shards, tmp_path):
    target, asked = tmp_path / "e.npy", iter(range(9))
    with pytest.raises(Stopped) as stopped:
        hpcssl.embed(run.root, shards.root, target, batch=8, devices="cpu", stop=lambda: next(asked) == 2)
    assert stopped.value.exit_code == 75
    assert len(list(tmp_path.glob(".e.npy.parts/*/part-*"))) == 2
    hpcssl.embed(run.root, shards.root, target, batch=8, normalize=True, devices="cpu")
    assert not list(tmp_path.glob(".*"))  # the parts of the other options are gone, too
    read = hpcssl.embed(run.root, shards.root, target, batch=8, normalize=True, devices="cpu", stop=lambda: True)
    assert len(read) == 40  # it is there: nothing was computed
    with pytest.raises(ResumeError) as other:
        hpcssl.embed(run.root, shards.root, target, batch=8, devices="cpu")
    assert "normalized" in other.value.got and str(target) in other.value.what


def test_damaged_images_are_an_error_beyond_the_limit_and_are_listed(run, photos, tmp_path, run_command):
    words = ("embed", "--run", run.root, photos, "--to", tmp_path / "e.npy", "--devices", "cpu")
    code, _, _, error = run_command(*words, "--skip-bad", 1)
    assert code == 1 and all(name in error.got for name in BROKEN) and "--skip-bad 2" in error.fix
    assert not (tmp_path / "e.npy").exists()
    code, out, err, _ = run_command(*words, "--skip-bad", 2)
    assert code == 0 and "22" in out and "hpcssl search" in err
    rows = list(csv.DictReader((tmp_path / "e.npy.left_out.csv").open()))
    assert {row["name"]: row["broken"] for row in rows} == dict.fromkeys(BROKEN, "yes") | {
        "2018/._x.jpg": "no",
        "Thumbs.db": "no",
    }


def test_files_of_the_user_and_of_other_formats_stay(run, photos, tmp_path):
    mine = [tmp_path / name for name in ("e.csv", "e.json", "e.left_out.csv")]
    for path in mine:
        path.write_text("mine")
    for name in ("e.npy", "e.parquet"):
        hpcssl.embed(run.root, photos, tmp_path / name, skip_bad=2, devices="cpu")
    assert [path.read_text() for path in mine] == ["mine"] * 3
    assert {path.name for path in tmp_path.glob("*.*.left_out.csv")} == {"e.npy.left_out.csv", "e.parquet.left_out.csv"}


def test_one_process_writes_a_file_whatever_its_options(run, shards, tmp_path):
    target, others = tmp_path / "e.npy", []

    def embed_too():
        if not others:
            others.append("")
            with pytest.raises(ResumeError) as caught:
                hpcssl.embed(run.root, shards.root, target, normalize=True, devices="cpu")
            others.append(caught.value.what)
        return False

    result = hpcssl.embed(run.root, shards.root, target, devices="cpu", stop=embed_too)
    assert others[1:] == [f"--to {target}"] and not result.metadata["normalized"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["e.npy", "e.npy.csv", "e.npy.json"]


def test_a_file_that_another_process_wrote_meanwhile_is_not_written_again(run, shards, tmp_path, monkeypatch):
    target, make = tmp_path / "e.npy", embed.make_folder

    def write_first(folder):
        monkeypatch.setattr(embed, "make_folder", make)
        hpcssl.embed(run.root, shards.root, target, normalize=True, devices="cpu")
        make(folder)

    monkeypatch.setattr(embed, "make_folder", write_first)  # after the first look at the target, before the lock
    with pytest.raises(ResumeError) as caught:
        hpcssl.embed(run.root, shards.root, target, devices="cpu")
    assert "normalized" in caught.value.got and embeddings.read(target).metadata["normalized"]
    assert not list(tmp_path.glob(".*"))


def test_what_a_kill_after_the_last_write_left_is_removed(run, shards, tmp_path):
    target = tmp_path / "e.npy"
    hpcssl.embed(run.root, shards.root, target, devices="cpu")
    for name in (".e.npy.parts", "..e.npy.parts.0123abcd.tmp"):
        (tmp_path / name / "0").mkdir(parents=True)
        (tmp_path / name / "0" / "part-00000.safetensors").write_text("")
    (tmp_path / ".e.npy.csv.0123abcd.tmp").write_text("")
    hpcssl.embed(run.root, shards.root, target, devices="cpu")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["e.npy", "e.npy.csv", "e.npy.json"]


def test_a_stored_file_lacks_no_more_images_than_allowed(run, photos, tmp_path):
    options = {"to": tmp_path / "e.npy", "devices": "cpu"}
    assert hpcssl.embed(run.root, photos, skip_bad=2, **options).metadata["damaged"] == 2
    assert len(hpcssl.embed(run.root, photos, skip_bad=3, **options)) == 22
    with pytest.raises(DataError) as caught:
        hpcssl.embed(run.root, photos, skip_bad=1, **options)
    assert "--skip-bad 2" in caught.value.fix


def test_a_name_that_cannot_be_read_is_no_name(run, make_shards, picture, encode, tmp_path):
    source = make_shards(tmp_path / "shards", [(f"{i}", encode(picture(i, 16, 16)), 0) for i in range(8)])
    path = source.path(0)
    header = int(source.rows["header"][3])
    body = bytearray(path.read_bytes())
    body[header : header + 512] = b"x" * 512
    path.write_bytes(body)
    with pytest.raises(DataError) as caught:
        hpcssl.embed(run.root, source.root, tmp_path / "e.npy", devices="cpu")
    assert str(source.root) in caught.value.what and not (tmp_path / "e.npy").exists()


def test_mistakes_are_refused_and_leave_nothing(run, photos, shards, tmp_path, run_command):
    (tmp_path / "empty").mkdir()
    whole = tmp_path / "both" / "train"
    whole.mkdir(parents=True)
    (whole / "index.json").write_text("{}")
    for images, word in (("nowhere", "nowhere"), ("empty", "no image"), ("both", "train")):
        with pytest.raises(DataError) as caught:
            hpcssl.embed(run.root, tmp_path / images, tmp_path / "e.npy", devices="cpu")
        assert word in caught.value.what + caught.value.got
    for options, kind, what in (
        ({"to": tmp_path / "e.csv"}, ConfigError, "e.csv"),
        ({"precision": "fp8"}, ConfigError, "precision"),
        ({"batch": 0}, ConfigError, "batch"),
        ({"step": 7}, EvalError, "weights"),
    ):
        with pytest.raises(kind) as caught:
            hpcssl.embed(run.root, shards.root, **{"to": tmp_path / "e.npy", "devices": "cpu"} | options)
        assert what in caught.value.what
    with pytest.raises(DataError) as nothing:
        hpcssl.embed(run.root, [], devices="cpu")
    assert nothing.value.what == "images" and "empty" in nothing.value.got
    with pytest.raises(ConfigError):
        hpcssl.embed(run.weights_at(5), shards.root, step=5)
    for words, what in (
        ((), "hpcssl embed"),
        (("--weights", run.root), "--weights"),
        (("--run", run.root, "--size", 3), "hpcssl"),
        (("--run", run.root, "--devices", "gpuu"), "--devices"),
        (("--weights", run.weights_at(5), "--step", 0), "hpcssl embed"),
    ):
        code, _, _, error = run_command("embed", photos, "--to", tmp_path / "e.npy", *words)
        assert code == 2 and error.what.startswith(what), error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["both", "empty"]


def test_a_file_of_another_program_is_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((2, 3), np.float32))
    (tmp_path / "a.npy.json").write_text("{}")
    (tmp_path / "b.parquet").write_bytes(b"PAR1")
    for name in ("a.npy", "b.parquet", "c.parquet"):
        with pytest.raises(DataError) as caught:
            embeddings.read(tmp_path / name)
        assert name in caught.value.what


def test_load_backbone_takes_a_run_folder_and_a_step(run):
    for step, number in (("last", 5), ("first", 0), (0, 0)):
        backbone, _ = hpcssl.load_backbone(run.root, step=step)
        same, _ = hpcssl.load_backbone(run.weights_at(number))
        equal = [bool((a == b).all()) for a, b in zip(backbone.parameters(), same.parameters(), strict=True)]
        assert all(equal)
        assert not torch.equal(backbone.conv1.weight, hpcssl.load_backbone(run.weights_at(5 - number))[0].conv1.weight)
    with pytest.raises(EvalError):
        hpcssl.load_backbone(run.root, step=3)
    with pytest.raises(ConfigError):
        hpcssl.load_backbone(run.weights_at(5), step=5)
