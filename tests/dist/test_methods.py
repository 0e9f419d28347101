"""Every recipe of the digits on 2 and 4 ranks with a sharded bank against one process: gradients, losses, whole state.

Recipes are discovered; ``VARIANTS`` are options of methods that no recipe sets. One spawn per world for all of them.
"""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from hpcssl.train import recipe
from hpcssl.world import World

SCRIPT = Path(__file__).with_name("method_ranks.py")
spec = importlib.util.spec_from_file_location("dist_method_ranks", SCRIPT)
ranks = importlib.util.module_from_spec(spec)
spec.loader.exec_module(ranks)

VARIANTS = {
    "moco-symmetric-empty": ("digits_moco_v2", ["method.symmetric=true", "bank.start=empty"]),
    "simclr-sum-lars": ("digits_simclr", ["method.reduction=sum", "optim.name=lars"]),
    "simclr-cutmix": ("digits_simclr", ["mix.kind=cutmix", "mix.loss=wbsim"]),
    "nnclr-random-of-3": ("digits_nnclr", ["method.neighbours={k: 3, both_views: true, replace: random}"]),
    "nnclr-soft-columns": ("digits_nnclr", ["method.neighbours.rule=soft", "method.contrast=columns",
                                            "method.symmetric=false", "method.predictor=false"]),
    "nnclr-oracle-ema-nt_xent": ("digits_nnclr", ["method.neighbours.rule=oracle", "method.momentum_encoder=true",
                                                  "method.contrast=nt_xent", "bank.start=empty"]),
    "nnsiam-random-of-3": ("digits_nnsiam", ["method.neighbours.k=3"]),
    "nnclr-present-encoder": ("digits_nnclr", ["method.neighbours.support=encoder", "bank.size=16"]),
    "simclr-permutation": ("digits_simclr", ["mix.kind=mixup", "mix.pairing=permutation"]),
    "msf-flip": ("digits_msf", ["mix.kind=cutmix", "mix.loss=wbsim", "mix.pairing=flip"]),
    "byol-micro-batches": ("digits_byol", ["machine.accumulate=2"]),
    "msf-micro-batches-shuffled": ("digits_msf", ["machine.accumulate=2", "model.shuffle=true"]),
    "nnsiam-micro-batches": ("digits_nnsiam", ["machine.accumulate=2", "method.neighbours.k=3"]),
    "swav-larc-queue-in-use": ("digits_swav", ["optim.name=larc", "views.crops.number=0", "bank.size=8",
                                               "method.queue_epoch=0", "method.freeze_steps=0"]),
}
CASES = {name: (name, []) for name in recipe.names() if name.startswith("digits_")} | VARIANTS


def plan(folder, shards, extra):
    cases = {case: (name, [*overrides, *extra]) for case, (name, overrides) in CASES.items()}
    (folder / "cases.json").write_text(json.dumps({"shards": str(shards.root), "cases": cases}))
    return folder


@pytest.fixture(scope="module")
def alone(shards, tmp_path_factory):
    torch.set_num_threads(1)
    return ranks.play(World.alone(), plan(tmp_path_factory.mktemp("alone"), shards, []))


@pytest.fixture(scope="module", params=[2, 4])
def world(request, shards, start_ranks, tmp_path_factory):
    folder = plan(tmp_path_factory.mktemp("methods"), shards, ["bank.placement=sharded"])
    start_ranks(request.param, [str(SCRIPT), str(folder)], timeout=500)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(request.param)]


@pytest.mark.parametrize("case", CASES)
def test_ranks_agree_with_one_process(alone, world, case):
    one, many = alone[case], [rank[case] for rank in world]
    assert len(set(one["loss"].tolist())) > 1, "a run that does not move proves nothing"
    assert any(g.abs().max() > 1e-6 for g in one["grad"].values())
    for rank in many:
        torch.testing.assert_close(rank["loss"], one["loss"], rtol=0, atol=1e-10)
        assert rank["grad"].keys() == one["grad"].keys()
        for name, gradient in one["grad"].items():
            torch.testing.assert_close(rank["grad"][name], gradient, rtol=0, atol=1e-10)
    assert one["state"].keys() == many[0]["state"].keys()
    for name, (whole, _) in one["state"].items():
        parts = [rank["state"][name] for rank in many]
        if parts[0][1] is None:
            assert all(torch.equal(part, parts[0][0]) for part, _ in parts), f"{name} differs between ranks"
            together = parts[0][0]
        else:
            together = torch.cat([part for part, _ in parts])
        torch.testing.assert_close(together, whole, rtol=0, atol=1e-10 if whole.is_floating_point() else 0,
                                   msg=lambda m, n=name: f"{n}: {m}")
