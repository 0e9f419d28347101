import contextlib
import multiprocessing
import os
import signal
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hpcssl import rng
from hpcssl.config import load
from hpcssl.data.order import Order
from hpcssl.errors import ConfigError, EvalError
from hpcssl.evals import linear
from hpcssl.evals.features import Encoder, FeatureOptions, Features, extract
from hpcssl.evals.linear import Head, LinearOptions, Protocol
from hpcssl.evals.run import evaluate
from hpcssl.evals.together import Stopped
from hpcssl.files import RunDir
from hpcssl.world import World

ALONE = World.alone()
SHORT = {"epochs": 4, "milestones": [2, 3], "train_batch": 32, "lr": 0.05, "batch": 32}
CENTER = SHORT | {"protocol": "msf_center"}


def test_the_msf_protocol_is_the_published_one():
    assert linear.PROTOCOLS["msf"] == Protocol(lr=0.01, momentum=0.9, weight_decay=1e-4, batch=256, epochs=40,
                                               milestones=[15, 30, 40], augment="rrc_flip")
    changed = LinearOptions(protocol="msf_center", epochs=3, train_batch=16).resolve()
    assert changed == Protocol(epochs=3, batch=16, augment="center")


def test_msf_center_agrees_with_a_literal_loop(data, weights_file, monkeypatch):
    """MSF's eval_linear.py, as it stands there, on the features that we cache."""
    train, val = data
    scores, ours = [], []
    summary = linear._summary
    monkeypatch.setattr(linear, "_summary", lambda found: ours.extend(found) or summary(found))
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


def test_the_head_scores_and_decays_as_torch_does():
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(40, 6, generator=draw), torch.randint(9, (40,), generator=draw)
    head = Head.start(9, 6, Protocol(lr=0.3), 1, ALONE.device)
    logits = x @ head.weight_CD.detach().T + head.bias_C.detach()
    five = (logits.topk(5).indices == y[:, None]).any(1)
    assert head.score(x, y) == {"top1": pytest.approx(100 * float((logits.argmax(1) == y).double().mean())),
                                "top5": pytest.approx(100 * float(five.double().mean()))}
    assert head.weight_CD.abs().max() <= 6**-0.5 and head.weight_CD.std() > 0.5 * 6**-0.5
    with torch.no_grad():
        head.weight_CD.zero_(), head.bias_C.zero_()
    assert head.score(x, y)["top1"] == 100 * float((y == 0).double().mean())  # equal logits: the lowest class
    head.weight_CD.data[0, 0] = float("nan")
    with pytest.raises(EvalError, match=r"lower evals\.linear\.lr"):
        head.score(x, y)


def test_the_best_epoch_is_the_first_of_the_best():
    scores = [{"top1": 1.0, "top5": 9.0}, {"top1": 3.0, "top5": 5.0}, {"top1": 3.0, "top5": 6.0},
              {"top1": 2.0, "top5": 4.0}]
    assert linear._summary(scores) == {"top1": 3.0, "top5": 5.0, "top1_last": 2.0, "top5_last": 4.0}


def test_augmented_steps_use_new_crops_of_the_right_samples(data, weights_file):
    """Rank r's stream holds steps r, r + W, …, and a sample's crops differ from epoch to epoch."""
    encoder, order = Encoder.open(weights_file, ALONE), Order([90], seed=0, global_batch=32, window="all")

    def features(rank, size, total):
        with contextlib.ExitStack() as closing:
            context = SimpleNamespace(world=SimpleNamespace(rank=rank, size=1, device=ALONE.device, gather=lambda x: x,
                                                            gather_text=lambda t: [t]),
                                      train=data[0], encoder=encoder, threads=2, closing=closing,
                                      options=LinearOptions(batch=32))
            source, width = linear._source(context, Protocol(batch=32), order, Features([torch.zeros(90, 128)],
                                           data[0].labels), 0, total)
            assert width == 1
            return [(x.clone(), y) for step in range(total) for x, y in source(range(step, step + 1))]

    steps = features(0, 1, 4)
    for step, (_, y) in enumerate(steps):
        assert torch.equal(y, torch.as_tensor(data[0].labels[order.batch(step)]))
    first = {int(i): f for step in (0, 1) for i, f in zip(order.batch(step), steps[step][0], strict=True)}
    second = {int(i): f for step in (2, 3) for i, f in zip(order.batch(step), steps[step][0], strict=True)}
    both = first.keys() & second.keys()
    assert len(both) > 20 and not any(torch.equal(first[i], second[i]) for i in both)


@pytest.mark.parametrize("options", [SHORT, CENTER])
def test_worlds_of_1_2_and_4_give_the_same_numbers(options, data, weights_file, ranks):
    alone = metrics(ALONE, weights_file, data, options)
    for size in (2, 4):  # 8 steps: rank 3 of 4 has its share, and so has the short last round of 3
        assert ranks(size, metrics, weights_file, data, options) == [alone] * size
    assert ranks(3, metrics, weights_file, data, options) == [alone] * 3


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


def stopped_after(world, path, data, run, looks):
    calls = iter(range(10**6))
    try:
        return metrics(world, path, data, SHORT, run, lambda: world.rank == world.size - 1 and next(calls) >= looks)
    except Stopped:
        return "stopped"


def test_killed_by_the_system_the_numbers_are_the_same(data, weights_file, tmp_path, monkeypatch):
    alone = metrics(ALONE, weights_file, data, CENTER)
    run = RunDir(tmp_path)
    for saves in (1, 2):
        victim = multiprocessing.get_context("fork").Process(
            target=killed_after, args=(saves, weights_file, data, run, monkeypatch))
        victim.start()
        victim.join(60)
        assert victim.exitcode == -signal.SIGKILL
        assert len(list((run.evals / "unfinished").iterdir())) == 1 and not run.eval_rows("linear").exists()
    assert metrics(ALONE, weights_file, data, CENTER, run) == alone


def killed_after(saves, path, data, run, monkeypatch):
    before, done = Head.save, []

    def save(head, *args):
        before(head, *args)
        done.append(head.step)
        if len(done) == saves:
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(Head, "save", save)
    metrics(ALONE, path, data, CENTER, run)


def test_another_evaluations_state_is_not_taken(tmp_path):
    head = Head.start(3, 5, Protocol(), 0, ALONE.device)
    head.learn(torch.ones(4, 5), torch.tensor([0, 1, 2, 0]), 0.1)
    head.save(tmp_path / "state", "mine")
    other = Head.start(3, 5, Protocol(), 1, ALONE.device)
    assert not other.load(tmp_path / "state", "another") and other.step == 0
    assert other.load(tmp_path / "state", "mine") and other.step == 1
    for h in (head, other):
        h.learn(torch.ones(4, 5), torch.tensor([1, 1, 2, 0]), 0.1)
    assert torch.equal(head.weight_CD, other.weight_CD) and torch.equal(head.bias_C, other.bias_C)


def test_wrong_options_are_one_sentence(data, weights_file):
    for wrong, told in (({"protocol": "mfs"}, "did you mean 'msf'"), ({"augment": "flip"}, "evals.linear.augment"),
                        ({"epochs": 0}, "evals.linear.epochs"), ({"lr": -1}, "evals.linear.lr"),
                        ({"ecophs": 1}, "did you mean 'epochs'")):
        with pytest.raises(ConfigError, match=told):
            load(LinearOptions, wrong, where="options of linear")
    with pytest.raises(EvalError, match="90 training images, batch 256"):
        metrics(ALONE, weights_file, data, {})
