import io
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from hpcssl.errors import EvalError
from hpcssl.evals import cache
from hpcssl.evals.features import Encoder, FeatureOptions, Features, extract
from hpcssl.evals.together import Stopped
from hpcssl.nets import weights
from hpcssl.world import World

ALONE = World.alone()
OPTIONS = FeatureOptions(batch=8)


@pytest.fixture(autouse=True)
def few_parts(monkeypatch):
    monkeypatch.setattr(cache, "PARTS", 5)  # 90 images are then parts of 24, 24, 24 and 18


@pytest.fixture
def encoder(weights_file):
    return Encoder.open(weights_file, ALONE)


def literal(path, data):
    """The features with nothing of ours but the weights: PIL, ImageNet's normalisation, one image at a time."""
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


def test_features_are_the_backbones_of_each_image_in_index_order(encoder, weights_file, data):
    for shards, parts in zip(data, ([24, 24, 24, 18], [16, 16, 16, 12]), strict=True):
        found = extract(encoder, shards, OPTIONS, ALONE)
        assert [len(p) for p in found.parts] == parts
        assert torch.equal(found.labels, torch.as_tensor(shards.labels)) and len(found) == len(shards)
        expected = literal(weights_file, shards)
        torch.testing.assert_close(torch.cat(found.parts), expected, rtol=1e-5, atol=1e-5)
        index = torch.tensor([40, 3, 3, len(shards) - 1])
        assert torch.equal(found.rows(index), torch.cat(found.parts)[index])


def test_moments_are_those_of_unit_rows():
    rows = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)) + 2
    mean, var = Features(list(rows.split(7)), np.zeros(50)).moments
    expected_var, expected_mean = torch.var_mean(rows / rows.norm(dim=1, keepdim=True), dim=0)
    torch.testing.assert_close(mean, expected_mean)
    torch.testing.assert_close(var, expected_var)


@pytest.mark.parametrize("cached", [False, True])
def test_worlds_of_1_2_and_4_give_the_same_bits(cached, encoder, data, weights_file, ranks, tmp_path):
    alone = torch.cat(extract(encoder, data[0], OPTIONS, ALONE).parts)
    for size in (2, 4):
        root = tmp_path / str(size) if cached else None
        for found in ranks(size, whole_set, weights_file, data[0], root, 2):
            assert torch.equal(torch.from_numpy(found), alone)


def whole_set(world, path, shards, root, threads):
    found = extract(Encoder.open(path, world), shards, OPTIONS, world, root=root, threads=threads)
    return torch.cat(found.parts).numpy()


def test_stopped_half_way_and_run_again_keeps_what_is_finished(encoder, data, tmp_path):
    calls = iter(range(10**6))
    with pytest.raises(Stopped) as stopped:
        extract(encoder, data[0], OPTIONS, ALONE, root=tmp_path, stop=lambda: next(calls) >= 7)
    assert stopped.value.exit_code == 75
    [folder] = tmp_path.iterdir()
    kept = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert 0 < len(kept) < 4
    again = extract(encoder, data[0], OPTIONS, ALONE, root=tmp_path)
    assert all(path.stat().st_mtime_ns == before for path, before in kept.items())
    assert torch.equal(torch.cat(again.parts), torch.cat(extract(encoder, data[0], OPTIONS, ALONE).parts))


def test_a_damaged_or_foreign_cache_is_computed_again(encoder, data, tmp_path):
    first = torch.cat(extract(encoder, data[0], OPTIONS, ALONE, root=tmp_path).parts).clone()
    [folder] = tmp_path.iterdir()
    part = folder / "part-00002.safetensors"
    body = part.read_bytes()
    os.unlink(part)
    part.write_bytes(body[:-20])
    assert torch.equal(torch.cat(extract(encoder, data[0], OPTIONS, ALONE, root=tmp_path).parts), first)
    extract(encoder, data[0], FeatureOptions(batch=9), ALONE, root=tmp_path)
    extract(encoder, data[0], FeatureOptions(batch=8, view="eval"), ALONE, root=tmp_path)
    extract(encoder, data[1], OPTIONS, ALONE, root=tmp_path)
    assert len(list(tmp_path.iterdir())) == 4  # each under a name of its own


