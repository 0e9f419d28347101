"""Linear classification: equal to the official loops, on any number of ranks, and after interruptions."""

import contextlib
import math
import multiprocessing
import os
import signal
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import nn

from hpcssl import rng
from hpcssl.config import load
from hpcssl.data.order import Order
from hpcssl.distributed.world import World
from hpcssl.errors import ConfigError, EvalError, Stopped
from hpcssl.evals.common import selection, state
from hpcssl.evals.common.encoder import FrozenEncoder
from hpcssl.evals.common.extract import extract_features
from hpcssl.evals.common.options import FeatureOptions
from hpcssl.evals.linear import training
from hpcssl.evals.linear.heads import INITS, LinearHeads, draw_initial_weights
from hpcssl.evals.linear.options import LinearOptions
from hpcssl.evals.linear.protocols import PROTOCOLS, LinearProtocol
from hpcssl.evals.linear.training import HeadTask, HeadTrainer
from hpcssl.evals.run import evaluate
from hpcssl.run_dir import RunDir
from tests.tolerances import rounding
from tests.waiting import wait_for_exit

SINGLE = World.single_process()
SHORT = {"epochs": 4, "milestones": [2, 3], "train_batch": 32, "lr": 0.05, "forward_batch": 12}
CENTER = SHORT | {"protocol": "msf_center", "forward_batch": 32}
SWEEP = {
    "protocol": "byol",
    "epochs": 4,
    "train_batch": 20,
    "augment": "center",
    "forward_batch": 32,
    "held_out": 30,
    "lr_sweep": [3.0, 30.0],
}
RATE = 3.0


def test_options_replace_values_of_the_protocol():
    changed = LinearOptions(protocol="msf_center", epochs=3, train_batch=16).resolve()
    assert changed == replace(PROTOCOLS["msf"], epochs=3, batch=16, augment="center")
    assert LinearOptions(protocol="byol", lr=0.7).resolve().lr_sweep == ()
    assert LinearOptions(protocol="moco", lr_sweep=[3.0, 0.3]).resolve().lr_sweep == (3.0, 0.3)
    assert LinearOptions(protocol="swav", milestones=[2]).resolve().schedule().shape == "steps"


def test_msf_center_equals_msfs_script(data, weights_file, monkeypatch):
    """MSF's eval_linear.py, statement by statement, on cached features."""
    train, val = data
    scores, ours = [], []
    summarize_epochs = selection.summarize_epochs
    monkeypatch.setattr(
        selection, "summarize_epochs", lambda epochs, report: ours.extend(epochs) or summarize_epochs(epochs, report)
    )
    row = evaluate("linear", run=None, weights=weights_file, train=train, val=val, options=CENTER, world=SINGLE)
    feats = {}
    for name, shards in (("train", train), ("val", val)):
        f = literal_features(weights_file, shards)
        feats[name] = f / f.norm(2, dim=1, keepdim=True)
    var, mean = torch.var_mean(feats["train"], dim=0)
    inv_std = 1.0 / torch.sqrt(var + 1e-5)
    head = nn.Linear(128, 4)
    with torch.no_grad():
        for name, p in head.named_parameters():
            drawn = torch.rand(p.shape, generator=rng.generator(rng.key(0, "linear", name)))
            p.copy_((2 * drawn - 1) / 128**0.5)
    sgd = torch.optim.SGD(head.parameters(), 0.05, momentum=0.9, weight_decay=1e-4)
    decay = torch.optim.lr_scheduler.MultiStepLR(sgd, [2, 3])
    order = Order([90], seed=0, global_batch=32, window="all")
    y_train, y_val = (torch.as_tensor(s.labels) for s in data)
    for epoch in range(4):
        for i in range(2):
            index = torch.tensor(order.batch(2 * epoch + i))
            loss = F.cross_entropy(head((feats["train"][index] - mean) * inv_std), y_train[index])
            sgd.zero_grad()
            loss.backward()
            sgd.step()
        decay.step()
        output = head((feats["val"] - mean) * inv_std)
        scores.append(100 * float((output.argmax(1) == y_val).double().mean()))
    assert [score["top1"] for score in ours] == pytest.approx(scores) and len(set(scores)) > 2
    assert row["metrics"]["top1"] == pytest.approx(max(scores)) and max(scores) > 50
    assert row["metrics"]["top1_last"] == pytest.approx(scores[-1])
    assert row["metrics"]["top5"] == row["metrics"]["top5_last"] == 100.0  # of four classes


