"""Fine-tuning: equal to the official loops, on any number of ranks, and after interruptions."""

import contextlib
import copy
import math
import multiprocessing
import os
import re
import signal
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn

import data_prep.cli
import hpcssl.cli
from hpcssl.config import load
from hpcssl.data.order import Order
from hpcssl.data.shards import ShardSet
from hpcssl.distributed.world import World
from hpcssl.errors import ConfigError, EvalError, Stopped
from hpcssl.evals.common.encoder import FrozenEncoder
from hpcssl.evals.common.images import ImageStream, SubsetOrder
from hpcssl.evals.finetune import evaluate as finetune
from hpcssl.evals.finetune import protocols, trials
from hpcssl.evals.finetune.options import FinetuneOptions
from hpcssl.evals.finetune.protocols import PROTOCOLS, FinetuneProtocol, find_protocol
from hpcssl.evals.finetune.trainer import FinetuneTrainer
from hpcssl.evals.linear.heads import draw_initial_weights
from hpcssl.evals.run import evaluate
from hpcssl.files import sha256_of_file
from hpcssl.run_dir import RunDir
from hpcssl.views import augment
from hpcssl.views.augment import Augmentation, ViewSpec
from tests.tolerances import of_step, rounding
from tests.waiting import wait_for_exit

SINGLE = World.single_process()
CROPS = ViewSpec(name="rrc_flip", size=16, augment=Augmentation(scale=(0.08, 1.0), flip=0.5))
SUBSET = np.arange(60, 84)
ONE = {
    "protocol": "swav",
    "percent": 10,
    "lr": 0.02,
    "head_lr": 0.2,
    "epochs": 3,
    "train_batch": 40,
    "forward_batch": 32,
}


def row_of(world, path, data, options, run=None, stop=None):
    train, val = data
    row = evaluate("finetune", run=run, weights=path, train=train, val=val, options=options, world=world, stop=stop)
    return {"metrics": row["metrics"], "details": row["details"]}


def literal(path, data, protocol, epochs):
    """Train by the official loops with torch's norms, optimizers and schedules, in float64 on the same crops."""
    encoder = FrozenEncoder.open(path, SINGLE)
    backbone = copy.deepcopy(encoder.backbone).requires_grad_().double()
    head = nn.Linear(128, 4).double()
    weight, bias = draw_initial_weights(protocol.init, 4, 128, 0, "finetune")
    head.load_state_dict({"weight": weight, "bias": bias})
    network = nn.Sequential(backbone, head).train()
    ((lr, head_lr),) = protocol.rates
    sgd = torch.optim.SGD(
        [{"params": backbone.parameters(), "lr": lr}, {"params": head.parameters(), "lr": head_lr}],
        momentum=0.9,
        weight_decay=protocol.weight_decay,
        nesterov=protocol.nesterov,
    )
    order = Order([24], seed=0, global_batch=protocol.batch, window="all")
    total = epochs * order.steps_per_epoch
    if protocol.milestones:
        decay = torch.optim.lr_scheduler.MultiStepLR(sgd, protocol.milestones, gamma=protocol.gamma)
    elif protocol.interval == "epoch":
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, epochs)
    else:
        decay = torch.optim.lr_scheduler.LambdaLR(sgd, lambda step: (1 + math.cos(math.pi * step / total)) / 2)
    with ImageStream(data, CROPS, SubsetOrder(order, SUBSET), range(total)) as images:
        for batch in images:
            x = augment.augment_batch(
                batch.images[0],
                batch.params[0],
                CROPS.augment,
                mean=encoder.meta["mean"],
                std=encoder.meta["std"],
                dtype=torch.float64,
            )
            loss = F.cross_entropy(network(x), torch.from_numpy(batch.label))
            sgd.zero_grad()
            loss.backward()
            sgd.step()
            if protocol.interval == "step" or (batch.step + 1) % order.steps_per_epoch == 0:
                decay.step()
    return network


