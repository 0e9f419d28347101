"""Every digits recipe on 2 and 4 ranks with a sharded bank against one process: gradients, losses and whole state.

Recipes are discovered; ``VARIANTS`` are options of methods that no recipe sets. The ranks are started once per world
size, for all recipes.
"""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from hpcssl.distributed.world import World
from hpcssl.train import recipe
from tests.tolerances import rounding

SCRIPT = Path(__file__).with_name("method_ranks.py")
spec = importlib.util.spec_from_file_location("dist_method_ranks", SCRIPT)
ranks = importlib.util.module_from_spec(spec)
spec.loader.exec_module(ranks)

# of 8 samples, like the whole batch of the other cases: with the statistics of 4 samples, the gradients of the second
# step change by up to 25,000 times a perturbation of the parameters, and rounding with them
MICRO_BATCHES = ["machine.accumulation_steps=2", "optim.batch=16"]
VARIANTS = {
    "moco-symmetric-empty": ("digits_moco_v2", ["method.symmetric=true", "bank.init=empty"]),
    "simclr-sum-lars": ("digits_simclr", ["method.reduction=sum", "optim.name=lars"]),
    "simclr-cutmix": ("digits_simclr", ["mix.kind=cutmix", "mix.loss=wbsim"]),
    "nnclr-random-of-3": ("digits_nnclr", ["method.neighbors={k: 3, both_views: true, replace: random}"]),
    "nnclr-soft-columns": (
        "digits_nnclr",
        ["method.neighbors.rule=soft", "method.contrast=columns", "method.symmetric=false", "method.predictor=false"],
    ),
    "nnclr-oracle-ema-nt_xent": (
        "digits_nnclr",
        ["method.neighbors.rule=oracle", "method.momentum_encoder=true", "method.contrast=nt_xent", "bank.init=empty"],
    ),
    "nnsiam-random-of-3": ("digits_nnsiam", ["method.neighbors.k=3"]),
    "nnclr-present-encoder": ("digits_nnclr", ["method.neighbors.support=encoder", "bank.size=16"]),
    "simclr-permutation": ("digits_simclr", ["mix.kind=mixup", "mix.pairing=permutation"]),
    "msf-flip": ("digits_msf", ["mix.kind=cutmix", "mix.loss=wbsim", "mix.pairing=flip"]),
    "byol-micro-batches": ("digits_byol", MICRO_BATCHES),
    "msf-micro-batches-shuffled": ("digits_msf", [*MICRO_BATCHES, "model.shuffle_bn=true"]),
    "nnsiam-micro-batches": ("digits_nnsiam", [*MICRO_BATCHES, "method.neighbors.k=3"]),
    "swav-larc-queue-in-use": (
        "digits_swav",
        [
            "optim.name=larc",
            "views.crops.count=0",
            "bank.size=8",
            "method.queue_start_epoch=0",
            "method.freeze_steps=0",
        ],
    ),
}
# Forward, convolutions and linear layers add about 4,000 numbers and batch norms of 16 images of 8 pixels about 3,700
# (see STEP_TERMS of tolerances.py); backward the same again. Amplification: all parameters were perturbed by a relative
# 1e-11 before the first step. In two steps, losses changed by up to 264 times as much, and gradients and states by up
# to 323 times (NNCLR with soft neighbors; 184 in the other cases; two to six perturbations).
TOLERANCE = rounding(torch.float64, 15_000, steps=ranks.STEPS, amplification=350)
CASES = {name: (name, []) for name in recipe.names() if name.startswith("digits_")} | VARIANTS


def write_cases(folder, shards, extra):
    """Write the cases for method_ranks.py into a folder, and return it."""
    cases = {case: (name, [*overrides, *extra]) for case, (name, overrides) in CASES.items()}
    (folder / "cases.json").write_text(json.dumps({"shards": str(shards.root), "cases": cases}))
    return folder


@pytest.fixture(scope="module")
def single_process(shards, tmp_path_factory):
    torch.set_num_threads(1)
    return ranks.train_cases(World.single_process(), write_cases(tmp_path_factory.mktemp("single"), shards, []))


@pytest.fixture(scope="module", params=[2, 4])
def world(request, shards, start_ranks, tmp_path_factory):
    folder = write_cases(tmp_path_factory.mktemp("methods"), shards, ["bank.placement=sharded"])
    start_ranks(request.param, [str(SCRIPT), str(folder)], timeout=500)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(request.param)]


@pytest.mark.parametrize("case", CASES)
def test_ranks_compute_the_same_as_one_process(single_process, world, case):
    one, many = single_process[case], [rank[case] for rank in world]
    assert len(set(one["loss"].tolist())) > 1, "the loss does not change, so equal losses prove nothing"
    assert any(g.abs().max() > 1e-6 for g in one["grad"].values())
    for rank in many:
        torch.testing.assert_close(rank["loss"], one["loss"], rtol=0, atol=TOLERANCE)
        assert rank["grad"].keys() == one["grad"].keys()
        for name, gradient in one["grad"].items():
            torch.testing.assert_close(rank["grad"][name], gradient, rtol=0, atol=TOLERANCE)
    assert one["state"].keys() == many[0]["state"].keys()
    for name, (whole, _) in one["state"].items():
        parts = [rank["state"][name] for rank in many]
        if parts[0][1] is None:
            assert all(torch.equal(part, parts[0][0]) for part, _ in parts), f"{name} differs between ranks"
            merged = parts[0][0]
        else:
            merged = torch.cat([part for part, _ in parts])
        torch.testing.assert_close(
            merged, whole, rtol=0, atol=TOLERANCE if whole.is_floating_point() else 0, msg=lambda m, n=name: f"{n}: {m}"
        )