def literal_features(path, shards):
    return torch.cat(
        extract_features(FrozenEncoder.open(path, SINGLE), shards, FeatureOptions(forward_batch=32), SINGLE).parts
    )


def draw_features(rows, width, classes, seed):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width, generator=draw).relu(), torch.randint(classes, (rows,), generator=draw)


def literal(name, batches, weight, bias, epochs, per_epoch, batch):
    """The official loops, statement by statement: yields weight, bias and rate after each batch."""
    w, b = weight.clone(), bias.clone()
    m = [torch.zeros_like(w), torch.zeros_like(b)]
    for step, (x, y) in enumerate(batches):
        epoch, total = step // per_epoch, epochs * per_epoch
        w.requires_grad_(), b.requires_grad_()
        grads = list(torch.autograd.grad(F.cross_entropy(x @ w.T + b, y), (w, b)))
        w, b = w.detach(), b.detach()
        by_step, by_epoch = ((1 + math.cos(math.pi * part)) / 2 for part in (step / total, epoch / epochs))
        decayed = 0.1 ** sum(epoch >= milestone for milestone in (60, 80))
        if name in ("moco", "oss_last", "swav", "msf"):  # torch.optim.SGD
            lr, decay = {
                "swav": (0.3 * by_epoch, 1e-6),
                "msf": (0.01 * 0.1 ** sum(epoch >= e for e in (15, 30, 40)), 1e-4),
            }.get(name, (30.0 * decayed, 0.0))
            for p, g, v in zip((w, b), grads, m, strict=True):
                v.mul_(0.9).add_(g + decay * p)
                p.sub_(lr * v)
        elif name == "simsiam":  # apex.parallel.LARC(trust_coefficient=.001, clip=False) around it
            lr = 0.1 * batch / 256 * by_epoch
            for p, g, v in zip((w, b), grads, m, strict=True):
                if p.norm() != 0 and g.norm() != 0:
                    g = g * (0.001 * p.norm() / (g.norm() + 1e-8))
                v.mul_(0.9).add_(g)
                p.sub_(lr * v)
        else:  # tf.train.MomentumOptimizer(use_nesterov=True), optax.sgd(nesterov=True), NNCLR's LARS
            lr = {"simclr": 0.1 * batch / 256, "byol": 0.2 * batch / 256, "nnclr": 1.0}[name] * by_step
            for i, (p, g, v) in enumerate(zip((w, b), grads, m, strict=True)):
                if name == "simclr":
                    g = g + 1e-6 * p
                if name == "nnclr" and i == 0 and p.norm() > 0:
                    g = g * (0.001 * p.norm() / g.norm())
                v.mul_(0.9).add_(g)
                p.sub_(lr * (g + 0.9 * v))
        yield w.clone(), b.clone(), lr


@pytest.mark.parametrize("name", sorted(set(PROTOCOLS) - {"msf_center"}))
def test_each_protocol_equals_its_official_loop(name):
    """With three steps per epoch: the learning rates of all epochs, and the weights until rounding separates them."""
    protocol = replace(PROTOCOLS[name], batch=12)
    x, y = draw_features(36, 10, 5, 3)
    heads = LinearHeads(5, 10, protocol, [protocol.lr], 0, SINGLE.device, 3)
    start = heads.weight_RCD[0].clone(), heads.bias_RC[0].clone()
    batches = [(x[12 * (i % 3) :][:12], y[12 * (i % 3) :][:12]) for i in range(3 * protocol.epochs)]
    for step, (weight, bias, lr) in enumerate(literal(name, batches, *start, protocol.epochs, 3, 12)):
        heads.train_step(*batches[step])
        assert heads.optimizers[0].param_groups[0]["lr"] == pytest.approx(lr)
        if step == (4 if protocol.lr > 10 else 40):
            for ours, theirs, before in ((heads.weight_RCD, weight, start[0]), (heads.bias_RC, bias, start[1])):
                moved = float((theirs - before).abs().max())
                # Sums over 10 features, 5 classes and 12 rows; features perturbed by a relative 1e-5 changed what the
                # weights move by up to 4.1 times as much. Each step rounds the weights once more.
                tolerance = rounding(torch.float32, 30, amplification=5, scale=moved)
                tolerance += rounding(torch.float32, step + 1, scale=float(theirs.abs().max()))
                torch.testing.assert_close(ours[0], theirs, rtol=0, atol=tolerance)


