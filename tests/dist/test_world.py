"""Collectives and norms on 2 and 4 gloo ranks equal those of one process, in float64."""

from pathlib import Path

import pytest
import torch

from hpcssl.distributed.world import World
from hpcssl.errors import DataError, HpcsslError, WorldError
from hpcssl.nets import norm
from hpcssl.train import recipe, world_sizes
from tests.dist import ranks
from tests.printed import numbers_in
from tests.tolerances import rounding

SCRIPT = Path(__file__).with_name("ranks.py")


@pytest.fixture(scope="module")
def single():
    return ranks.compute(World.single_process())


@pytest.fixture(
    scope="module",
    params=[(2, "cpu"), (4, "cpu"), pytest.param((2, "cuda:0"), marks=pytest.mark.gpu)],
    ids=["2-cpu", "4-cpu", "2-on-one-gpu"],
)
def world(request, start_ranks, tmp_path_factory):
    """Results of ranks that communicate through gloo, on CPUs or on one GPU, which NCCL would refuse."""
    folder, (size, device) = tmp_path_factory.mktemp("world"), request.param
    start_ranks(size, [str(SCRIPT), str(folder), device])
    return [torch.load(folder / f"{rank}.pt", weights_only=True, map_location="cpu") for rank in range(size)]


@pytest.mark.parametrize("group", ranks.GROUPS)
@pytest.mark.parametrize("dims", [2, 4])
def test_norm_is_the_same_on_any_number_of_ranks(single, world, group, dims):
    expected, parts = single["norm", group, dims], [rank["norm", group, dims] for rank in world]
    # a mean and a variance, or in the backward pass two means; errors of a mean are divided by the standard deviation
    x = next(ranks.draw_images(shape) for shape in ranks.SHAPES if len(shape) == dims)
    groups = [part.transpose(0, 1).flatten(1) for part in x.split(group)]
    spread = min(float(part.std(1, correction=0).min()) for part in groups)
    tolerance = rounding(torch.float64, 2 * groups[0].shape[1], amplification=float(x.abs().max()) / spread)
    for name in ("y", "dx", "dw", "db", "mean", "var"):
        close = {"rtol": 0, "atol": tolerance * max(1.0, float(expected[name].abs().max()))}
        if name in ("y", "dx"):
            torch.testing.assert_close(torch.cat([part[name] for part in parts]), expected[name], **close)
            continue
        for part in parts:
            torch.testing.assert_close(part[name], expected[name], **close)
            assert torch.equal(part[name], parts[0][name]), f"{name} differs between ranks"


def test_gradients_through_all_gather_equal_those_of_one_process(single, world):
    gradient, expected = torch.cat([rank["grad"]["dx"] for rank in world]), single["grad"]["dx"]
    # Three roundings of a logit change a share of the softmax by up to the logit's size; 16 shares are added in the
    # softmax, and 2 * 16 products in the gradient.
    largest = float(single["rows"]["gathered"].square().sum(1).max())
    tolerance = rounding(torch.float64, round(3 * largest) + 3 * 16, scale=float(expected.abs().max()))
    torch.testing.assert_close(gradient, expected, rtol=0, atol=tolerance)


def test_gathered_and_shuffled_rows_equal_those_of_one_process(single, world):
    for rank in world:
        assert torch.equal(rank["rows"]["gathered"], single["rows"]["gathered"])
        assert torch.equal(rank["rows"]["flags"], single["rows"]["flags"])
    for name in ("unshuffled", "shuffled"):
        assert torch.equal(torch.cat([rank["rows"][name] for rank in world]), single["rows"][name])
    assert torch.equal(single["rows"]["unshuffled"], single["rows"]["gathered"])
    assert not torch.equal(single["rows"]["shuffled"], single["rows"]["gathered"])


def test_reductions_texts_and_errors_reach_every_rank(world):
    size = len(world)
    for rank in world:
        assert rank["sum"].tolist() == [sum(range(size)), size]
        assert rank["max"].tolist() == rank["max on device"].tolist() == [size - 1, 0]
        assert rank["any"] == (True, False)
        assert rank["text"] == ("rank 1, λ", ["x" * r for r in range(size)])
        assert rank["long text"] == (12_000, "") and rank["gathered for a text"] == 1
        error = HpcsslError.from_json(rank["error"])
        assert isinstance(error, DataError)
        assert (error.what, error.got, error.expected, error.fix) == ("a shard", "nothing", "a shard", "write it")