@pytest.mark.parametrize(
    "protocol",
    [
        FinetuneProtocol(
            rates=((0.01, 0.1),), batch=12, milestones=(1, 2), gamma=0.2, weight_decay=5e-4
        ),  # OpenSelfSup, SwAV
        FinetuneProtocol(rates=((0.03, 0.08),), batch=12),  # VICReg
        FinetuneProtocol(rates=((0.05, 0.05),), batch=12, interval="step", nesterov=True, init="truncated"),
    ],
)  # BYOL
def test_training_and_scoring_equal_the_official_loops(protocol, data, weights_file):
    theirs = literal(weights_file, data[0], protocol, 3)
    trainer = train(SINGLE, weights_file, data[0], protocol)
    for ours, wanted in ((trainer.network.backbone, theirs[0]), (trainer.network.head, theirs[1])):
        wanted = wanted.state_dict()
        for name, value in ours.state_dict().items():
            # all parameters perturbed by a relative 1e-11: after six steps they differed by up to 1.9 times as much
            scale = max(1.0, float(value.abs().max()))
            torch.testing.assert_close(value, wanted[name], rtol=0, atol=of_step(6, amplification=2, scale=scale))
    index, view = np.arange(60), scoring_view(weights_file)
    score = trainer.score(data[1], index, view, batch=17, threads=1, stop=lambda: False)
    theirs.eval()
    with (
        torch.no_grad(),
        ImageStream(
            data[1], view, SubsetOrder(Order([60], seed=0, global_batch=60, window="all"), index), range(1)
        ) as images,
    ):
        batch = next(images)
        logits = theirs(augment.augment_batch(batch.images[0], batch.params[0], view.augment, dtype=torch.float64))
    y = torch.from_numpy(batch.label)
    assert score == {"top1": pytest.approx(100 * float((logits.argmax(1) == y).double().mean())), "top5": 100.0}


def scoring_view(path):
    return FrozenEncoder.open(path, SINGLE).view(FinetuneOptions())


def train(world, path, data, protocol, precision="fp64", epochs=3, steps=None):
    order = Order([24], seed=0, global_batch=protocol.batch, window="all")
    lr, head_lr = protocol.rates[0]
    trainer = FinetuneTrainer(
        FrozenEncoder.open(path, world),
        4,
        protocol,
        lr=lr,
        head_lr=head_lr,
        epochs=epochs,
        steps_per_epoch=order.steps_per_epoch,
        precision=precision,
        seed=0,
        world=world,
    )
    with ImageStream(
        data,
        CROPS,
        SubsetOrder(order, SUBSET),
        range(epochs * order.steps_per_epoch if steps is None else steps),
        rank=world.rank,
        size=world.size,
    ) as images:
        for batch in images:
            assert trainer.train_step(*trainer.prepare(batch, CROPS), stop=False, failed=world.rank == 1) == (
                False,
                False,
                world.size > 1,
            )
    return trainer


def test_weights_and_scores_of_1_2_and_4_ranks_agree_in_float64(data, weights_file, run_ranks):
    protocol = FinetuneProtocol(rates=((0.02, 0.1),), batch=12, weight_decay=1e-4)
    reference = train_and_score(SINGLE, weights_file, data, protocol)
    assert reference["score"]["top1"] > 25
    for size in (2, 4):
        for result in run_ranks(size, train_and_score, weights_file, data, protocol):
            assert result["score"] == reference["score"]
            for name, value in reference["tensors"].items():
                tolerance = of_step(4, amplification=2, scale=max(1.0, np.abs(value).max()))
                np.testing.assert_allclose(result["tensors"][name], value, rtol=0, atol=tolerance, err_msg=name)


def train_and_score(world, path, data, protocol):
    trainer = train(world, path, data[0], protocol, epochs=2)
    score = trainer.score(data[1], np.arange(60), scoring_view(path), batch=8, threads=1, stop=lambda: False)
    return {"score": score, "tensors": {name: value.numpy() for name, value in trainer.tensors().items()}}


def test_bf16_trains_like_fp32_and_the_fp16_scaler_is_resumed(data, weights_file):
    """Two steps of bf16 move fp32 weights nearly as steps of fp32 do. The loss scaler of fp16 is resumed."""
    protocol = FinetuneProtocol(rates=((0.02, 0.1),), batch=12)
    start, full, low = (
        train(SINGLE, weights_file, data[0], protocol, p, steps=n).network.state_dict()
        for p, n in (("fp32", 0), ("fp32", 2), ("bf16", 2))
    )
    assert all(value.dtype == torch.float32 for value in low.values())
    distance, difference = (
        torch.cat([(a[name] - b[name]).flatten() for name in a]).norm() for a, b in ((full, start), (low, full))
    )
    # The inputs, weights and results of seven products are rounded, forward and backward: 42 roundings. Half of the
    # bound on two rounded results, since those in fp32 count as exact.
    assert 0 < difference < rounding(torch.bfloat16, 42) / 2 * distance
    half = train(SINGLE, weights_file, data[0], protocol, "fp16", steps=0)
    state = half.scaler.state_dict() | {"scale": 64.0, "_growth_tracker": 7}
    half.restore(half.tensors(), 5, state)
    assert half.scaler.state_dict() == state and half.step == 5


