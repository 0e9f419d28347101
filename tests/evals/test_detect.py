"""Detection from shards to a row: it learns, survives a kill, is one step on any world, and names mistakes."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torchvision.ops import roi_align

from hpcssl.config import load
from hpcssl.data.order import Order
from hpcssl.errors import ConfigError, EvalError
from hpcssl.evals import detect as detection
from hpcssl.evals import detect_model, detect_train
from hpcssl.evals.detect import DetectOptions, network
from hpcssl.evals.detect_data import Pictures, Stream, resized, usable
from hpcssl.evals.detect_model import Pool, Sampler
from hpcssl.evals.detect_norm import SyncNorm, averaging
from hpcssl.evals.detect_score import detect
from hpcssl.evals.detect_train import Schedule, Training
from hpcssl.evals.features import Encoder
from hpcssl.evals.run import evaluate
from hpcssl.evals.together import Stopped
from hpcssl.files import RunDir
from hpcssl.world import World

_spec = importlib.util.spec_from_file_location("detect_shards", Path(__file__).with_name("detect_shards.py"))
detection_shards = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(detection_shards)

QUICK = {"protocol": "coco_c4_2x", "iterations": 40, "milestones": [30], "train_batch": 4, "lr": 0.05, "warmup": 5,
         "sizes": [32], "test_size": 32, "anchors": [12], "proposals": 32, "regions": 16, "precise_bn": 4}


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    """(8 pictures of one rectangle each, 6 others)."""
    root = tmp_path_factory.mktemp("squares")
    return detection_shards.squares(root / "train", 8, 0), detection_shards.squares(root / "val", 6, 1)


def row(squares, weights_file, run=None, world=None, stop=None, **changes):
    return evaluate("detect", run=run, weights=weights_file, train=squares[0], val=squares[1], threads=1,
                    world=world or World.alone(), options=QUICK | changes, stop=stop)


def test_it_learns_boxes_and_masks(squares, weights_file):
    same = squares[0], squares[0]
    untrained = row(same, weights_file, iterations=1, lr=0.0)["metrics"]
    learnt = row(same, weights_file)["metrics"]
    assert set(learnt) == {"AP", "AP50", "AP75", "AP_mask", "AP50_mask", "AP75_mask"}
    assert learnt["AP50"] > 60 and learnt["AP50_mask"] > 60 and learnt["AP"] > 2 * untrained["AP"]


def test_a_kill_changes_no_number(squares, weights_file, tmp_path, monkeypatch):
    found, told = [], detection.precision
    monkeypatch.setattr(detection, "precision", lambda seen, *a, **k: found.append(seen) or told(seen, *a, **k))
    short = {"iterations": 6, "milestones": [4], "precise_bn": 2}
    whole = row(squares, weights_file, RunDir(tmp_path / "a"), **short)
    run, learn = RunDir(tmp_path / "b"), Training.learn

    def dies(t, *a):
        if t.step == 2:
            raise KeyboardInterrupt
        return learn(t, *a)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # without a word: the last save stands
        patch.setattr(detect_train, "_SAVED_EVERY", 0.0)
        patch.setattr(Training, "learn", dies)
        row(squares, weights_file, run, **short)
    asked = iter(range(1000))
    with pytest.raises(Stopped):  # in the middle of the training
        row(squares, weights_file, run, stop=lambda: next(asked) >= 2, **short)
    asked = iter(range(1000))
    with pytest.raises(Stopped):  # after it, while the norms are estimated anew
        row(squares, weights_file, run, stop=lambda: next(asked) >= 3, **short)
    state, = (run.evals / "unfinished").iterdir()
    with safe_open(state, framework="pt") as file:
        assert file.metadata()["step"] == "6"
    again = row(squares, weights_file, run, **short)
    assert found[0] == found[1] and any(picture["scores"] for picture in found[0])
    assert whole["metrics"] == again["metrics"]
    assert not list((run.evals / "unfinished").iterdir())


def training(weights_file, shards, world, **changes):
    protocol = load(DetectOptions, QUICK | changes).resolve()
    encoder = Encoder.open(weights_file, world)
    model = network(encoder, protocol, shards, world, 0).double()
    return Training(model, world), protocol


def gradients(world, weights_file, shards, changes):
    """Of the first iteration in float64, and the running statistics after it."""
    t, protocol = training(weights_file, shards, world, **changes)
    pictures = Pictures(shards)
    order = Order([len(shards)], seed=0, global_batch=protocol.batch, window="all")
    stream = Stream(pictures, [(0, order.part(0, world.rank, world.size))], sides=[32, 40], longest=64,
                    masks=protocol.masks, seed=0, threads=1)
    batch = next(iter(stream))
    stream.close()
    t.model.transform.side = detect_train._side(world, batch, halt=False)
    t.loss(batch, 0).backward()
    made = {name: p.grad for name, p in t.model.named_parameters()} | dict(t.model.named_buffers())
    return {name: value.cpu().numpy().copy() for name, value in made.items()}


@pytest.mark.parametrize("changes", [{}, {"protocol": "coco_fpn_1x", "anchors": [8, 12, 16, 24]}])
def test_two_ranks_take_the_step_of_one(squares, weights_file, ranks, changes, monkeypatch):
    for name in ("_FPN_WIDTH", "_BOX_WIDTH", "_MASK_WIDTH"):
        monkeypatch.setattr(detect_model, name, 16)
    alone = gradients(World.alone(), weights_file, squares[0], changes)
    for rank in ranks(2, gradients, weights_file, squares[0], changes):
        assert rank.keys() == alone.keys()
        for name, value in alone.items():
            np.testing.assert_allclose(rank[name], value, rtol=1e-7, atol=1e-9, err_msg=name)
    assert all(np.abs(value).max() > 0 for name, value in alone.items() if name.endswith("weight"))


@pytest.mark.gpu
def test_a_gpu_takes_the_same_step(squares, weights_file):
    alone, gpu = (gradients(World.alone(device), weights_file, squares[0], {}) for device in ("cpu", "cuda"))
    for name, value in alone.items():
        np.testing.assert_allclose(gpu[name], value, rtol=1e-6, atol=1e-8, err_msg=name)


def found_by(world, weights_file, shards):
    t, _ = training(weights_file, shards, world)
    t.model.roi_heads.score_thresh = 0.0
    return detect(t.model, Pictures(shards), world, side=32, longest=64, stop=lambda: False)


def test_detections_are_the_same_on_any_number_of_ranks(squares, weights_file, ranks):
    alone = found_by(World.alone(), weights_file, squares[1])
    assert len(alone) == 6 and all(picture["boxes"] and picture["masks"] for picture in alone)
    two = ranks(2, found_by, weights_file, squares[1])
    assert two == [alone, []]


def rows_of(world, squares, weights_file):
    return row(squares, weights_file, world=world, iterations=2, milestones=[], precise_bn=1)["metrics"]


def test_two_ranks_reach_a_row(squares, weights_file, ranks):
    one, other = ranks(2, rows_of, squares, weights_file)
    assert one == other and len(one) == 6


def normed(world, x, grad):
    norm = SyncNorm(3, world=world).double()
    torch.nn.init.constant_(norm.weight, 1.5)
    cuts = {1: [0, 7], 4: [0, 3, 3, 4, 7]}[world.size]  # the second rank of four has no region
    mine = x[cuts[world.rank]:cuts[world.rank + 1]].clone().requires_grad_()
    y = norm(mine)
    y.backward(grad[cuts[world.rank]:cuts[world.rank + 1]])
    sums = world.sum(torch.cat((norm.weight.grad, norm.bias.grad)))
    averaging(norm, 1)
    norm(mine)
    return y.detach(), mine.grad, sums, norm.running_mean, norm.running_var


def test_norm_spans_ranks_of_unequal_parts(ranks):
    x, grad = (torch.randn(7, 3, 2, 2, generator=torch.Generator().manual_seed(i)).double() for i in (1, 2))
    alone = normed(World.alone(), x, grad)
    every = ranks(4, normed, x, grad)
    for i in (0, 1):
        torch.testing.assert_close(torch.cat([rank[i] for rank in every]), alone[i])
    for rank in every:
        for i in (2, 3, 4):
            torch.testing.assert_close(rank[i], alone[i])


def test_regions_are_cut_from_the_level_of_their_size():
    draw = torch.Generator().manual_seed(0)
    maps = {str(i): torch.randn(2, 4, 64 // 2**i, 64 // 2**i, generator=draw) for i in range(4)}
    corner, side = torch.rand(30, 2, generator=draw) * 100, 2 ** (torch.rand(30, 2, generator=draw) * 6 + 4)
    boxes = torch.cat((corner, corner + side), 1).split((17, 13))
    cut = Pool(7, {str(i): 4 * 2**i for i in range(4)})(maps, boxes)
    levels = set()
    for at, (picture, box) in enumerate([(i, b) for i, some in enumerate(boxes) for b in some]):
        level = int(np.clip(np.floor(4 + np.log2(np.sqrt(float((box[2:] - box[:2]).prod())) / 224)), 2, 5))
        levels.add(level)
        one = roi_align(maps[str(level - 2)], torch.cat((torch.tensor([float(picture)]), box))[None], 7, 2.0**-level,
                        0, True)
        torch.testing.assert_close(cut[at:at + 1], one)
    assert len(levels) == 4


def test_choices_have_addresses():
    labels = [torch.tensor([1.0] * 10 + [0.0] * 30 + [-1.0] * 5), torch.tensor([0.0] * 50)]
    both, one = Sampler("x", 16, 0.25, 0), Sampler("x", 16, 0.25, 0)
    both.at(3, [7, 9])
    positive, negative = both(labels)
    assert [int(mask.sum()) for mask in (*positive, *negative)] == [4, 0, 12, 16]
    assert (both.positives, both.total) == (4, 32)
    assert not (positive[0] & (labels[0] != 1)).any() and not (negative[0] & (labels[0] != 0)).any()
    one.at(3, [9])
    assert torch.equal(one(labels[1:])[1][0], negative[1])
    one.at(4, [9])
    assert not torch.equal(one(labels[1:])[1][0], negative[1])


@pytest.mark.parametrize("flip", [False, True])
def test_boxes_and_masks_stay_on_their_pixels(squares, flip):
    pictures = Pictures(squares[0])
    for index in range(4):
        example = pictures.example(index, 64, 1000, flip=flip, masks=True)
        (x1, y1, x2, y2), = example.target["boxes"].tolist()
        red, green = example.image[0] > 170, example.image[1] > 170
        colour = green if int(example.target["labels"]) == 2 else red
        rows, columns = np.flatnonzero(colour.any(1)), np.flatnonzero(colour.any(0))
        assert np.abs(np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]) - (x1, y1, x2, y2)).max() <= 1
        mask = example.target["masks"][0].bool()
        assert (mask & colour).sum() / (mask | colour).sum() > 0.9


def test_sizes_and_rates_are_the_protocols():
    assert resized((375, 500), 800, 1333) == (800, 1067)
    assert resized((200, 1000), 800, 1333) == (267, 1333)
    voc = DetectOptions().resolve()
    assert (voc.sizes[0], voc.sizes[-1], len(voc.sizes), voc.iterations) == (480, 800, 11, 24_000)
    schedule = Schedule(iterations=voc.iterations, lr=voc.lr, warmup=voc.warmup, milestones=voc.milestones, precise=0)
    rates = [schedule.lr_at(step) for step in (0, 50, 100, 17_999, 18_000, 22_000)]
    assert rates == pytest.approx([2e-5, 0.01001, 0.02, 0.02, 0.002, 0.0002])
    assert DetectOptions(iterations=240).resolve().milestones == [180, 220]


def test_crowds_and_empty_pictures_are_no_targets(tmp_path):
    box = [[4, 4, 20, 20]]
    notes = [{"boxes": box, "labels": [0], "iscrowd": [1]}, {"boxes": [], "labels": []},
             {"boxes": box, "labels": [1], "difficult": [1]}, {"boxes": [[4, 4, 4, 20]], "labels": [1]}]
    shards = detection_shards.write(tmp_path / "x", notes, [np.zeros((32, 32, 3), np.uint8)] * 4)
    pictures = Pictures(shards)
    difficult = next(i for i in range(4) if pictures.record(i)["ignored"].tolist() == [True]
                     and not pictures.record(i)["crowd"].any())
    assert usable(pictures, World.alone(), masks=False).tolist() == [difficult]


def test_mistakes_are_named(squares, data, weights_file, tmp_path):
    with pytest.raises(EvalError, match=r"no boxes for .*hpcssl-shard detection"):
        row(data, weights_file)
    with pytest.raises(EvalError, match="classes of"):
        row((squares[0], data[1]), weights_file)
    with pytest.raises(EvalError, match="train_batch=100"):
        row(squares, weights_file, train_batch=100)
    with pytest.raises(EvalError, match="NaN or infinite"):
        row(squares, weights_file, lr=1e30, warmup=0)
    with pytest.raises(ConfigError, match="did you mean 'voc_c4'"):
        row(squares, weights_file, protocol="voc_c5")
    with pytest.raises(ConfigError, match="did you mean 'anchors'"):
        row(squares, weights_file, anchor=[3])
    with pytest.raises(ConfigError, match=r"evals\.detect\.anchors"):
        row(squares, weights_file, protocol="coco_fpn_1x", anchors=[8])
    plain = [{"boxes": [[4, 4, 20, 20]], "labels": [0], "size": [33, 32]}] * 4
    boxes = detection_shards.write(tmp_path / "plain", plain, [np.zeros((32, 32, 3), np.uint8)] * 4)
    with pytest.raises(EvalError, match="boxes without masks"):
        row((boxes, boxes), weights_file)
    with pytest.raises(EvalError, match=r"a picture of \(32, 32\)"):
        row((boxes, boxes), weights_file, protocol="voc_c4")