def test_heads_of_a_sweep_equal_heads_that_train_alone():
    protocol = replace(PROTOCOLS["nnclr"], init="torch", batch=20, epochs=5)
    x, y = draw_features(40, 12, 6, 1)
    sweep = LinearHeads(6, 12, protocol, [0.5, 3.0, 20.0], 0, SINGLE.device, 2)
    apart = [LinearHeads(6, 12, protocol, [rate], 0, SINGLE.device, 2) for rate in (0.5, 3.0, 20.0)]
    for step in range(10):
        for heads in (sweep, *apart):
            heads.train_step(x[step % 2 * 20 :][:20], y[step % 2 * 20 :][:20])
    for r, reference in enumerate(apart):
        # sums over 12 features, 6 classes and 20 rows; weights perturbed by 1e-3 ended 3e-4 apart
        tolerance = rounding(torch.float32, 40, steps=10, scale=float(reference.weight_RCD.abs().max()))
        torch.testing.assert_close(sweep.weight_RCD[r], reference.weight_RCD[0], rtol=0, atol=tolerance)
    assert sweep.score(x, y) == [reference.score(x, y)[0] for reference in apart]
    assert len({score["top1"] for score in sweep.score(x, y)}) > 1


def test_a_head_converges_to_scikit_learns_logistic_regression():
    """SGD with weight decay d minimizes the mean cross-entropy + d/2 |w|², which is scikit-learn's C = 1 / (n d)."""
    protocol = LinearProtocol(lr=0.5, weight_decay=0.02, batch=60, epochs=400, init="zeros")
    x, y = draw_features(60, 6, 4, 2)
    heads = LinearHeads(4, 6, protocol, [0.5], 0, SINGLE.device, 1)
    extended = torch.cat((x, torch.ones(60, 1)), 1)  # the bias decays too
    for _ in range(400):
        heads.train_step(x, y)
    theirs = LogisticRegression(C=1 / (60 * 0.02), fit_intercept=False, tol=1e-8, max_iter=1000).fit(
        extended.double().numpy(), y.numpy()
    )
    ours = torch.cat((heads.weight_RCD[0], heads.bias_RC[0][:, None]), 1)
    # SGD ends where the rounding of the gradient, of sums over 60 rows, 7 features and 4 classes, balances its pull: at
    # that rounding divided by the curvature, which is at least the weight decay
    tolerance = rounding(torch.float32, 71, amplification=1 / 0.02)
    torch.testing.assert_close(ours, torch.as_tensor(theirs.coef_).float(), rtol=0, atol=tolerance)


def test_initial_values_have_the_stated_distributions():
    """Standard deviations within 5 sigma, which three correct ones would exceed with a probability of 2e-6.

    Relative to it, the sigma of a standard deviation of n draws is sqrt((kurtosis - 1) / 4 n). The kurtosis is 1.8 for
    a uniform, 3 for a normal, and 2.37 for a normal variable cut at 2, whose deviation is 0.8796.
    """

    def five_sigma(kurtosis):
        return 5 * ((kurtosis - 1) / 4 / (50 * 100)) ** 0.5

    torch_w, torch_b = draw_initial_weights("torch", 50, 100, 1)
    assert torch_w.abs().max() <= 0.1 and torch_b.any()
    assert torch_w.std() == pytest.approx(0.1 / 3**0.5, rel=five_sigma(1.8))
    normal, _ = draw_initial_weights("normal", 50, 100, 1)
    assert normal.std() == pytest.approx(0.01, rel=five_sigma(3))
    cut, _ = draw_initial_weights("truncated", 50, 100, 1)
    assert cut.abs().max() <= 0.2 and cut.std() == pytest.approx(0.08796, rel=five_sigma(2.37))
    assert not any(draw_initial_weights(kind, 50, 100, 1)[1].any() for kind in ("normal", "truncated", "zeros"))
    assert {p.init for p in PROTOCOLS.values()} == set(INITS)


