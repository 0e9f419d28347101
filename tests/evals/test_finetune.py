import contextlib
import copy
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
from safetensors import safe_open
from torch import nn

from hpcssl.config import load
from hpcssl.data.order import Order
from hpcssl.errors import ConfigError, EvalError
from hpcssl.evals import finetune, tunings
from hpcssl.evals.features import Encoder
from hpcssl.evals.finetune import FinetuneOptions
from hpcssl.evals.heads import initial
from hpcssl.evals.images import Among, Images
from hpcssl.evals.run import evaluate
from hpcssl.evals.together import Stopped
from hpcssl.evals.tuner import Tuner
from hpcssl.evals.tunings import TUNINGS, Tuning, find
from hpcssl.files import RunDir
from hpcssl.views import augment
from hpcssl.views.augment import Augment, ViewSpec
from hpcssl.world import World

ALONE = World.alone()
CROPS = ViewSpec(name="rrc_flip", size=16, augment=Augment(scale=(0.08, 1.0), flip=0.5))
SOME = np.arange(60, 84)
ONE = {"protocol": "swav", "percent": 10, "lr": 0.02, "head_lr": 0.2, "epochs": 3, "train_batch": 40, "batch": 32}


def row_of(world, path, data, options, run=None, stop=None):
    train, val = data
    row = evaluate("finetune", run=run, weights=path, train=train, val=val, options=options, world=world, stop=stop)
    return {"metrics": row["metrics"], "details": row["details"]}


def literal(path, data, tuning, epochs):
    """The official loops with torch's own norm, optimisers and schedules, in float64 on the same crops."""
    encoder = Encoder.open(path, ALONE)
    backbone = copy.deepcopy(encoder.backbone).requires_grad_().double()
    head = nn.Linear(128, 4).double()
    weight, bias = initial(tuning.init, 4, 128, 0, "finetune")
    head.load_state_dict({"weight": weight, "bias": bias})
    network = nn.Sequential(backbone, head).train()
    (lr, head_lr), = tuning.rates
    sgd = torch.optim.SGD([{"params": backbone.parameters(), "lr": lr}, {"params": head.parameters(), "lr": head_lr}],
                          momentum=0.9, weight_decay=tuning.weight_decay, nesterov=tuning.nesterov)
    order = Order([24], seed=0, global_batch=tuning.batch, window="all")
    total = epochs * order.steps_per_epoch
    if tuning.milestones:
        decay = torch.optim.lr_scheduler.MultiStepLR(sgd, tuning.milestones, gamma=tuning.gamma)
    elif tuning.per == "epoch":
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, epochs)
    else:
        decay = torch.optim.lr_scheduler.LambdaLR(sgd, lambda step: (1 + math.cos(math.pi * step / total)) / 2)
    with Images(data, CROPS, Among(order, SOME), range(total)) as images:
        for batch in images:
            x = augment.apply(batch.images[0], batch.params[0], CROPS.augment, mean=encoder.meta["mean"],
                              std=encoder.meta["std"], dtype=torch.float64)
            loss = F.cross_entropy(network(x), torch.from_numpy(batch.label))
            sgd.zero_grad()
            loss.backward()
            sgd.step()
            if tuning.per == "step" or (batch.step + 1) % order.steps_per_epoch == 0:
                decay.step()
    return network


@pytest.mark.parametrize("tuning", [
    Tuning(rates=((0.01, 0.1),), batch=12, milestones=(1, 2), gamma=0.2, weight_decay=5e-4),  # OpenSelfSup, SwAV
    Tuning(rates=((0.03, 0.08),), batch=12),  # VICReg
    Tuning(rates=((0.05, 0.05),), batch=12, per="step", nesterov=True, init="truncated")])  # BYOL
