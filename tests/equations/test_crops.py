"""Multi-crop as more queries of a plan, and the support set that is embedded anew."""

import pytest
import torch
import torch.nn.functional as F

from hpcssl.data.order import Draws
from hpcssl.errors import ConfigError
from hpcssl.train import recipe
from hpcssl.train.state import method_of, plan_of
from hpcssl.train.support import Support
from hpcssl.views.plan import CropOptions, Term, ViewOptions, both_ways, multi_crop, one_way

CROPS = ["views.crops={number: 3, size: 8, scale: [0.1, 0.3], large_scale: [0.4, 1.0]}"]


def options(number):
    return ViewOptions(query="strong", target="weak", size=32, crops=CropOptions(number=number))


def test_crops_share_each_targets_weight():
    views = options(6)
    plan = multi_crop(one_way(*views.pair()), views)
    assert [view.size for view in plan.views] == [32, 32] + [96] * 6 and plan.targets == (1,)
    assert plan.terms == tuple(Term(query, 1, 1 / 7) for query in (0, 2, 3, 4, 5, 6, 7))
    plan = multi_crop(both_ways(*views.pair(), share=0.5), views)
    assert len(plan.terms) == 14 and {term.share for term in plan.terms} == {1 / 14} and plan.targets == (0, 1)
    assert {term.query for term in plan.terms if term.target == 0} == {1, 2, 3, 4, 5, 6, 7}
    assert multi_crop(plan, options(0)) is plan


def test_crops_have_their_own_scale_and_the_large_views_theirs():
    made = recipe.compose("cmsf_2q_r50_ep200_128k_mc")
    plan = plan_of(made, method_of(made))
    assert plan.views[0].augmentation.scale == (0.14, 1.0) == plan.views[1].augmentation.scale
    assert plan.views[2].augmentation.scale == (0.05, 0.14) and plan.views[2].augment == "strong"
    assert plan.views[1].augment == "weak"


def test_msf_with_crops_is_the_mean_over_its_queries(small_training):
    made = small_training("digits_msf", [*CROPS, "method.k=4"])
    t = made.training
    for step in range(4):
        batch = made.batch(step)
        images = t.images(batch)
        with torch.no_grad():
            z = F.normalize(t.pair.target.projector(t.pair.target.backbone(images[1])), dim=1)
            queries = [t.pair.online.embed(images[v])[1] for v in (0, 2, 3, 4)]
        for layer in t.norms:
            layer.pending.clear()
        bank = t.bank.everything("key").clone()
        bank[[(t.bank.pointer + i) % 48 for i in range(16)]] = z
        near = ((z[:, None] - bank) ** 2).sum(2).argsort(1)[:, :4]
        wanted = sum(((u[:, None] - bank[near]) ** 2).sum(2).mean() for u in queries) / 4
        assert float(made.step(batch).scalars["loss"]) == pytest.approx(float(wanted), abs=1e-12)


def test_nnclr_with_crops_is_the_mean_over_pairs(small_training):
    """Two large views, of which alone neighbours are looked up, towards each of the other crops: 2 x 4 pairs."""
    made = small_training("digits_nnclr", [*CROPS, "bank.start=random"])
    t = made.training
    batch = made.batch(0)
    images = t.images(batch)
    with torch.no_grad():
        found = [t.pair.online.embed(image) for image in images]
    for layer in t.norms:
        layer.pending.clear()
    bank, total = t.bank.everything("key"), 0.0
    for a in (0, 1):
        nn = bank[(found[a][0] @ bank.T).argmax(1)]
        for v in range(5):
            if v != a:
                total += F.cross_entropy(nn @ found[v][1].T / 0.2, torch.arange(16)) / 8
    assert float(made.step(batch).scalars["loss"]) == pytest.approx(float(total), abs=1e-12)


ENCODER = ["method.neighbours.support=encoder", "bank.size=32"]


@pytest.mark.parametrize("more", [[], ["method.momentum_encoder=true"]], ids=["online", "momentum"])
def test_the_support_set_is_the_present_encoders(small_training, more):
    """32 random images, all different, through the network as it is before the step; none of the past is kept."""
    made = small_training("digits_nnclr", [*ENCODER, *more])
    t, seen = made.training, []
    for step in range(3):
        batch = made.batch(step)
        net = t.pair.target or t.pair.online
        wanted, index = [], []
        for support in t.support(step):
            (image,) = t.images(support, [0])
            with torch.no_grad():
                wanted.append(net.embed(image)[0])
            index += support.index.tolist()
        for layer in t.norms:
            layer.pending.clear()
        made.step(batch)
        torch.testing.assert_close(t.bank.everything("key"), torch.cat(wanted), rtol=0, atol=1e-12)
        assert t.bank.everything("index").tolist() == index and len(set(index)) == 32
        seen.append(index)
    assert seen[0] != seen[1] != seen[2]


def test_support_statistics_are_not_the_batchs(small_training):
    """The running statistics count the batch's own views alone."""
    queue, anew = (small_training("digits_nnclr", [*more, "bank.size=32"]) for more in ([], ENCODER))
    batch = queue.batch(0)
    queue.step(batch)
    anew.step(batch)
    for one, other in zip(queue.training.norms, anew.training.norms, strict=True):
        torch.testing.assert_close(one.running_mean, other.running_mean, rtol=0, atol=1e-12)


def test_draws_differ_by_step_and_are_dealt_out(small_training):
    draws = Draws(100, seed=3, global_batch=8, per_step=4)
    steps = [[int(i) for u in range(4 * t, 4 * t + 4) for i in draws.batch(u)] for t in range(3)]
    assert all(len(set(step)) == 32 for step in steps) and steps[0] != steps[1]
    assert [int(i) for r in range(4) for i in draws.part(5, r, 4)] == draws.batch(5).tolist()
    assert draws.epoch_of(7) == 1
    with pytest.raises(ConfigError, match="at most the 20 images"):
        Draws(20, seed=0, global_batch=8, per_step=4)
    with pytest.raises(ConfigError, match="a multiple of the batch"):
        small_training("digits_nnclr", ["method.neighbours.support=encoder", "bank.size=40"])


def test_memory_that_a_device_still_reads_is_not_filled_again():
    """Before a batch is asked for, the copy of the one whose memory is freed by that is waited for."""
    said, given = [], iter(range(100))

    class Loader:
        def run(self, start, stop):
            for number in range(start, stop):
                said.append(("asked", number))
                yield number

    class Mark:
        def __init__(self):
            self.number = next(given)

        def synchronize(self):
            said.append(("copied", self.number))

    support = Support(Loader(), 4, 2, Mark)
    assert [*support.batches(0), *support.batches(1)] == list(range(8))
    for number in (2, 3, 6, 7):  # of a step; the loss of the step has been waited for before the next begins
        assert said.index(("copied", number - 2)) < said.index(("asked", number))


@pytest.mark.parametrize("wrong,said", [("augment=strnog", "strnog"), ("scale=[0.5,0.1]", "scale"),
                                        ("number=-1", "-1 crops"), ("size=4", "4 pixels")])
def test_crops_that_cannot_be_meant(wrong, said):
    with pytest.raises(ConfigError, match=said):
        made = recipe.compose("digits_msf", ["views.crops.number=2", f"views.crops.{wrong}"])
        plan_of(made, method_of(made))
