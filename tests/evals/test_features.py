"""Features: equal to those of single images on any number of ranks, resumable, and checked."""

import io
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from hpcssl.distributed.world import World
from hpcssl.errors import EXIT_STOPPED, EvalError, Stopped
from hpcssl.evals.common import feature_cache
from hpcssl.evals.common.encoder import FrozenEncoder
from hpcssl.evals.common.extract import extract_features
from hpcssl.evals.common.features import Features
from hpcssl.evals.common.options import FeatureOptions
from hpcssl.nets import tensor_file, weights
from tests.tolerances import rounding

SINGLE = World.single_process()
OPTIONS = FeatureOptions(forward_batch=8)


@pytest.fixture(autouse=True)
def few_parts(monkeypatch):
    monkeypatch.setattr(feature_cache, "PARTS", 5)  # 90 images are then parts of 24, 24, 24 and 18


@pytest.fixture
def encoder(weights_file):
    return FrozenEncoder.open(weights_file, SINGLE)


def literal(path, data):
    """Compute features one image at a time, with PIL and ImageNet's normalization."""
    backbone, _ = weights.load(path)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    rows = []
    for row in data.rows:
        with open(data.path(int(row["shard"])), "rb") as file:
            file.seek(int(row["offset"]))
            image = np.array(Image.open(io.BytesIO(file.read(int(row["size"])))))
        x = (torch.from_numpy(image).float() / 255 - mean) / std
        rows.append(backbone(x.permute(2, 0, 1)[None])[0])
    return torch.stack(rows)


def test_features_are_the_output_of_the_backbone_for_each_image_in_index_order(encoder, weights_file, data):
    for shards, parts in zip(data, ([24, 24, 24, 18], [16, 16, 16, 12]), strict=True):
        features = extract_features(encoder, shards, OPTIONS, SINGLE)
        assert [len(p) for p in features.parts] == parts
        assert torch.equal(features.labels, torch.as_tensor(shards.labels)) and len(features) == len(shards)
        expected = literal(weights_file, shards)
        # convolutions add 27 + 3 * 288 + 2 * 576 + 1152 numbers, the pooling 16
        tolerance = rounding(torch.float32, 3_211, scale=float(expected.abs().max()))
        torch.testing.assert_close(torch.cat(features.parts), expected, rtol=0, atol=tolerance)
        index = torch.tensor([40, 3, 3, len(shards) - 1])
        assert torch.equal(features.rows(index), torch.cat(features.parts)[index])


def test_moments_are_those_of_unit_rows():
    rows = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)) + 2
    mean, var = Features(list(rows.split(7)), np.zeros(50)).moments
    expected_var, expected_mean = torch.var_mean(rows / rows.norm(dim=1, keepdim=True), dim=0)
    torch.testing.assert_close(mean, expected_mean, rtol=0, atol=rounding(torch.float32, 60))
    torch.testing.assert_close(var, expected_var, rtol=0, atol=rounding(torch.float32, 120))


@pytest.mark.parametrize("cached", [False, True])
def test_worlds_of_1_2_and_4_give_the_same_bits(cached, encoder, data, weights_file, run_ranks, tmp_path):
    reference = torch.cat(extract_features(encoder, data[0], OPTIONS, SINGLE).parts)
    for size in (2, 4):
        root = tmp_path / str(size) if cached else None
        for rows in run_ranks(size, whole_set, weights_file, data[0], root, 2):
            assert torch.equal(torch.from_numpy(rows), reference)


def whole_set(world, path, shards, root, threads):
    features = extract_features(FrozenEncoder.open(path, world), shards, OPTIONS, world, root=root, threads=threads)
    return torch.cat(features.parts).numpy()


def test_a_stopped_extraction_keeps_finished_parts(encoder, data, tmp_path):
    calls = iter(range(10**6))
    with pytest.raises(Stopped) as stopped:
        extract_features(encoder, data[0], OPTIONS, SINGLE, root=tmp_path, stop=lambda: next(calls) >= 7)
    assert stopped.value.exit_code == EXIT_STOPPED == 75
    [folder] = tmp_path.iterdir()
    kept = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert 0 < len(kept) < 4
    again = extract_features(encoder, data[0], OPTIONS, SINGLE, root=tmp_path)
    assert all(path.stat().st_mtime_ns == before for path, before in kept.items())
    assert torch.equal(torch.cat(again.parts), torch.cat(extract_features(encoder, data[0], OPTIONS, SINGLE).parts))


def test_damaged_parts_and_parts_of_other_options_are_not_reused(encoder, data, tmp_path, caplog):
    first = torch.cat(extract_features(encoder, data[0], OPTIONS, SINGLE, root=tmp_path).parts).clone()
    [folder] = tmp_path.iterdir()
    part = folder / "part-00002.safetensors"
    body = part.read_bytes()
    os.unlink(part)
    part.write_bytes(body[:-20])
    assert torch.equal(torch.cat(extract_features(encoder, data[0], OPTIONS, SINGLE, root=tmp_path).parts), first)
    os.unlink(part)
    part.write_bytes(body[:-1] + bytes([body[-1] ^ 4]))
    assert torch.equal(torch.cat(extract_features(encoder, data[0], OPTIONS, SINGLE, root=tmp_path).parts), first)
    assert str(part) in caplog.text and part.read_bytes() == body
    extract_features(encoder, data[0], FeatureOptions(forward_batch=9), SINGLE, root=tmp_path)
    extract_features(encoder, data[0], FeatureOptions(forward_batch=8, view="eval"), SINGLE, root=tmp_path)
    extract_features(encoder, data[1], OPTIONS, SINGLE, root=tmp_path)
    assert len(list(tmp_path.iterdir())) == 4  # each combination has a folder