def test_scores_equal_those_of_topk_and_a_diverged_head_scores_0():
    x, y = draw_features(40, 6, 9, 0)
    heads = LinearHeads(9, 6, PROTOCOLS["msf"], [0.3, 0.3], 1, SINGLE.device, 1)
    logits = x @ heads.weight_RCD[0].T + heads.bias_RC[0]
    five = (logits.topk(5).indices == y[:, None]).any(1)
    first = {
        "top1": pytest.approx(100 * float((logits.argmax(1) == y).double().mean())),
        "top5": pytest.approx(100 * float(five.double().mean())),
    }
    assert heads.score(x, y) == [first, first]
    heads.weight_RCD[1, 0, 0] = float("nan")
    assert heads.score(x, y) == [first, {"top1": 0.0, "top5": 0.0}]
    heads.weight_RCD[0].zero_(), heads.bias_RC[0].zero_()
    assert heads.score(x, y)[0]["top1"] == 100 * float((y == 0).double().mean())  # equal logits: the lowest class
    heads.weight_RCD[0, 0, 0] = float("nan")
    with pytest.raises(EvalError) as caught:
        heads.score(x, y)
    assert caught.value.what == "linear evaluation" and "evals.linear.lr" in caught.value.fix


def test_the_score_is_that_of_the_best_or_the_last_epoch():
    scores = [
        {"top1": 1.0, "top5": 9.0},
        {"top1": 3.0, "top5": 5.0},
        {"top1": 3.0, "top5": 6.0},
        {"top1": 2.0, "top5": 4.0},
    ]
    both = {"top1_best": 3.0, "top5_best": 5.0, "top1_last": 2.0, "top5_last": 4.0}  # best: the first of the best
    assert selection.summarize_epochs(scores, "best") == both | {"top1": 3.0, "top5": 5.0}
    assert selection.summarize_epochs(scores, "last") == both | {"top1": 2.0, "top5": 4.0}


def test_held_out_images_choose_the_rate_that_trains_on_all_images(data, weights_file, monkeypatch):
    options, tasks, train = SWEEP | {"protocol": "moco", "lr_sweep": [1e-6, RATE, 1e-5]}, [], HeadTrainer.train
    monkeypatch.setattr(HeadTrainer, "train", lambda work, task: tasks.append(task) or train(work, task))
    row = evaluate("linear", run=None, weights=weights_file, train=data[0], val=data[1], options=options, world=SINGLE)
    swept = row["details"]["held_out"]["top1"]
    assert list(swept) == [str(rate) for rate in options["lr_sweep"]] and len(set(swept.values())) > 1
    assert max(swept, key=swept.get) == str(RATE) and row["details"]["lr"] == RATE
    sweep, final = tasks
    held = np.setdiff1d(np.arange(90), sweep.index)
    assert len(held) == 30 and sweep.test()[1].tolist() == data[0].labels[held].tolist()
    assert final.index.tolist() == list(range(90)) and final.test()[1].tolist() == data[1].labels.tolist()
    reference = {k: v for k, v in options.items() if k not in ("lr_sweep", "held_out")} | {"lr": RATE}
    assert metrics(SINGLE, weights_file, data, reference) == row["metrics"] and len(tasks) == 3


@pytest.mark.parametrize(
    "samples, classes, held", [(1281167, 1000, 10009), (50000, 10, 391), (1400, 10, 100), (90, 4, 9), (9, 3, 1)]
)
def test_number_of_held_out_images(samples, classes, held):
    assert len(set(selection.draw_held_out(samples, classes, 0, None).tolist())) == held
    assert len(selection.draw_held_out(samples, classes, 0, 3)) == 3


