"""Collectives and norms on 2 and 4 gloo ranks against one process, in float64."""

import importlib.util
from pathlib import Path

import pytest
import torch

from hpcssl.errors import WorldError
from hpcssl.nets import norm
from hpcssl.train import recipe, worlds
from hpcssl.world import World

SCRIPT = Path(__file__).with_name("ranks.py")
spec = importlib.util.spec_from_file_location("dist_ranks", SCRIPT)
ranks = importlib.util.module_from_spec(spec)
spec.loader.exec_module(ranks)


@pytest.fixture(scope="module")
def alone():
    return ranks.play(World.alone())


@pytest.fixture(scope="module", params=[2, 4])
def world(request, start_ranks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    start_ranks(request.param, [str(SCRIPT), str(folder)])
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(request.param)]


@pytest.mark.parametrize("group", ranks.GROUPS)
@pytest.mark.parametrize("dims", [2, 4])
def test_norm_is_the_same_on_any_number_of_ranks(alone, world, group, dims):
    one, many = alone["norm", group, dims], [w["norm", group, dims] for w in world]
    for name in ("y", "dx"):
        torch.testing.assert_close(torch.cat([m[name] for m in many]), one[name], rtol=0, atol=1e-12)
    for name in ("dw", "db", "mean", "var"):
        for m in many:
            torch.testing.assert_close(m[name], one[name], rtol=0, atol=1e-12)
            assert torch.equal(m[name], many[0][name]), f"{name} differs between ranks"


def test_gathered_gradients_and_dealt_rows(alone, world):
    torch.testing.assert_close(torch.cat([w["grad"]["dx"] for w in world]), alone["grad"]["dx"], rtol=0, atol=1e-14)
    for w in world:
        assert torch.equal(w["rows"]["every"], alone["rows"]["every"])
        assert torch.equal(w["rows"]["flags"], alone["rows"]["flags"])
    for name in ("back", "dealt"):
        assert torch.equal(torch.cat([w["rows"][name] for w in world]), alone["rows"][name])
    assert torch.equal(alone["rows"]["back"], alone["rows"]["every"])
    assert not torch.equal(alone["rows"]["dealt"], alone["rows"]["every"])


def test_numbers_and_words(world):
    size = len(world)
    for w in world:
        assert w["sum"].tolist() == [sum(range(size)), size]
        assert w["max"].tolist() == [size - 1, 0]
        assert w["any"] == (True, False)
        assert w["tell"] == ("rank 1, λ", ["x" * r for r in range(size)])
        assert w["refused"].startswith("a shard: got nothing; expected a shard")


@pytest.mark.parametrize("shape", ranks.SHAPES)
def test_one_group_is_torchs_batch_norm(shape):
    world = World.alone()
    ours = norm.BatchNorm(ranks.C, group=ranks.BATCH, world=world).double()
    theirs = (torch.nn.BatchNorm2d if len(shape) == 4 else torch.nn.BatchNorm1d)(ranks.C).double()
    x = ranks.drawn("x", shape=shape)
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-14)
    norm.commit([ours], world)
    torch.testing.assert_close(ours.running_mean, theirs.running_mean, rtol=0, atol=1e-14)
    torch.testing.assert_close(ours.running_var, theirs.running_var, rtol=0, atol=1e-14)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=0, atol=1e-14)


def test_groups_do_not_see_each_other():
    x = ranks.drawn("x", shape=(ranks.BATCH, ranks.C))
    layer = norm.BatchNorm(ranks.C, group=4, world=World.alone()).double()
    first = layer(x)[:4]
    x[4:] += 100
    assert torch.equal(layer(x)[:4], first)


def test_a_discarded_step_leaves_no_trace():
    layer = norm.BatchNorm(ranks.C, group=4, world=World.alone())
    layer(torch.full((8, ranks.C), float("nan")))
    norm.discard([layer])
    norm.commit([layer], World.alone())
    assert torch.equal(layer.running_mean, torch.zeros(ranks.C))
    assert torch.equal(layer.running_var, torch.ones(ranks.C))


@pytest.mark.parametrize(("size", "overrides", "said"), [
    (3, [], "16, which does not divide evenly over them; expected a number of processes such as 1, 2, 4, 8;"),
    (16, [], "norm groups of 1 samples"),
    (3, ["optim.batch=24", "machine.accumulate=2", "mix.kind=cutmix", "model.norm=whole"], None),
    (4, ["optim.batch=12", "mix.kind=cutmix", "model.norm=whole"], "3 images of a process at a time, of which "
     "neighbours cannot all be mixed in pairs; expected a number of processes such as 1, 2, 3, 6;"),
    (2, ["model.norm=ghost", "model.norm_group=3"], "expected a recipe that some number of processes can run; to mend: "
     "change optim.batch, machine.accumulate or mix.pairing, or set model.norm_group to one of 2, 4, 8, 16"),
    (2, ["optim.batch=12", "model.norm=ghost", "model.norm_group=4"], "expected a number of processes such as 1, 3"),
])
def test_worlds_that_cannot_work_are_refused_with_those_that_can(size, overrides, said):
    made = recipe.compose("digits_msf", ["optim.batch=16", "model.norm=local", *overrides])
    if said is None:
        worlds.check(made, size)
    else:
        with pytest.raises(WorldError, match=f"{size} processes: got ") as caught:
            worlds.check(made, size)
        assert said in str(caught.value)