@pytest.mark.parametrize("shape", ranks.SHAPES)
def test_one_group_equals_batch_norm_of_torch(shape):
    world = World.single_process()
    ours = norm.BatchNorm(ranks.C, group=ranks.BATCH, world=world).double()
    theirs = (torch.nn.BatchNorm2d if len(shape) == 4 else torch.nn.BatchNorm1d)(ranks.C).double()
    x = ranks.draw("x", shape=shape)
    assert torch.equal(ours(x), theirs(x))  # the same function of torch
    norm.commit_pending([ours], world)
    # two products and a sum each, with weights that are rounded
    close = {"rtol": 0, "atol": rounding(torch.float64, 6)}
    torch.testing.assert_close(ours.running_mean, theirs.running_mean, **close)
    torch.testing.assert_close(ours.running_var, theirs.running_var, **close)
    # four more operations apply them to numbers of up to 4
    close["atol"] = rounding(torch.float64, 10, scale=float(x.abs().max()))
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), **close)


@pytest.mark.parametrize("group", ranks.GROUPS)
def test_running_statistics_of_the_first_group_are_those_of_the_first_gpu(single, world, group):
    """What DataParallel keeps: torch's own layer that saw the first rows alone."""
    theirs = torch.nn.BatchNorm1d(ranks.C).double()
    x = ranks.draw("x", len(ranks.SHAPES[1]), shape=ranks.SHAPES[1]) * 3 + 1
    for step in range(2):
        theirs(x[:group] * (step + 1))
    for rank in [single, *world]:
        torch.testing.assert_close(rank["first group", group]["mean"], theirs.running_mean, rtol=0, atol=1e-13)
        torch.testing.assert_close(rank["first group", group]["var"], theirs.running_var, rtol=0, atol=1e-13)


def test_groups_are_normalized_independently():
    x = ranks.draw("x", shape=(ranks.BATCH, ranks.C))
    layer = norm.BatchNorm(ranks.C, group=4, world=World.single_process()).double()
    first = layer(x)[:4]
    x[4:] += 100
    assert torch.equal(layer(x)[:4], first)


def test_a_discarded_step_does_not_change_the_running_statistics():
    layer = norm.BatchNorm(ranks.C, group=4, world=World.single_process())
    layer(torch.full((8, ranks.C), float("nan")))
    norm.discard_pending([layer])
    norm.commit_pending([layer], World.single_process())
    assert torch.equal(layer.running_mean, torch.zeros(ranks.C))
    assert torch.equal(layer.running_var, torch.ones(ranks.C))


@pytest.mark.parametrize(
    ("size", "overrides", "got", "fitting"),
    [
        (3, [], [16], [1, 2, 4, 8]),  # 16 images do not divide evenly over 3 processes
        (16, [], [1], [1, 2, 4, 8]),  # norm groups of 1 sample
        (4, ["optim.batch=12", "mix.kind=cutmix", "model.norm=sync"], [3], [1, 2, 3, 6]),  # 3 images cannot be paired
        (2, ["optim.batch=12", "model.norm=ghost", "model.norm_group_size=4"], [], [1, 3, 6, 12]),
    ],
)
def test_a_world_size_that_cannot_work_is_refused_with_those_that_can(size, overrides, got, fitting):
    composed = recipe.compose("digits_msf", ["optim.batch=16", "model.norm=local", *overrides])
    with pytest.raises(WorldError) as caught:
        world_sizes.check(composed, size)
    assert caught.value.what == f"{size} processes" and numbers_in(caught.value.got)[: len(got)] == got
    assert numbers_in(caught.value.expected) == fitting


def test_a_recipe_that_no_world_size_can_run_is_refused_with_the_keys_to_change():
    overrides = ["optim.batch=16", "model.norm=ghost", "model.norm_group_size=3"]
    with pytest.raises(WorldError) as caught:
        world_sizes.check(recipe.compose("digits_msf", overrides), 2)
    assert caught.value.what == "2 processes" and numbers_in(caught.value.expected) == []
    assert numbers_in(caught.value.fix) == [2, 4, 8, 16]
    keys = ("optim.batch", "machine.accumulation_steps", "mix.pairing", "model.norm_group_size")
    assert all(key in caught.value.fix for key in keys)


def test_accumulation_with_mixing_and_synchronized_norms_works_on_three_processes():
    overrides = ["optim.batch=24", "machine.accumulation_steps=2", "mix.kind=cutmix", "model.norm=sync"]
    world_sizes.check(recipe.compose("digits_msf", overrides), 3)