def test_augmented_steps_use_the_right_images_and_new_crops(data, weights_file):
    """Every step has the labels of its images, and an image has other crops in each epoch."""
    encoder, order = FrozenEncoder.open(weights_file, SINGLE), Order([90], seed=0, global_batch=32, window="all")

    def features(rank, size, total):
        with contextlib.ExitStack() as stack:
            context = SimpleNamespace(
                world=SimpleNamespace(
                    rank=rank, size=1, device=SINGLE.device, all_gather=lambda x: x, all_gather_text=lambda t: [t]
                ),
                train=data[0],
                encoder=encoder,
                threads=2,
                exit_stack=stack,
                options=LinearOptions(forward_batch=12, interpolation="bilinear"),
            )
            work = HeadTrainer(context, replace(PROTOCOLS["moco"], batch=32), context.train, None)
            source = work._batch_source(HeadTask("x", [1.0], np.arange(90), None), order, 0, total)
            assert source.steps_per_call == 1
            return [(x.clone(), y) for step in range(total) for x, y in source.read(range(step, step + 1))]

    steps = features(0, 1, 4)
    for step, (_, y) in enumerate(steps):
        assert torch.equal(y, torch.as_tensor(data[0].labels[order.batch(step)]))
    first = {int(i): f for step in (0, 1) for i, f in zip(order.batch(step), steps[step][0], strict=True)}
    second = {int(i): f for step in (2, 3) for i, f in zip(order.batch(step), steps[step][0], strict=True)}
    both = first.keys() & second.keys()
    assert len(both) > 20 and not any(torch.equal(first[i], second[i]) for i in both)


@pytest.mark.parametrize("options, sizes", [(SHORT, (2, 4, 3)), (SWEEP, (2,))])
def test_scores_of_1_2_and_4_ranks_are_equal(options, sizes, data, weights_file, run_ranks):
    reference = metrics(SINGLE, weights_file, data, options)
    for size in sizes:  # 8 steps: rank 3 of 4 has a part, and the last round on 3 ranks is short
        assert run_ranks(size, metrics, weights_file, data, options) == [reference] * size


def metrics(world, path, data, options, run=None, stop=None):
    train, val = data
    return evaluate("linear", run=run, weights=path, train=train, val=val, options=options, world=world, stop=stop)[
        "metrics"
    ]


def test_a_training_that_is_stopped_at_any_moment_resumes_with_equal_scores(data, weights_file, run_ranks, tmp_path):
    reference = metrics(SINGLE, weights_file, data, SHORT)
    run, stops = RunDir(tmp_path / "run"), 0
    while True:  # only the last rank is asked to stop, at its first or second check
        outcome = run_ranks(2, stopped_after, weights_file, data, run, stops % 2)
        if outcome[0] != "stopped":
            break
        assert outcome == ["stopped"] * 2
        stops += 1
    assert outcome == [reference] * 2 and stops >= 4
    assert not list((run.evals / "unfinished").iterdir())


def test_protocols_report_their_epoch_and_refuse_a_batch_above_the_training_set(data, weights_file):
    for name in ("byol", "simsiam"):
        scores = metrics(
            SINGLE, weights_file, data, {"protocol": name, "train_batch": 40, "epochs": 1, "forward_batch": 64}
        )
        assert scores["top1"] == scores[f"top1_{PROTOCOLS[name].report}"] and 10 < scores["top1"] <= 100
    for name in set(PROTOCOLS) - {"msf", "msf_center"}:
        with pytest.raises(EvalError) as caught:
            metrics(SINGLE, weights_file, data, {"protocol": name})
        images = 81 if PROTOCOLS[name].lr_sweep else 90  # a sweep holds nine images out
        assert caught.value.got.startswith(f"{images} ") and str(PROTOCOLS[name].batch) in caught.value.got
        assert f"train_batch={images}" in caught.value.fix


