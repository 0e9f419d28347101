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
from hpcssl.errors import ConfigError, EvalError
from hpcssl.evals import choice, linear, state
from hpcssl.evals.features import Encoder, FeatureOptions, extract
from hpcssl.evals.heads import INITS, Heads, initial
from hpcssl.evals.linear import LinearOptions
from hpcssl.evals.protocols import PROTOCOLS, Protocol
from hpcssl.evals.run import evaluate
from hpcssl.evals.together import Stopped
from hpcssl.files import RunDir
from hpcssl.world import World

ALONE = World.alone()
SHORT = {"epochs": 4, "milestones": [2, 3], "train_batch": 32, "lr": 0.05, "batch": 12}
CENTER = SHORT | {"protocol": "msf_center", "batch": 32}
SWEEP = {"protocol": "byol", "epochs": 4, "train_batch": 20, "augment": "center", "batch": 32, "held_out": 30,
         "sweep": [3.0, 30.0]}
RATE = 3.0


def test_options_replace_what_the_protocol_says():
    changed = LinearOptions(protocol="msf_center", epochs=3, train_batch=16).resolve()
    assert changed == replace(PROTOCOLS["msf"], epochs=3, batch=16, augment="center")
    assert LinearOptions(protocol="byol", lr=0.7).resolve().sweep == ()
    assert LinearOptions(protocol="moco", sweep=[3.0, 0.3]).resolve().sweep == (3.0, 0.3)
    assert LinearOptions(protocol="swav", milestones=[2]).resolve().schedule().shape == "steps"


def test_msf_center_agrees_with_a_literal_loop(data, weights_file, monkeypatch):
    """MSF's eval_linear.py, as it stands there, on the features that we cache."""
    train, val = data
    scores, ours = [], []
    summary = choice.summary
    monkeypatch.setattr(choice, "summary", lambda found, report: ours.extend(found) or summary(found, report))
    row = evaluate("linear", run=None, weights=weights_file, train=train, val=val, options=CENTER, world=ALONE)
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
    return torch.cat(extract(Encoder.open(path, ALONE), shards, FeatureOptions(batch=32), ALONE).parts)


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
            lr, decay = {"swav": (0.3 * by_epoch, 1e-6), "msf": (0.01 * 0.1 ** sum(epoch >= e for e in (15, 30, 40)),
                                                                 1e-4)}.get(name, (30.0 * decayed, 0.0))
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
def test_each_protocol_is_the_official_loop(name):
    """Three steps an epoch: the rates of all its epochs, and the weights for as long as rounding lets them agree."""
    protocol = replace(PROTOCOLS[name], batch=12)
    x, y = draw_features(36, 10, 5, 3)
    heads = Heads(5, 10, protocol, [protocol.lr], 0, ALONE.device, 3)
    start = heads.weight_RCD[0].clone(), heads.bias_RC[0].clone()
    batches = [(x[12 * (i % 3):][:12], y[12 * (i % 3):][:12]) for i in range(3 * protocol.epochs)]
    for step, (weight, bias, lr) in enumerate(literal(name, batches, *start, protocol.epochs, 3, 12)):
        heads.learn(*batches[step])
        assert heads.optimizers[0].param_groups[0]["lr"] == pytest.approx(lr)
        if step == (4 if protocol.lr > 10 else 40):
            for ours, theirs, before in ((heads.weight_RCD, weight, start[0]), (heads.bias_RC, bias, start[1])):
                moved = float((theirs - before).abs().max())
                torch.testing.assert_close(ours[0], theirs, rtol=0, atol=2e-3 * moved)


def test_heads_side_by_side_are_the_heads_alone():
    protocol = replace(PROTOCOLS["nnclr"], init="torch", batch=20, epochs=5)
    x, y = draw_features(40, 12, 6, 1)
    together = Heads(6, 12, protocol, [0.5, 3.0, 20.0], 0, ALONE.device, 2)
    apart = [Heads(6, 12, protocol, [rate], 0, ALONE.device, 2) for rate in (0.5, 3.0, 20.0)]
    for step in range(10):
        for heads in (together, *apart):
            heads.learn(x[step % 2 * 20:][:20], y[step % 2 * 20:][:20])
    for r, alone in enumerate(apart):
        torch.testing.assert_close(together.weight_RCD[r], alone.weight_RCD[0], rtol=1e-4, atol=1e-5)
    assert together.score(x, y) == [alone.score(x, y)[0] for alone in apart]
    assert len({score["top1"] for score in together.score(x, y)}) > 1