def test_the_best_trial_on_the_validation_set_gives_the_score(data, weights_file, monkeypatch):
    grid = ((0.01, 0.1), (0.1, 0.1), (1e30, 1e30))  # the last one diverges
    monkeypatch.setitem(PROTOCOLS, "bsim", {1: PROTOCOLS["bsim"][1], 10: replace(PROTOCOLS["bsim"][10], rates=grid)})
    options = {"percent": 10, "train_batch": 30, "epochs": 2}
    row = row_of(SINGLE, weights_file, data, options)
    trials = row["details"]["trials"]
    assert list(trials) == ["lr0.01_head0.1_ep2", "lr0.1_head0.1_ep2", "lr1e+30_head1e+30_ep2"]
    first, second, diverged = trials.values()
    assert diverged is None and first != second and row["metrics"]["top1"] == max(first, second)
    lr, head_lr = grid[int(second > first)]
    assert (row["details"]["lr"], row["details"]["head_lr"]) == (lr, head_lr)
    assert row_of(SINGLE, weights_file, data, options | {"lr": lr, "head_lr": head_lr})["metrics"] == row["metrics"]
    with pytest.raises(EvalError) as caught:
        row_of(SINGLE, weights_file, data, options | {"lr": 1e30, "head_lr": 0.1})
    assert caught.value.what == "fine-tuning" and "evals.finetune.lr" in caught.value.fix


def test_held_out_images_choose_the_trial_that_trains_on_all_images(data, weights_file, monkeypatch):
    small = replace(PROTOCOLS["byol"][1], rates=((1e-6, 1e-6), (0.1, 0.1)), epochs=(1, 2))
    monkeypatch.setitem(PROTOCOLS, "byol", {1: small, 10: small})
    ran, run_trial = [], trials.TrialRunner.run_trial
    monkeypatch.setattr(
        trials.TrialRunner, "run_trial", lambda work, trial: ran.append(trial) or run_trial(work, trial)
    )
    row = row_of(SINGLE, weights_file, data, {"protocol": "byol", "train_batch": 20, "held_out": 30})
    assert [(t.lr, t.epochs) for t in ran[:4]] == [(1e-6, 1), (0.1, 1), (1e-6, 2), (0.1, 2)]
    for trial in ran[:4]:
        assert trial.judge[0] is data[0] and len(trial.judge[1]) == 30
        assert sorted([*trial.train_index, *trial.judge[1]]) == list(range(90))
    final = ran[4]
    assert final.train_index.tolist() == list(range(90)) and final.judge[0] is data[1] and len(ran) == 5
    scores = row["details"]["trials"]
    assert f"lr{final.lr:g}_head{final.head_lr:g}_ep{final.epochs}" == max(scores, key=scores.get)
    assert row["details"]["held_out"] == 30


def test_ranks_return_one_result_and_stop_together_at_any_moment(data, weights_file, run_ranks, tmp_path):
    whole = run_ranks(2, row_of, weights_file, data, ONE)
    assert whole[0] == whole[1] and set(whole[0]["metrics"]) == {
        f"top{k}{w}" for k in (1, 5) for w in ("", "_best", "_last")
    }
    run, stops = RunDir(tmp_path / "run"), 0
    while True:  # only the last rank is asked to stop, in a step or while it scores
        outcome = run_ranks(2, stopped_after, weights_file, data, run, 2 + 2 * stops)
        if outcome[0] != "stopped":
            break
        assert outcome == ["stopped"] * 2
        stops += 1
    assert outcome == whole and stops >= 2
    assert not list((run.evals / "unfinished").iterdir())


def stopped_after(world, path, data, run, checks):
    calls = iter(range(10**6))
    try:
        return row_of(world, path, data, ONE, run, lambda: world.rank == world.size - 1 and next(calls) >= checks)
    except Stopped:
        return "stopped"


