"""The embedding table, previous embeddings and clusters of CMSF do not depend on ranks, placement, kills or moves.

An epoch of the test shards has two steps, so that six steps are three epochs; k-means runs in the third and the fifth
step. The killed run dies just before its second k-means, and once more inside the epoch after it.
"""

import pytest
import torch

from hpcssl.checkpoint.reader import SavedCheckpoint, folders
from hpcssl.files import read_lines
from hpcssl.run_dir import RunDir
from tests.tolerances import of_step

RULES = {"2q": ["method.k=3", "method.k_constraint=4"], "km": ["method.k=3", "method.num_clusters=6"]}
RUNS = {  # name: (worlds of the attempts, further overrides, attempts)
    "one": ([1], [], [{}]),
    "two-sharded": ([2], ["bank.placement=sharded"], [{}]),
    "four": ([4], [], [{}]),
    "four-sharded-killed": ([4], ["bank.placement=sharded"], [{"kill_at": 4}, {"kill_at": 5}, {}]),
    "four-then-one": ([4, 1], ["bank.placement=sharded"], [{"kill_at": 5}, {}]),
}


@pytest.fixture(scope="module")
def runs(run_scenarios):
    return run_scenarios(
        [
            {
                "name": f"{rule}.{name}",
                "recipe": f"digits_cmsf_{rule}",
                "worlds": worlds,
                "attempts": attempts,
                "overrides": ["model.norm=sync", "optim.precision=fp64", "schedule.steps=6", *options, *more],
            }
            for rule, options in RULES.items()
            for name, (worlds, more, attempts) in RUNS.items()
        ]
    )


def last_checkpoint(folder):
    return SavedCheckpoint.open(folders(RunDir(folder))[-1][1])


@pytest.mark.parametrize("rule", RULES)
def test_kills_and_placement_change_no_bit(runs, rule):
    undisturbed, folder = runs[f"{rule}.four"]
    assert undisturbed["done"], undisturbed["log"]
    killed, killed_folder = runs[f"{rule}.four-sharded-killed"]
    assert killed["done"], killed["log"]
    assert [any(code == -9 for code in codes) for codes in killed["codes"]] == [True, True, False]
    assert killed["digest"] == undisturbed["digest"]
    losses = [[line["loss"] for line in read_lines(RunDir(f).journal)] for f in (folder, killed_folder)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("rule", RULES)
def test_numbers_of_ranks_agree(runs, rule):
    """1, 2 and 4 ranks, and 4 ranks resumed by 1, agree up to rounding in float64 and exactly in integers.

    All parameters perturbed by a relative 1e-11 before the first step changed the states of six steps by up to 24 times
    as much, relative to the largest number of a tensor.
    """
    one = last_checkpoint(runs[f"{rule}.one"][1])
    for name in ("two-sharded", "four", "four-then-one"):
        result, folder = runs[f"{rule}.{name}"]
        assert result["done"], result["log"]
        other = last_checkpoint(folder)
        assert other.names == one.names and other.manifest["numbers"] == one.manifest["numbers"]
        for tensor in one.names:
            a, b = one.rows(tensor), other.rows(tensor)
            scale = max(1.0, float(a.abs().max())) if a.is_floating_point() and a.numel() else 0.0
            torch.testing.assert_close(
                a,
                b,
                rtol=0,
                atol=of_step(6, amplification=30, scale=scale),
                msg=lambda m, n=tensor, w=name: f"{w}, {n}: {m}",
            )


def test_tables_clusters_and_bank_are_not_trivial(runs):
    """Most images are in the embedding table, there are several clusters, and the bank has rows of them."""
    km, two = last_checkpoint(runs["km.one"][1]), last_checkpoint(runs["2q.one"][1])
    for saved in (km, two):
        assert (saved.rows("embedding_table.known") > 0).sum() > 30
    assert len(km.rows("clusters.cluster").unique()) >= 6
    assert (km.rows("bank.group") >= 0).sum() >= 20
    assert (two.rows("bank.group") == 0).sum() >= 16 and (
        two.rows("bank.previous_epoch").norm(dim=1) > 0.99
    ).sum() >= 16