def test_a_head_comes_to_the_solution_of_logistic_regression():
    """SGD with weight decay d minimises the mean cross-entropy + d/2 |w|², which is scikit-learn's C = 1 / (n d)."""
    protocol = Protocol(lr=0.5, weight_decay=0.02, batch=60, epochs=400, init="zeros")
    x, y = draw_features(60, 6, 4, 2)
    heads = Heads(4, 6, protocol, [0.5], 0, ALONE.device, 1)
    extended = torch.cat((x, torch.ones(60, 1)), 1)  # the bias decays too
    for _ in range(400):
        heads.learn(x, y)
    theirs = LogisticRegression(C=1 / (60 * 0.02), fit_intercept=False, tol=1e-8, max_iter=1000).fit(
        extended.double().numpy(), y.numpy())
    ours = torch.cat((heads.weight_RCD[0], heads.bias_RC[0][:, None]), 1)
    torch.testing.assert_close(ours, torch.as_tensor(theirs.coef_).float(), rtol=0, atol=2e-3)


def test_initial_values_have_the_stated_distributions():
    torch_w, torch_b = initial("torch", 50, 100, 1)
    assert torch_w.abs().max() <= 0.1 and torch_w.std() == pytest.approx(0.1 / 3**0.5, rel=0.05) and torch_b.any()
    normal, _ = initial("normal", 50, 100, 1)
    assert normal.std() == pytest.approx(0.01, rel=0.05)
    cut, _ = initial("truncated", 50, 100, 1)
    assert cut.abs().max() <= 0.2 and cut.std() == pytest.approx(0.088, rel=0.05)
    assert not any(initial(kind, 50, 100, 1)[1].any() for kind in ("normal", "truncated", "zeros"))
    assert {p.init for p in PROTOCOLS.values()} == set(INITS)


def test_scores_are_torchs_and_a_diverged_head_has_none():
    x, y = draw_features(40, 6, 9, 0)
    heads = Heads(9, 6, PROTOCOLS["msf"], [0.3, 0.3], 1, ALONE.device, 1)
    logits = x @ heads.weight_RCD[0].T + heads.bias_RC[0]
    five = (logits.topk(5).indices == y[:, None]).any(1)
    first = {"top1": pytest.approx(100 * float((logits.argmax(1) == y).double().mean())),
             "top5": pytest.approx(100 * float(five.double().mean()))}
    assert heads.score(x, y) == [first, first]
    heads.weight_RCD[1, 0, 0] = float("nan")
    assert heads.score(x, y) == [first, {"top1": 0.0, "top5": 0.0}]
    heads.weight_RCD[0].zero_(), heads.bias_RC[0].zero_()
    assert heads.score(x, y)[0]["top1"] == 100 * float((y == 0).double().mean())  # equal logits: the lowest class
    heads.weight_RCD[0, 0, 0] = float("nan")
    with pytest.raises(EvalError, match=r"lower evals\.linear\.lr"):
        heads.score(x, y)


def test_best_and_last_epochs_are_told_and_one_is_the_score():
    scores = [{"top1": 1.0, "top5": 9.0}, {"top1": 3.0, "top5": 5.0}, {"top1": 3.0, "top5": 6.0},
              {"top1": 2.0, "top5": 4.0}]
    both = {"top1_best": 3.0, "top5_best": 5.0, "top1_last": 2.0, "top5_last": 4.0}  # best: the first of the best
    assert choice.summary(scores, "best") == both | {"top1": 3.0, "top5": 5.0}
    assert choice.summary(scores, "last") == both | {"top1": 2.0, "top5": 4.0}