def test_tuning_is_the_official_loop(tuning, data, weights_file):
    theirs = literal(weights_file, data[0], tuning, 3)
    tuner = trained(ALONE, weights_file, data[0], tuning)
    for ours, wanted in ((tuner.network.backbone, theirs[0]), (tuner.network.head, theirs[1])):
        wanted = wanted.state_dict()
        for name, value in ours.state_dict().items():
            torch.testing.assert_close(value, wanted[name], rtol=1e-9, atol=1e-11)
    index, view = np.arange(60), tuner_view(weights_file)
    score = tuner.score(data[1], index, view, at_once=17, threads=1, stop=lambda: False)
    theirs.eval()
    with torch.no_grad(), Images(data[1], view, Among(Order([60], seed=0, global_batch=60, window="all"), index),
                                 range(1)) as images:
        batch = next(images)
        logits = theirs(augment.apply(batch.images[0], batch.params[0], view.augment, dtype=torch.float64))
    y = torch.from_numpy(batch.label)
    assert score == {"top1": pytest.approx(100 * float((logits.argmax(1) == y).double().mean())), "top5": 100.0}


def tuner_view(path):
    return Encoder.open(path, ALONE).view(FinetuneOptions())


def trained(world, path, data, tuning, precision="fp64", epochs=3, steps=None):
    order = Order([24], seed=0, global_batch=tuning.batch, window="all")
    lr, head_lr = tuning.rates[0]
    tuner = Tuner(Encoder.open(path, world), 4, tuning, lr=lr, head_lr=head_lr, epochs=epochs,
                  steps_per_epoch=order.steps_per_epoch, precision=precision, seed=0, world=world)
    with Images(data, CROPS, Among(order, SOME), range(epochs * order.steps_per_epoch if steps is None else steps),
                rank=world.rank, size=world.size) as images:
        for batch in images:
            assert tuner.learn(*tuner.look(batch, CROPS), (False, world.rank == 1)) == (False, False, world.size > 1)
    return tuner


def test_in_float64_worlds_of_1_2_and_4_agree(data, weights_file, ranks):
    tuning = Tuning(rates=((0.02, 0.1),), batch=12, weight_decay=1e-4)
    alone = numbers(ALONE, weights_file, data, tuning)
    assert alone["score"]["top1"] > 25
    for size in (2, 4):
        for found in ranks(size, numbers, weights_file, data, tuning):
            assert found["score"] == alone["score"]
            for name, value in alone["tensors"].items():
                np.testing.assert_allclose(found["tensors"][name], value, rtol=0, atol=1e-8, err_msg=name)


def numbers(world, path, data, tuning):
    tuner = trained(world, path, data[0], tuning, epochs=2)
    score = tuner.score(data[1], np.arange(60), tuner_view(path), at_once=8, threads=1, stop=lambda: False)
    return {"score": score, "tensors": {name: value.numpy() for name, value in tuner.tensors().items()}}


def test_low_precision_trains_too(data, weights_file):
    """Its two steps go the way of those in float32, on float32 weights; float16 has a scaler, which is resumed."""
    tuning = Tuning(rates=((0.02, 0.1),), batch=12)
    start, full, low = (trained(ALONE, weights_file, data[0], tuning, p, steps=n).network.state_dict()
                        for p, n in (("fp32", 0), ("fp32", 2), ("bf16", 2)))
    assert all(value.dtype == torch.float32 for value in low.values())
    went, differs = (torch.cat([(a[name] - b[name]).flatten() for name in a]).norm()
                     for a, b in ((full, start), (low, full)))
    assert 0 < differs < 0.2 * went
    half = trained(ALONE, weights_file, data[0], tuning, "fp16", steps=0)
    state = half.scaler.state_dict() | {"scale": 64.0, "_growth_tracker": 7}
    half.restore(half.tensors(), 5, state)
    assert half.scaler.state_dict() == state and half.step == 5


