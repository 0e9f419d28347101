"""Object detection: learning, resuming, equality over ranks and devices, the parts of the detector, and errors."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torchvision.ops import roi_align

from hpcssl.config import load
from hpcssl.data.order import Order
from hpcssl.distributed.world import World
from hpcssl.errors import ConfigError, EvalError, Stopped
from hpcssl.evals.common.encoder import FrozenEncoder
from hpcssl.evals.detection import evaluate as detection
from hpcssl.evals.detection import model as detect_model
from hpcssl.evals.detection import training as detect_train
from hpcssl.evals.detection.data import DetectionShards, resize_shape
from hpcssl.evals.detection.evaluate import build_detector
from hpcssl.evals.detection.example_stream import ExampleStream, find_trainable_images
from hpcssl.evals.detection.norm import SyncNorm, accumulate_statistics
from hpcssl.evals.detection.options import DetectOptions
from hpcssl.evals.detection.regions import BalancedSampler, RegionPool
from hpcssl.evals.detection.scoring import detect_objects
from hpcssl.evals.detection.training import DetectionSchedule, DetectionTrainer
from hpcssl.evals.run import evaluate
from hpcssl.run_dir import RunDir
from tests.evals import detect_shards
from tests.tolerances import rounding

QUICK = {
    "protocol": "coco_c4_2x",
    "iterations": 40,
    "milestones": [30],
    "train_batch": 4,
    "lr": 0.05,
    "warmup_iterations": 5,
    "train_sizes": [32],
    "test_size": 32,
    "anchor_sizes": [12],
    "proposals": 32,
    "regions_per_image": 16,
    "precise_bn_batches": 4,
}


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    """Two shard sets of images with one rectangle each: 8 training images and 6 validation images."""
    root = tmp_path_factory.mktemp("squares")
    return detect_shards.squares(root / "train", 8, 0), detect_shards.squares(root / "val", 6, 1)


def detect(squares, weights_file, run=None, world=None, stop=None, **changes):
    return evaluate(
        "detect",
        run=run,
        weights=weights_file,
        train=squares[0],
        val=squares[1],
        threads=1,
        world=world or World.single_process(),
        options=QUICK | changes,
        stop=stop,
    )


def test_training_learns_boxes_and_masks(squares, weights_file):
    same = squares[0], squares[0]
    untrained = detect(same, weights_file, iterations=1, lr=0.0)["metrics"]
    trained = detect(same, weights_file)["metrics"]
    assert set(trained) == {"AP", "AP50", "AP75", "AP_mask", "AP50_mask", "AP75_mask"}
    assert trained["AP50"] > 60 and trained["AP50_mask"] > 60 and trained["AP"] > 2 * untrained["AP"]


def test_resumed_training_gives_the_same_detections(squares, weights_file, tmp_path, monkeypatch):
    """A training that is killed once and stopped twice ends like one that is not interrupted."""
    scored, compute_average_precision = [], detection.compute_average_precision
    monkeypatch.setattr(
        detection,
        "compute_average_precision",
        lambda detections, *a, **k: scored.append(detections) or compute_average_precision(detections, *a, **k),
    )
    short = {"iterations": 6, "milestones": [4], "precise_bn_batches": 2}
    uninterrupted = detect(squares, weights_file, RunDir(tmp_path / "a"), **short)
    run, train_step = RunDir(tmp_path / "b"), DetectionTrainer.train_step

    def killed_at_step_2(trainer, *a):
        if trainer.step == 2:
            raise KeyboardInterrupt
        return train_step(trainer, *a)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # nothing is saved on this way out
        patch.setattr(detect_train, "_SAVE_PERIOD_S", 0.0)
        patch.setattr(DetectionTrainer, "train_step", killed_at_step_2)
        detect(squares, weights_file, run, **short)
    checks = iter(range(1000))
    with pytest.raises(Stopped):  # in the middle of the training
        detect(squares, weights_file, run, stop=lambda: next(checks) >= 2, **short)
    checks = iter(range(1000))
    with pytest.raises(Stopped):  # after it, while the statistics of the norms are estimated again
        detect(squares, weights_file, run, stop=lambda: next(checks) >= 3, **short)
    (state,) = (run.evals / "unfinished").iterdir()
    with safe_open(state, framework="pt") as file:
        assert json.loads(file.metadata()["note"]) == {"step": 6}
    resumed = detect(squares, weights_file, run, **short)
    assert scored[0] == scored[1] and any(detections["scores"] for detections in scored[0])
    assert uninterrupted["metrics"] == resumed["metrics"]
    assert not list((run.evals / "unfinished").iterdir())


def build_trainer(weights_file, shards, world, **changes):
    protocol = load(DetectOptions, QUICK | changes).resolve()
    encoder = FrozenEncoder.open(weights_file, world)
    model = build_detector(encoder, protocol, shards, world, 0).double()
    return DetectionTrainer(model, world), protocol


def gradients(world, weights_file, shards, changes):
    """Return the gradients of the first iteration in float64, and the buffers after it."""
    t, protocol = build_trainer(weights_file, shards, world, **changes)
    images = DetectionShards(shards)
    order = Order([len(shards)], seed=0, global_batch=protocol.batch, window="all")
    stream = ExampleStream(
        images,
        [(0, order.local_batch(0, world.rank, world.size))],
        sides=[32, 40],
        max_side=64,
        masks=protocol.masks,
        seed=0,
        threads=1,
    )
    batch = next(iter(stream))
    stream.close()
    t.model.transform.side = detect_train._padded_shape(world, batch, halt=False)
    t.loss(batch, 0).backward()
    tensors = {name: p.grad for name, p in t.model.named_parameters()} | dict(t.model.named_buffers())
    return {name: value.cpu().numpy().copy() for name, value in tensors.items()}


def rounding_of(gradient):
    """The tolerance of a gradient.

    Forward, convolutions add 3,195 numbers, the box head 6,272, and batch norms 3 * 4 * 64^2 + 2 * 4 * 32^2 +
    2 * 4 * 16^2; backward the same again. All parameters perturbed by a relative 1e-11 changed gradients by up to 28
    times as much, relative to their largest entry or to 1e-3.
    """
    return rounding(torch.float64, 140_000, amplification=30, scale=max(1e-3, np.abs(gradient).max()))


@pytest.mark.parametrize("changes", [{}, {"protocol": "coco_fpn_1x", "anchor_sizes": [8, 12, 16, 24]}])
def test_gradients_of_two_ranks_are_those_of_one(squares, weights_file, run_ranks, changes, monkeypatch):
    for name in ("_FPN_WIDTH", "_BOX_WIDTH", "_MASK_WIDTH"):
        monkeypatch.setattr(detect_model, name, 16)
    reference = gradients(World.single_process(), weights_file, squares[0], changes)
    for rank in run_ranks(2, gradients, weights_file, squares[0], changes):
        assert rank.keys() == reference.keys()
        for name, value in reference.items():
            np.testing.assert_allclose(rank[name], value, rtol=0, atol=rounding_of(value), err_msg=name)
    assert all(np.abs(value).max() > 0 for name, value in reference.items() if name.endswith("weight"))


@pytest.mark.gpu
def test_gradients_on_a_gpu_are_those_on_a_cpu(squares, weights_file):
    reference, gpu = (
        gradients(World.single_process(device), weights_file, squares[0], {}) for device in ("cpu", "cuda")
    )
    for name, value in reference.items():
        np.testing.assert_allclose(gpu[name], value, rtol=0, atol=rounding_of(value), err_msg=name)


def detect_validation(world, weights_file, shards):
    t, _ = build_trainer(weights_file, shards, world)
    t.model.roi_heads.score_thresh = 0.0
    return detect_objects(t.model, DetectionShards(shards), world, side=32, max_side=64, stop=lambda: False)


def test_detections_are_the_same_on_any_number_of_ranks(squares, weights_file, run_ranks):
    reference = detect_validation(World.single_process(), weights_file, squares[1])
    assert len(reference) == 6 and all(detections["boxes"] and detections["masks"] for detections in reference)
    two = run_ranks(2, detect_validation, weights_file, squares[1])
    assert two == [reference, []]


def metrics_of(world, squares, weights_file):
    return detect(squares, weights_file, world=world, iterations=2, milestones=[], precise_bn_batches=1)["metrics"]


def test_two_ranks_return_the_same_scores(squares, weights_file, run_ranks):
    first, second = run_ranks(2, metrics_of, squares, weights_file)
    assert first == second and len(first) == 6


def apply_norm(world, x, grad):
    norm = SyncNorm(3, world=world).double()
    torch.nn.init.constant_(norm.weight, 1.5)
    cuts = {1: [0, 7], 4: [0, 3, 3, 4, 7]}[world.size]  # the second rank of four has no region
    mine = x[cuts[world.rank] : cuts[world.rank + 1]].clone().requires_grad_()
    y = norm(mine)
    y.backward(grad[cuts[world.rank] : cuts[world.rank + 1]])
    sums = world.all_reduce_sum(torch.cat((norm.weight.grad, norm.bias.grad)))
    accumulate_statistics(norm, 1)
    norm(mine)
    return y.detach(), mine.grad, sums, norm.running_mean, norm.running_var


def test_sync_norm_on_ranks_with_unequal_batches_equals_one_rank(run_ranks):
    x, grad = (torch.randn(7, 3, 2, 2, generator=torch.Generator().manual_seed(i)).double() for i in (1, 2))
    reference = apply_norm(World.single_process(), x, grad)
    ranks = run_ranks(4, apply_norm, x, grad)
    # two means over 28 numbers; an error of a mean is divided by the standard deviation
    amplification = float(x.abs().max()) / float(x.transpose(0, 1).flatten(1).std(1).min())
    close = [rounding(torch.float64, 56, amplification=amplification, scale=float(r.abs().max())) for r in reference]
    for i in (0, 1):
        torch.testing.assert_close(torch.cat([rank[i] for rank in ranks]), reference[i], rtol=0, atol=close[i])
    for rank in ranks:
        for i in (2, 3, 4):
            torch.testing.assert_close(rank[i], reference[i], rtol=0, atol=close[i])


def test_region_pool_takes_each_region_from_the_level_of_its_size():
    draw = torch.Generator().manual_seed(0)
    maps = {str(i): torch.randn(2, 4, 64 // 2**i, 64 // 2**i, generator=draw) for i in range(4)}
    corner, side = torch.rand(30, 2, generator=draw) * 100, 2 ** (torch.rand(30, 2, generator=draw) * 6 + 4)
    boxes = torch.cat((corner, corner + side), 1).split((17, 13))
    cut = RegionPool(7, {str(i): 4 * 2**i for i in range(4)})(maps, boxes)
    levels = set()
    for number, (image, box) in enumerate([(i, b) for i, group in enumerate(boxes) for b in group]):
        level = int(np.clip(np.floor(4 + np.log2(np.sqrt(float((box[2:] - box[:2]).prod())) / 224)), 2, 5))
        levels.add(level)
        one = roi_align(
            maps[str(level - 2)], torch.cat((torch.tensor([float(image)]), box))[None], 7, 2.0**-level, 0, True
        )
        assert torch.equal(cut[number : number + 1], one)
    assert len(levels) == 4


def test_sampling_depends_on_iteration_and_image_only():
    labels = [torch.tensor([1.0] * 10 + [0.0] * 30 + [-1.0] * 5), torch.tensor([0.0] * 50)]
    both, second_alone = BalancedSampler("x", 16, 0.25, 0), BalancedSampler("x", 16, 0.25, 0)
    both.set_images(3, [7, 9])
    positive, negative = both(labels)
    assert [int(mask.sum()) for mask in (*positive, *negative)] == [4, 0, 12, 16]
    assert (both.positives, both.total) == (4, 32)
    assert not (positive[0] & (labels[0] != 1)).any() and not (negative[0] & (labels[0] != 0)).any()
    second_alone.set_images(3, [9])
    assert torch.equal(second_alone(labels[1:])[1][0], negative[1])
    second_alone.set_images(4, [9])
    assert not torch.equal(second_alone(labels[1:])[1][0], negative[1])


@pytest.mark.parametrize("flip", [False, True])
def test_boxes_and_masks_follow_their_pixels_through_resize_and_flip(squares, flip):
    images = DetectionShards(squares[0])
    for index in range(4):
        example = images.example(index, 64, 1000, flip=flip, masks=True)
        ((x1, y1, x2, y2),) = example.target["boxes"].tolist()
        red, green = example.image[0] > 170, example.image[1] > 170
        color = green if int(example.target["labels"]) == 2 else red
        rows, columns = np.flatnonzero(color.any(1)), np.flatnonzero(color.any(0))
        assert np.abs(np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]) - (x1, y1, x2, y2)).max() <= 1
        mask = example.target["masks"][0].bool()
        assert (mask & color).sum() / (mask | color).sum() > 0.9


def test_image_sizes_and_learning_rates_of_voc_c4():
    assert resize_shape((375, 500), 800, 1333) == (800, 1067)
    assert resize_shape((200, 1000), 800, 1333) == (267, 1333)
    voc = DetectOptions().resolve()
    assert (voc.train_sizes[0], voc.train_sizes[-1], len(voc.train_sizes), voc.iterations) == (480, 800, 11, 24_000)
    schedule = DetectionSchedule(
        iterations=voc.iterations, lr=voc.lr, warmup=voc.warmup, milestones=voc.milestones, precise_bn=0
    )
    rates = [schedule.learning_rate(step) for step in (0, 50, 100, 17_999, 18_000, 22_000)]
    assert rates == pytest.approx([2e-5, 0.01001, 0.02, 0.02, 0.002, 0.0002])
    assert DetectOptions(iterations=240).resolve().milestones == [180, 220]


def test_images_with_only_crowds_or_without_boxes_are_not_trained_on(tmp_path):
    box = [[4, 4, 20, 20]]
    notes = [
        {"boxes": box, "labels": [0], "iscrowd": [1]},
        {"boxes": [], "labels": []},
        {"boxes": box, "labels": [1], "difficult": [1]},
        {"boxes": [[4, 4, 4, 20]], "labels": [1]},
    ]
    shards = detect_shards.write(tmp_path / "x", notes, [np.zeros((32, 32, 3), np.uint8)] * 4)
    images = DetectionShards(shards)
    difficult = next(
        i for i in range(4) if images.record(i)["ignored"].tolist() == [True] and not images.record(i)["crowd"].any()
    )
    assert find_trainable_images(images, World.single_process(), masks=False).tolist() == [difficult]


def test_unusable_shards_and_batches_are_refused(squares, data, weights_file, tmp_path):
    plain = [{"boxes": [[4, 4, 20, 20]], "labels": [0], "size": [33, 32]}] * 4
    boxes = detect_shards.write(tmp_path / "plain", plain, [np.zeros((32, 32, 3), np.uint8)] * 4)
    for sets, options, what, got, fix in (
        (data, {}, str(data[0].root), "no boxes for ", "hpcssl-shard detection"),
        ((squares[0], data[1]), {}, f"classes of {data[1].root}", "4 classes", "hpcssl-shard detection"),
        (squares, {"train_batch": 100}, "detection", "train_batch=100 on 1 ranks with 8 ", "train_batch"),
        (squares, {"lr": 1e30, "warmup_iterations": 0}, "detection", "NaN", "evals.detect.lr"),
        ((boxes, boxes), {}, str(boxes.root), "without masks", "protocol=voc_c4"),
        ((boxes, boxes), {"protocol": "voc_c4"}, str(boxes.root), "(32, 32)", "same download"),
    ):
        with pytest.raises(EvalError) as caught:
            detect(sets, weights_file, **options)
        assert what in caught.value.what and got in caught.value.got and fix in caught.value.fix


@pytest.mark.parametrize(
    "options, what, hint",
    [
        ({"protocol": "voc_c5"}, "evals.detect.protocol", "'voc_c4'"),
        ({"anchor_size": [3]}, "options of detect, key anchor_size", "'anchor_sizes'"),
        ({"protocol": "coco_fpn_1x", "anchor_sizes": [8]}, "evals.detect.anchor_sizes", "4 sizes"),
    ],
)
def test_invalid_options_are_refused(squares, weights_file, options, what, hint):
    with pytest.raises(ConfigError) as caught:
        detect(squares, weights_file, **options)
    assert caught.value.what == what and hint in caught.value.expected + caught.value.fix