def test_a_sweep_is_judged_by_held_out_images_alone_and_its_best_rate_trains_on_all(data, weights_file, monkeypatch):
    options, tasks, train = SWEEP | {"protocol": "moco", "sweep": [1e-6, RATE, 1e-5]}, [], linear._Work.train
    monkeypatch.setattr(linear._Work, "train", lambda work, task: tasks.append(task) or train(work, task))
    row = evaluate("linear", run=None, weights=weights_file, train=data[0], val=data[1], options=options, world=ALONE)
    swept = row["details"]["held_out"]["top1"]
    assert list(swept) == [str(rate) for rate in options["sweep"]] and len(set(swept.values())) > 1
    assert max(swept, key=swept.get) == str(RATE) and row["details"]["lr"] == RATE
    sweep, final = tasks
    held = np.setdiff1d(np.arange(90), sweep.index)
    assert len(held) == 30 and sweep.test()[1].tolist() == data[0].labels[held].tolist()
    assert final.index.tolist() == list(range(90)) and final.test()[1].tolist() == data[1].labels.tolist()
    alone = {k: v for k, v in options.items() if k not in ("sweep", "held_out")} | {"lr": RATE}
    assert metrics(ALONE, weights_file, data, alone) == row["metrics"] and len(tasks) == 3


@pytest.mark.parametrize("samples, classes, held", [(1281167, 1000, 10009), (50000, 10, 391), (1400, 10, 100),
                                                     (90, 4, 9), (9, 3, 1)])
def test_the_size_of_the_held_out_part(samples, classes, held):
    assert len(set(choice.held_out(samples, classes, 0, None).tolist())) == held
    assert len(choice.held_out(samples, classes, 0, 3)) == 3


def test_augmented_steps_use_new_crops_of_the_right_samples(data, weights_file):
    """Rank r's stream holds steps r, r + W, …, and a sample's crops differ from epoch to epoch."""
    encoder, order = Encoder.open(weights_file, ALONE), Order([90], seed=0, global_batch=32, window="all")

    def features(rank, size, total):
        with contextlib.ExitStack() as closing:
            context = SimpleNamespace(world=SimpleNamespace(rank=rank, size=1, device=ALONE.device, gather=lambda x: x,
                                                            gather_text=lambda t: [t]),
                                      train=data[0], encoder=encoder, threads=2, closing=closing,
                                      options=LinearOptions(batch=12, interpolation="bilinear"))
            work = linear._Work(context, replace(PROTOCOLS["moco"], batch=32), None)
            source, width = work._source(linear._Task("x", [1.0], np.arange(90), None), order, 0, total)
            assert width == 1
            return [(x.clone(), y) for step in range(total) for x, y in source(range(step, step + 1))]

    steps = features(0, 1, 4)
    for step, (_, y) in enumerate(steps):
        assert torch.equal(y, torch.as_tensor(data[0].labels[order.batch(step)]))
    first = {int(i): f for step in (0, 1) for i, f in zip(order.batch(step), steps[step][0], strict=True)}
    second = {int(i): f for step in (2, 3) for i, f in zip(order.batch(step), steps[step][0], strict=True)}
    both = first.keys() & second.keys()
    assert len(both) > 20 and not any(torch.equal(first[i], second[i]) for i in both)


@pytest.mark.parametrize("options, sizes", [(SHORT, (2, 4, 3)), (SWEEP, (2,))])
def test_worlds_of_1_2_and_4_give_the_same_numbers(options, sizes, data, weights_file, ranks):
    alone = metrics(ALONE, weights_file, data, options)
    for size in sizes:  # 8 steps: rank 3 of 4 has its share, and so has the short last round of 3
        assert ranks(size, metrics, weights_file, data, options) == [alone] * size


def metrics(world, path, data, options, run=None, stop=None):
    train, val = data
    return evaluate("linear", run=run, weights=path, train=train, val=val, options=options, world=world,
                    stop=stop)["metrics"]