def test_the_default_view_depends_on_the_image_size(encoder):
    assert encoder.view(OPTIONS).name == "eval_whole" and encoder.view(FeatureOptions(view="eval")).augment.zoom > 1.1
    large = FrozenEncoder(encoder.backbone, encoder.meta | {"size": 224}, encoder.sha256, encoder.path)
    assert large.view(OPTIONS).name == "eval" and large.view(OPTIONS).size == 224


def test_half_precision_features_are_the_rounded_ones_in_memory_in_files_and_on_ranks(
    encoder, data, run_ranks, tmp_path
):
    full = extract_features(encoder, data[0], OPTIONS, SINGLE)
    half = FeatureOptions(forward_batch=8, feature_dtype="fp16")
    for features in (
        extract_features(encoder, data[0], half, SINGLE),
        extract_features(encoder, data[0], half, SINGLE, root=tmp_path),
    ):
        assert all(torch.equal(a, b.half()) for a, b in zip(features.parts, full.parts, strict=True))
    assert next(tmp_path.rglob("part-00000*")).stat().st_size < 2 * full.parts[0].numel() + 300
    for parts in run_ranks(2, half_parts, encoder.path, data[0]):
        assert all(torch.equal(a, b.half()) for a, b in zip(parts, full.parts, strict=True))
    with pytest.raises(EvalError) as caught:
        extract_features(LargeFeatures(encoder), data[0], half, SINGLE)
    assert "65504" in caught.value.got and "feature_dtype=fp32" in caught.value.fix


def half_parts(world, path, shards):
    return extract_features(
        FrozenEncoder.open(path, world), shards, FeatureOptions(forward_batch=8, feature_dtype="fp16"), world
    ).parts


class LargeFeatures:
    """An encoder whose features are too large for fp16."""

    def __init__(self, encoder):
        self._encoder = encoder

    def __getattr__(self, name):
        return getattr(self._encoder, name)

    def encode(self, *args):
        return self._encoder.encode(*args) * 1e6


def test_bf16_features_are_close_to_fp32(encoder, data):
    exact, low = (
        F.normalize(torch.cat(extract_features(encoder, data[1], FeatureOptions(precision=p), SINGLE).parts))
        for p in ("fp32", "bf16")
    )
    assert low.dtype == torch.float32 and not torch.equal(exact, low)
    # the inputs, weights and results of seven convolutions are rounded; entries of unit rows are about 1 / sqrt(128)
    torch.testing.assert_close(low, exact, rtol=0, atol=rounding(torch.bfloat16, 21, scale=128**-0.5))


def test_features_that_are_not_finite_are_an_error_on_every_rank(encoder, data, weights_file, run_ranks, tmp_path):
    backbone, meta = weights.load(weights_file)
    backbone.layer3[0].bn2.bias.fill_(float("nan"))
    kept = ("mean", "std", "size", "fingerprint", "step", "method")
    weights.save(tmp_path / "bad", backbone, meta["arch"], **{k: meta[k] for k in kept})
    for error in run_ranks(2, error_of, tmp_path / "bad", data[0]):
        assert error.what == f"features by {tmp_path / 'bad'}" and "NaN" in error.got and "earlier step" in error.fix


def test_features_above_the_range_of_fp16_are_not_called_a_divergence(encoder):
    with pytest.raises(EvalError) as caught:
        encoder.check_finite(torch.tensor([[1.0], [float("inf")]]), ["a", "b"], "fp16")
    assert "for b" in caught.value.got and "fp32" in caught.value.fix and "step" not in caught.value.fix


def test_a_damaged_image_is_an_error_on_every_rank_and_not_replaced(
    encoder, data, weights_file, run_ranks, write_shards, tmp_path
):
    shards = write_shards(tmp_path / "s", np.zeros((20, 16, 16, 3), np.uint8), np.zeros(20, int))
    row = shards.rows[13]
    with open(shards.path(0), "r+b") as file:
        file.seek(int(row["offset"]))
        file.write(bytes(int(row["size"])))
    for error in run_ranks(2, error_of, weights_file, shards):
        assert "00013" in error.what + error.got and "hpcssl-shard verify" in error.fix


def error_of(world, path, shards):
    try:
        extract_features(FrozenEncoder.open(path, world), shards, OPTIONS, world)
    except EvalError as error:
        return error
    return None


def test_a_full_disk_is_an_error_of_the_evaluation(encoder, data, tmp_path, monkeypatch):
    def full(path, _):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(tensor_file.files, "atomic_write", full)
    with pytest.raises(EvalError) as caught:
        extract_features(encoder, data[0], OPTIONS, SINGLE, root=tmp_path)
    assert caught.value.what.startswith(str(tmp_path)) and caught.value.got == "No space left on device"