def test_the_view_follows_the_size_and_can_be_named(encoder):
    assert encoder.view(OPTIONS).name == "eval_whole" and encoder.view(FeatureOptions(view="eval")).augment.zoom > 1.1
    large = Encoder(encoder.backbone, encoder.meta | {"size": 224}, encoder.sha256, encoder.path)
    assert large.view(OPTIONS).name == "eval" and large.view(OPTIONS).size == 224


def test_half_precision_parts_are_the_rounded_features_wherever_they_are_made(encoder, data, ranks, tmp_path):
    full = extract(encoder, data[0], OPTIONS, ALONE)
    half = FeatureOptions(batch=8, store="fp16")
    for found in (extract(encoder, data[0], half, ALONE), extract(encoder, data[0], half, ALONE, root=tmp_path)):
        assert all(torch.equal(a, b.half()) for a, b in zip(found.parts, full.parts, strict=True))
    assert next(tmp_path.rglob("part-00000*")).stat().st_size < 2 * full.parts[0].numel() + 300
    for parts in ranks(2, half_parts, encoder.path, data[0]):
        assert all(torch.equal(a, b.half()) for a, b in zip(parts, full.parts, strict=True))
    with pytest.raises(EvalError, match="store=fp32"):
        extract(Large(encoder), data[0], half, ALONE)


def half_parts(world, path, shards):
    return extract(Encoder.open(path, world), shards, FeatureOptions(batch=8, store="fp16"), world).parts


class Large:
    """An encoder whose features fp16 cannot hold."""

    def __init__(self, encoder):
        self._encoder = encoder

    def __getattr__(self, name):
        return getattr(self._encoder, name)

    def encode(self, *args):
        return self._encoder.encode(*args) * 1e6


def test_low_precision_comes_close(encoder, data):
    exact, low = (F.normalize(torch.cat(extract(encoder, data[1], FeatureOptions(precision=p), ALONE).parts))
                  for p in ("fp32", "bf16"))
    assert low.dtype == torch.float32 and not torch.equal(exact, low)
    torch.testing.assert_close(low, exact, rtol=0, atol=0.02)


def test_features_that_are_not_finite_are_an_error_on_every_rank(encoder, data, weights_file, ranks, tmp_path):
    backbone, meta = weights.load(weights_file)
    backbone.layer3[0].bn2.bias.fill_(float("nan"))
    kept = ("mean", "std", "size", "fingerprint", "step", "method")
    weights.save(tmp_path / "bad", backbone, meta["arch"], **{k: meta[k] for k in kept})
    for told in ranks(2, error_of, tmp_path / "bad", data[0]):
        assert "NaN or infinity for sample" in told and "diverged" in told


def test_a_damaged_image_is_named_and_not_replaced(encoder, data, weights_file, ranks, shards_of, tmp_path):
    shards = shards_of(tmp_path / "s", np.zeros((20, 16, 16, 3), np.uint8), np.zeros(20, int))
    row = shards.rows[13]
    with open(shards.path(0), "r+b") as file:
        file.seek(int(row["offset"]))
        file.write(bytes(int(row["size"])))
    for told in ranks(2, error_of, weights_file, shards):
        assert "00013" in told and "whole images" in told


def error_of(world, path, shards):
    try:
        extract(Encoder.open(path, world), shards, OPTIONS, world)
    except EvalError as error:
        return str(error)
    return "no error"


def test_a_full_disk_is_one_sentence(encoder, data, tmp_path, monkeypatch):
    def full(path, _):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(cache.files, "atomic_write", full)
    with pytest.raises(EvalError, match="No space left on device; expected a folder with room"):
        extract(encoder, data[0], OPTIONS, ALONE, root=tmp_path)