def stopped_after(world, path, data, run, checks):
    calls = iter(range(10**6))
    try:
        return metrics(world, path, data, SHORT, run, lambda: world.rank == world.size - 1 and next(calls) >= checks)
    except Stopped:
        return "stopped"


def test_a_killed_training_resumes_with_equal_scores(data, weights_file, tmp_path, monkeypatch):
    reference = metrics(SINGLE, weights_file, data, SWEEP)
    run = RunDir(tmp_path)
    for saves in (1, 3, 2, 1):  # after epochs 1, 4 and, of the last training, 2 and 3
        process = multiprocessing.get_context("fork").Process(
            target=killed_after, args=(saves, weights_file, data, run, monkeypatch)
        )
        process.start()
        assert wait_for_exit(process) == -signal.SIGKILL
        assert len(list((run.evals / "unfinished").iterdir())) == 1 and not run.eval_rows("linear").exists()
    assert metrics(SINGLE, weights_file, data, SWEEP, run) == reference


def killed_after(saves, path, data, run, monkeypatch):
    original, calls = training.state.write, []

    def write(*args):
        original(*args)
        calls.append(args)
        if len(calls) == saves:
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(training.state, "write", write)
    metrics(SINGLE, path, data, SWEEP, run)


def test_the_state_of_another_evaluation_and_a_damaged_one_are_ignored(tmp_path):
    def start(seed):
        return LinearHeads(3, 5, PROTOCOLS["msf"], [0.1], seed, SINGLE.device, 1)

    heads, other = start(0), start(1)
    heads.train_step(torch.ones(4, 5), torch.tensor([0, 1, 2, 0]))
    state.write(tmp_path / "state", "mine", heads.tensors(), {"step": 1})
    assert state.read(tmp_path / "state", "another") is None and state.read(tmp_path / "absent", "mine") is None
    tensors, note = state.read(tmp_path / "state", "mine")
    other.restore(tensors, note["step"])
    for h in (heads, other):
        h.train_step(torch.ones(4, 5), torch.tensor([1, 1, 2, 0]))
    assert torch.equal(heads.weight_RCD, other.weight_RCD) and torch.equal(heads.bias_RC, other.bias_RC)
    (tmp_path / "state").write_bytes((tmp_path / "state").read_bytes()[:-9])
    assert state.read(tmp_path / "state", "mine") is None


@pytest.mark.parametrize(
    "options, what, hint",
    [
        ({"protocol": "mfs"}, "evals.linear.protocol", "'msf'"),
        ({"augment": "flip"}, "evals.linear.augment", "rrc_flip"),
        ({"epochs": 0}, "evals.linear.epochs", "1 or more"),
        ({"lr": -1}, "evals.linear.lr", "above 0"),
        ({"lr": float("inf")}, "evals.linear.lr", "above 0"),
        ({"lr_sweep": [0.1, float("nan")]}, "evals.linear.lr_sweep", "above 0"),
        ({"milestones": [5, 3]}, "evals.linear.milestones", "rising"),
        ({"milestones": [0]}, "evals.linear.milestones", "from 1"),
        ({"lr": 1, "lr_sweep": [1]}, "evals.linear.lr_sweep", "lr or lr_sweep"),
        ({"held_out": 5}, "evals.linear.held_out", "sweep"),
        ({"ecophs": 1}, "options of linear, key ecophs", "'epochs'"),
    ],
)
def test_invalid_options_are_refused(options, what, hint):
    with pytest.raises(ConfigError) as caught:
        load(LinearOptions, options, where="options of linear")
    assert caught.value.what == what and hint in caught.value.expected + caught.value.fix


def test_the_default_batch_above_the_training_set_is_refused(data, weights_file):
    with pytest.raises(EvalError) as caught:
        metrics(SINGLE, weights_file, data, {})
    assert caught.value.got.startswith("90 ") and "256" in caught.value.got


def test_holding_out_every_training_image_is_refused(data, weights_file):
    with pytest.raises(EvalError) as caught:
        metrics(SINGLE, weights_file, data, {"protocol": "byol", "held_out": 90})
    assert "held_out" in caught.value.what and "90 of 90" in caught.value.got and "held_out=9" in caught.value.fix