def test_preempted_at_any_moment_the_numbers_are_the_same(data, weights_file, ranks, tmp_path):
    alone = metrics(ALONE, weights_file, data, SHORT)
    run, stops = RunDir(tmp_path / "run"), 0
    while True:  # the signal comes to the last rank alone, at its first or second look at the flag
        outcome = ranks(2, stopped_after, weights_file, data, run, stops % 2)
        if outcome[0] != "stopped":
            break
        assert outcome == ["stopped"] * 2
        stops += 1
    assert outcome == [alone] * 2 and stops >= 4
    assert not list((run.evals / "unfinished").iterdir())


def test_protocols_run_by_name_and_a_batch_above_the_set_is_refused(data, weights_file):
    for name in ("byol", "simsiam"):
        found = metrics(ALONE, weights_file, data, {"protocol": name, "train_batch": 40, "epochs": 1, "batch": 64})
        assert found["top1"] == found[f"top1_{PROTOCOLS[name].report}"] and 10 < found["top1"] <= 100
    for name in set(PROTOCOLS) - {"msf", "msf_center"}:
        with pytest.raises(EvalError, match=r"(81|90) training images, batch \d+; .* train_batch=(81|90)"):
            metrics(ALONE, weights_file, data, {"protocol": name})


def stopped_after(world, path, data, run, looks):
    calls = iter(range(10**6))
    try:
        return metrics(world, path, data, SHORT, run, lambda: world.rank == world.size - 1 and next(calls) >= looks)
    except Stopped:
        return "stopped"


def test_killed_by_the_system_the_numbers_are_the_same(data, weights_file, tmp_path, monkeypatch):
    alone = metrics(ALONE, weights_file, data, SWEEP)
    run = RunDir(tmp_path)
    for saves in (1, 3, 2, 1):  # after epochs 1, 4 and, of the last training, 2 and 3
        victim = multiprocessing.get_context("fork").Process(
            target=killed_after, args=(saves, weights_file, data, run, monkeypatch))
        victim.start()
        victim.join(60)
        assert victim.exitcode == -signal.SIGKILL
        assert len(list((run.evals / "unfinished").iterdir())) == 1 and not run.eval_rows("linear").exists()
    assert metrics(ALONE, weights_file, data, SWEEP, run) == alone


def killed_after(saves, path, data, run, monkeypatch):
    before, done = linear.state.write, []

    def write(*args):
        before(*args)
        done.append(args)
        if len(done) == saves:
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(linear.state, "write", write)
    metrics(ALONE, path, data, SWEEP, run)


def test_another_evaluations_state_is_not_taken(tmp_path):
    def start(seed):
        return Heads(3, 5, PROTOCOLS["msf"], [0.1], seed, ALONE.device, 1)

    heads, other = start(0), start(1)
    heads.learn(torch.ones(4, 5), torch.tensor([0, 1, 2, 0]))
    state.write(tmp_path / "state", "mine", heads.tensors(), {"step": 1})
    assert state.read(tmp_path / "state", "another") is None and state.read(tmp_path / "absent", "mine") is None
    tensors, note = state.read(tmp_path / "state", "mine")
    other.restore(tensors, note["step"])
    for h in (heads, other):
        h.learn(torch.ones(4, 5), torch.tensor([1, 1, 2, 0]))
    assert torch.equal(heads.weight_RCD, other.weight_RCD) and torch.equal(heads.bias_RC, other.bias_RC)
    (tmp_path / "state").write_bytes((tmp_path / "state").read_bytes()[:-9])
    assert state.read(tmp_path / "state", "mine") is None


def test_wrong_options_are_one_sentence(data, weights_file):
    for wrong, told in (({"protocol": "mfs"}, "did you mean 'msf'"), ({"augment": "flip"}, "option augment"),
                        ({"epochs": 0}, "evals.linear.epochs"), ({"lr": -1}, "evals.linear.lr"),
                        ({"lr": 1, "sweep": [1]}, "not both"), ({"held_out": 5}, "chooses among rates"),
                        ({"ecophs": 1}, "did you mean 'epochs'")):
        with pytest.raises(ConfigError, match=told):
            load(LinearOptions, wrong, where="options of linear")
    with pytest.raises(EvalError, match="90 training images, batch 256"):
        metrics(ALONE, weights_file, data, {})