def test_a_killed_training_resumes_with_equal_bits(data, weights_file, tmp_path, monkeypatch):
    grid = replace(PROTOCOLS["bsim"][10], rates=((0.01, 0.1), (0.02, 0.2)), epochs=(3,))
    monkeypatch.setitem(PROTOCOLS, "bsim", {1: grid, 10: grid})
    options = {"percent": 10, "train_batch": 40}
    states = []
    write = trials.state.write
    monkeypatch.setattr(trials.state, "write", lambda *args: states.append(copy.deepcopy(args[2:])) or write(*args))
    uninterrupted = row_of(SINGLE, weights_file, data, options, RunDir(tmp_path / "uninterrupted"))
    first, second = "lr0.01_head0.1_ep3", "lr0.02_head0.2_ep3"
    assert [note.get("trial") for _, note in states] == [first, first, None, second, second, None]
    run = RunDir(tmp_path / "killed")
    for _ in range(2):  # killed after the first epoch, then after the second
        process = multiprocessing.get_context("fork").Process(
            target=killed_after_one_save, args=(weights_file, data, options, run, monkeypatch, write)
        )
        process.start()
        assert wait_for_exit(process) == -signal.SIGKILL
    (state_file,) = (run.evals / "unfinished").iterdir()
    with safe_open(state_file, framework="pt") as file:
        kept = trials.state.read(state_file, file.metadata()["identity"])
    assert kept[1] == states[1][1] and kept[0].keys() == states[1][0].keys()
    assert all(torch.equal(kept[0][name], value) for name, value in states[1][0].items())
    assert row_of(SINGLE, weights_file, data, options, run) == uninterrupted


def killed_after_one_save(path, data, options, run, monkeypatch, write):
    def write_and_die(*args):
        write(*args)
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(trials.state, "write", write_and_die)
    row_of(SINGLE, path, data, options, run)


def test_grids_have_the_published_values():
    bsim = PROTOCOLS["bsim"]
    assert {(lr, round(head / lr)) for lr, head in bsim[1].rates} == {
        (lr, by) for lr in (1e-3, 1e-2, 1e-1) for by in (1, 10, 100)
    }
    assert (bsim[1].weight_decay, bsim[10].weight_decay) == (5e-4, 1e-4)
    assert PROTOCOLS["swav"][1].rates == ((0.02, 5.0),) and PROTOCOLS["swav"][10].rates == ((0.01, 0.2),)
    simclr = PROTOCOLS["simclr"][1]
    assert simclr.optim("backbone", 0.005).name == "lars" and simclr.optim("head", 0.005).name == "sgd"


def test_the_percent_of_labels_is_recorded_in_the_shards_or_an_option(data):
    def shards(**provenance):
        return SimpleNamespace(provenance=provenance, root="x")  # as hpcssl-shard subset writes it

    assert find_protocol("swav", None, shards(list=12811)) is PROTOCOLS["swav"][1]
    assert find_protocol("bsim", None, shards(fraction=0.1)) is PROTOCOLS["bsim"][10]
    assert find_protocol("bsim", 1, shards(fraction=0.1)) is PROTOCOLS["bsim"][1]
    assert find_protocol("byol", None, data[0]) == PROTOCOLS["byol"][1]
    with pytest.raises(EvalError) as caught:
        find_protocol("vicreg", None, shards(fraction=0.3))
    assert "percent=1" in caught.value.fix and "percent=10" in caught.value.fix
    for percent, whole in ((None, data[0]), (100, shards(fraction=0.3)), (None, shards(fraction=1.0))):
        assert find_protocol("vicreg", percent, whole) is PROTOCOLS["vicreg"][10]
    for provenance in ({"of": "0" * 64, "corrupt": 0.1}, {"of": "0" * 64, "fraction": 1.0}, {"partial": True}):
        with pytest.raises(EvalError):  # the set may be a part of a part
            find_protocol("vicreg", None, shards(**provenance))
    assert protocols.LIST_PERCENTS == {12811: 1, 128116: 10}