def test_a_grid_is_judged_on_the_validation_set_as_the_original_does(data, weights_file, monkeypatch):
    grid = ((0.01, 0.1), (0.1, 0.1), (1e30, 1e30))  # the last one diverges
    monkeypatch.setitem(TUNINGS, "bsim", {1: TUNINGS["bsim"][1], 10: replace(TUNINGS["bsim"][10], rates=grid)})
    asked = {"percent": 10, "train_batch": 30, "epochs": 2}
    found = row_of(ALONE, weights_file, data, asked)
    trials = found["details"]["trials"]
    assert list(trials) == ["lr0.01_head0.1_ep2", "lr0.1_head0.1_ep2", "lr1e+30_head1e+30_ep2"]
    first, second, diverged = trials.values()
    assert diverged is None and first != second and found["metrics"]["top1"] == max(first, second)
    lr, head_lr = grid[int(second > first)]
    assert (found["details"]["lr"], found["details"]["head_lr"]) == (lr, head_lr)
    assert row_of(ALONE, weights_file, data, asked | {"lr": lr, "head_lr": head_lr})["metrics"] == found["metrics"]
    with pytest.raises(EvalError, match=r"lower evals\.finetune\.lr"):
        row_of(ALONE, weights_file, data, asked | {"lr": 1e30, "head_lr": 0.1})


def test_held_out_images_judge_and_the_best_trains_on_all(data, weights_file, monkeypatch):
    small = replace(TUNINGS["byol"][1], rates=((1e-6, 1e-6), (0.1, 0.1)), epochs=(1, 2))
    monkeypatch.setitem(TUNINGS, "byol", {1: small, 10: small})
    trials, finished = [], finetune._Work._finished
    monkeypatch.setattr(finetune._Work, "_finished", lambda work, trial: trials.append(trial) or finished(work, trial))
    found = row_of(ALONE, weights_file, data, {"protocol": "byol", "train_batch": 20, "held_out": 30})
    assert [(t.lr, t.epochs) for t in trials[:4]] == [(1e-6, 1), (0.1, 1), (1e-6, 2), (0.1, 2)]
    for trial in trials[:4]:
        assert trial.judge[0] is data[0] and len(trial.judge[1]) == 30
        assert sorted([*trial.learns, *trial.judge[1]]) == list(range(90))
    final = trials[4]
    assert final.learns.tolist() == list(range(90)) and final.judge[0] is data[1] and len(trials) == 5
    told = found["details"]["trials"]
    assert f"lr{final.lr:g}_head{final.head_lr:g}_ep{final.epochs}" == max(told, key=told.get)
    assert found["details"]["held_out"] == 30


def test_two_ranks_agree_on_one_answer_and_stop_together(data, weights_file, ranks, tmp_path):
    whole = ranks(2, row_of, weights_file, data, ONE)
    assert whole[0] == whole[1] and set(whole[0]["metrics"]) == {f"top{k}{w}" for k in (1, 5)
                                                                for w in ("", "_best", "_last")}
    run, stops = RunDir(tmp_path / "run"), 0
    while True:  # the signal comes to the last rank alone, in a step or while it scores
        outcome = ranks(2, stopped_after, weights_file, data, run, 2 + 2 * stops)
        if outcome[0] != "stopped":
            break
        assert outcome == ["stopped"] * 2
        stops += 1
    assert outcome == whole and stops >= 2
    assert not list((run.evals / "unfinished").iterdir())


def stopped_after(world, path, data, run, looks):
    calls = iter(range(10**6))
    try:
        return row_of(world, path, data, ONE, run, lambda: world.rank == world.size - 1 and next(calls) >= looks)
    except Stopped:
        return "stopped"


def test_killed_by_the_system_the_bits_are_the_same(data, weights_file, tmp_path, monkeypatch):
    grid = replace(TUNINGS["bsim"][10], rates=((0.01, 0.1), (0.02, 0.2)), epochs=(3,))
    monkeypatch.setitem(TUNINGS, "bsim", {1: grid, 10: grid})
    options = {"percent": 10, "train_batch": 40}
    states = []
    write = finetune.state.write
    monkeypatch.setattr(finetune.state, "write", lambda *args: states.append(copy.deepcopy(args[2:])) or write(*args))
    whole = row_of(ALONE, weights_file, data, options, RunDir(tmp_path / "whole"))
    first, second = "lr0.01_head0.1_ep3", "lr0.02_head0.2_ep3"
    assert [note.get("trial") for _, note in states] == [first, first, None, second, second, None]
    run = RunDir(tmp_path / "killed")
    for _ in range(2):  # after the first epoch, and after the second
        victim = multiprocessing.get_context("fork").Process(
            target=killed_after_one, args=(weights_file, data, options, run, monkeypatch, write))
        victim.start()
        victim.join(60)
        assert victim.exitcode == -signal.SIGKILL
    left, = (run.evals / "unfinished").iterdir()
    with safe_open(left, framework="pt") as file:
        kept = finetune.state.read(left, file.metadata()["identity"])
    assert kept[1] == states[1][1] and kept[0].keys() == states[1][0].keys()
    assert all(torch.equal(kept[0][name], value) for name, value in states[1][0].items())
    assert row_of(ALONE, weights_file, data, options, run) == whole


def killed_after_one(path, data, options, run, monkeypatch, write):
    def written(*args):
        write(*args)
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(finetune.state, "write", written)
    row_of(ALONE, path, data, options, run)


def test_the_published_values():
    bsim = TUNINGS["bsim"]
    assert {(lr, round(head / lr)) for lr, head in bsim[1].rates} == {
        (lr, by) for lr in (1e-3, 1e-2, 1e-1) for by in (1, 10, 100)}
    assert (bsim[1].weight_decay, bsim[10].weight_decay) == (5e-4, 1e-4)
    assert TUNINGS["swav"][1].rates == ((0.02, 5.0),) and TUNINGS["swav"][10].rates == ((0.01, 0.2),)
    simclr = TUNINGS["simclr"][1]
    assert simclr.optim("trunk", 0.005).name == "lars" and simclr.optim("head", 0.005).name == "sgd"


def test_the_percent_is_what_the_shards_say_or_is_asked_for(data):
    def shards(**made):
        return SimpleNamespace(meta={"plan": {"made": made}}, root="x")  # as hpcssl-shard subset writes it

    assert find("swav", None, shards(list=12811)) is TUNINGS["swav"][1]
    assert find("bsim", None, shards(fraction=0.1)) is TUNINGS["bsim"][10]
    assert find("bsim", 1, shards(fraction=0.1)) is TUNINGS["bsim"][1]
    assert find("byol", None, data[0]) == TUNINGS["byol"][1]
    with pytest.raises(EvalError, match="add percent=1 or percent=10"):
        find("vicreg", None, data[0])
    assert tunings.LISTS == {12811: 1, 128116: 10}


def test_wrong_input_is_one_sentence(data, weights_file, ranks, shards_of, tmp_path):
    for wrong, told in (({"protocol": "bism"}, "did you mean 'bsim'"), ({"percent": 5}, "1 or 10"),
                        ({"lr": 0.1}, "both or neither"), ({"epochs": 0}, "evals.finetune.epochs"),
                        ({"precision": "fp8"}, "precision"), ({"held_out": 3}, "holds images out"),
                        ({"head_rl": 1}, "did you mean 'head_lr'")):
        with pytest.raises(ConfigError, match=told):
            load(FinetuneOptions, wrong, where="options of finetune")
    with pytest.raises(EvalError, match=r"90 labelled images, batch 256.*train_batch=90"):
        row_of(ALONE, weights_file, data, {"percent": 1})
    images = np.random.default_rng(0).integers(0, 255, (40, 16, 16, 3), np.uint8)
    damaged = shards_of(tmp_path / "damaged", images, np.arange(40) % 4)
    row = damaged.rows[13]
    with open(damaged.path(0), "r+b") as file:
        file.seek(int(row["offset"]))
        file.write(bytes(int(row["size"])))
    for said in ranks(2, error_of, weights_file, (damaged, data[1])):  # one rank meets it, both say it
        assert "00013" in said[0] and "whole images" in said[0]
        assert "a batch of 5 on 2 ranks" in said[1] and "train_batch=4" in said[1]


def error_of(world, path, data):
    said = []
    for more in ({}, {"train_batch": 5}):
        with contextlib.suppress(Stopped):
            try:
                row_of(world, path, data, ONE | {"train_batch": 20} | more)
            except EvalError as error:
                said.append(str(error))
    return said