def test_a_fully_labeled_set_is_fine_tuned_without_a_share(tmp_path, weights_file, capsys):
    """The digits as ``hpcssl-shard digits`` writes them, with the command a user would type."""
    words = ["--train", tmp_path / "train", "--val", tmp_path / "val", "--devices", "cpu"]
    words += ["lr=0.05", "head_lr=0.5", "epochs=1", "train_batch=32"]
    for main, arguments in (
        (data_prep.cli.main, ["digits", tmp_path]),
        (hpcssl.cli.main, ["eval", "finetune", "--weights", weights_file, *words]),
    ):
        with pytest.raises(SystemExit) as ended:
            main(list(map(str, arguments)))
        assert ended.value.code == 0, capsys.readouterr().err
    top1 = float(re.search(r"\btop1=([\d.]+)", capsys.readouterr().out)[1])
    # of ten classes: 10 is chance, with a standard deviation below 2 on 360 images. How far one epoch comes depends on
    # how the CPU rounds: one reached 25.9
    assert top1 > 20


@pytest.mark.parametrize(
    "options, what, hint",
    [
        ({"protocol": "bism"}, "evals.finetune.protocol", "'bsim'"),
        ({"percent": 5}, "evals.finetune.percent", "1, 10 or 100"),
        ({"lr": 0.1}, "evals.finetune.lr", "set head_lr"),
        ({"head_lr": 0.1}, "evals.finetune.head_lr", "set lr"),
        ({"lr": float("inf"), "head_lr": 1}, "evals.finetune.lr", "above 0"),
        ({"epochs": 0}, "evals.finetune.epochs", "1 or more"),
        ({"precision": "fp8"}, "evals.finetune.precision", "fp16"),
        ({"held_out": 3}, "evals.finetune.held_out", "held_out"),
        ({"head_rl": 1}, "options of finetune, key head_rl", "'head_lr'"),
    ],
)
def test_invalid_options_are_refused(options, what, hint):
    with pytest.raises(ConfigError) as caught:
        load(FinetuneOptions, options, where="options of finetune")
    assert caught.value.what == what and hint in caught.value.expected + caught.value.fix


def test_images_are_held_out_where_several_trials_remain(data):
    rates = {"protocol": "byol", "lr": 0.01, "head_lr": 0.1}
    options = load(FinetuneOptions, rates | {"held_out": 5}, where="options of finetune")
    assert options.resolve(data[0]).epochs == (30, 50), "two lengths are compared"
    load(FinetuneOptions, {"protocol": "byol", "epochs": 30, "held_out": 5}, where="options of finetune")
    with pytest.raises(ConfigError) as caught:
        load(FinetuneOptions, rates | {"epochs": 30, "held_out": 5}, where="options of finetune")
    assert caught.value.what == "evals.finetune.held_out"


def test_a_batch_above_the_training_set_is_refused(data, weights_file):
    with pytest.raises(EvalError) as caught:
        row_of(SINGLE, weights_file, data, {"percent": 1})
    assert "90 " in caught.value.got and "256" in caught.value.got and "train_batch=90" in caught.value.fix


def test_no_batch_is_suggested_that_the_option_refuses():
    for samples, size in ((1, 1), (3, 4)):
        with pytest.raises(EvalError) as caught:
            finetune._check_batch(samples, 8, size)
        assert "train_batch" not in caught.value.fix


def test_an_error_of_one_rank_is_raised_on_both(data, weights_file, run_ranks, write_shards, tmp_path):
    images = np.random.default_rng(0).integers(0, 255, (40, 16, 16, 3), np.uint8)
    damaged = write_shards(tmp_path / "damaged", images, np.arange(40) % 4)
    row = damaged.rows[13]
    with open(damaged.path(0), "r+b") as file:
        file.seek(int(row["offset"]))
        file.write(bytes(int(row["size"])))
    index = tmp_path / "damaged" / "index.json"  # the image was damaged before the shard was written
    index.write_text(index.read_text().replace(damaged.shards[0].sha256, sha256_of_file(damaged.path(0))))
    damaged = ShardSet.open(tmp_path / "damaged")
    for image, batch in run_ranks(2, errors_of, weights_file, (damaged, data[1])):  # one rank reads the damaged image
        assert "00013" in image.what + image.got and "hpcssl-shard verify" in image.fix
        assert "batch of 5 on 2 ranks" in batch.got and "train_batch=4" in batch.fix


def errors_of(world, path, data):
    errors = []
    for more in ({}, {"train_batch": 5}):
        with contextlib.suppress(Stopped):
            try:
                row_of(world, path, data, ONE | {"train_batch": 20} | more)
            except EvalError as error:
                errors.append(error)
    return errors
