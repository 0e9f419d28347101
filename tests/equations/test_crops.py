"""Multi-crop, which adds queries to a view plan, and the support set, which is embedded again in every step."""

import pytest
import torch
import torch.nn.functional as F

from hpcssl.data.order import SupportOrder
from hpcssl.errors import ConfigError
from hpcssl.train import recipe
from hpcssl.train.builders import build_method, build_view_plan
from hpcssl.views.plan import CropOptions, Term, ViewOptions, add_small_crops, one_way_plan, symmetric_plan
from tests.tolerances import of_step

CROPS = ["views.crops={count: 3, size: 8, scale: [0.1, 0.3], large_scale: [0.4, 1.0]}"]


def options(count):
    return ViewOptions(query="strong", target="weak", size=32, crops=CropOptions(count=count))


def test_crops_share_the_weight_of_each_target():
    views = options(6)
    plan = add_small_crops(one_way_plan(*views.make_views()), views)
    assert [view.size for view in plan.views] == [32, 32] + [96] * 6 and plan.targets == (1,)
    assert plan.terms == tuple(Term(query, 1, 1 / 7) for query in (0, 2, 3, 4, 5, 6, 7))
    plan = add_small_crops(symmetric_plan(*views.make_views(), share=0.5), views)
    assert len(plan.terms) == 14 and {term.share for term in plan.terms} == {1 / 14} and plan.targets == (0, 1)
    assert {term.query for term in plan.terms if term.target == 0} == {1, 2, 3, 4, 5, 6, 7}
    assert add_small_crops(plan, options(0)) is plan


def test_crops_and_large_views_have_separate_scales():
    values = recipe.compose("cmsf_2q_r50_ep200_128k_mc")
    plan = build_view_plan(values, build_method(values))
    assert plan.views[0].augmentation.scale == (0.14, 1.0) == plan.views[1].augmentation.scale
    assert plan.views[2].augmentation.scale == (0.05, 0.14) and plan.views[2].augment == "strong"
    assert plan.views[1].augment == "weak"


def test_msf_with_crops_is_the_mean_over_its_queries(small_training):
    run = small_training("digits_msf", [*CROPS, "method.k=4"])
    t = run.training
    for step in range(4):
        batch = run.batch(step)
        images = t.images(batch)
        with torch.no_grad():
            z = F.normalize(t.pair.target.projector(t.pair.target.backbone(images[1])), dim=1)
            queries = [t.pair.online.embed(images[v])[1] for v in (0, 2, 3, 4)]
        for layer in t.norms:
            layer.pending.clear()
        bank = t.bank.all_rows("key").clone()
        bank[[(t.bank.pointer + i) % 48 for i in range(16)]] = z
        near = ((z[:, None] - bank) ** 2).sum(2).argsort(1)[:, :4]
        expected = sum(((u[:, None] - bank[near]) ** 2).sum(2).mean() for u in queries) / 4
        assert float(run.step(batch).scalars["loss"]) == pytest.approx(float(expected), abs=of_step(run.training.step))


def test_nnclr_with_crops_is_the_mean_over_pairs(small_training):
    """Neighbors of the two large views only, each paired with all other crops: 2 x 4 pairs."""
    run = small_training("digits_nnclr", [*CROPS, "bank.init=random"])
    t = run.training
    batch = run.batch(0)
    images = t.images(batch)
    with torch.no_grad():
        embeddings = [t.pair.online.embed(image) for image in images]
    for layer in t.norms:
        layer.pending.clear()
    bank, total = t.bank.all_rows("key"), 0.0
    for a in (0, 1):
        nn = bank[(embeddings[a][0] @ bank.T).argmax(1)]
        for v in range(5):
            if v != a:
                total += F.cross_entropy(nn @ embeddings[v][1].T / 0.2, torch.arange(16)) / 8
    assert float(run.step(batch).scalars["loss"]) == pytest.approx(float(total), abs=of_step(run.training.step))


ENCODER = ["method.neighbors.support=encoder", "bank.size=32"]


@pytest.mark.parametrize("overrides", [[], ["method.momentum_encoder=true"]], ids=["online", "momentum"])
def test_the_support_set_is_embedded_by_the_current_encoder(small_training, overrides):
    """32 different random images through the network as it is before the step. Nothing of earlier steps is kept."""
    run = small_training("digits_nnclr", [*ENCODER, *overrides])
    t, indices = run.training, []
    for step in range(3):
        batch = run.batch(step)
        net = t.pair.target or t.pair.online
        expected, index = [], []
        for support in t.support.batches(step):
            (image,) = t.images(support, [0])
            with torch.no_grad():
                expected.append(net.embed(image)[0])
            index += support.index.tolist()
        for layer in t.norms:
            layer.pending.clear()
        run.step(batch)
        torch.testing.assert_close(t.bank.all_rows("key"), torch.cat(expected), rtol=0, atol=of_step(3))
        assert t.bank.all_rows("index").tolist() == index and len(set(index)) == 32
        indices.append(index)
    assert indices[0] != indices[1] != indices[2]


def test_support_images_do_not_change_running_statistics(small_training):
    """Only the views of the batch enter the running statistics."""
    queue, refilled = (small_training("digits_nnclr", [*overrides, "bank.size=32"]) for overrides in ([], ENCODER))
    batch = queue.batch(0)
    queue.step(batch)
    refilled.step(batch)
    for one, other in zip(queue.training.norms, refilled.training.norms, strict=True):
        torch.testing.assert_close(one.running_mean, other.running_mean, rtol=0, atol=of_step(3))


def test_support_order_differs_by_step_and_is_split_over_ranks(small_training):
    order = SupportOrder(100, seed=3, global_batch=8, per_step=4)
    steps = [[int(i) for u in range(4 * t, 4 * t + 4) for i in order.batch(u)] for t in range(3)]
    assert all(len(set(step)) == 32 for step in steps) and steps[0] != steps[1]
    assert [int(i) for r in range(4) for i in order.local_batch(5, r, 4)] == order.batch(5).tolist()
    assert order.epoch_of(7) == 1
    with pytest.raises(ConfigError) as caught:
        SupportOrder(20, seed=0, global_batch=8, per_step=4)
    assert caught.value.what == "bank.size" and "32 images" in caught.value.got and "20" in caught.value.expected
    with pytest.raises(ConfigError) as caught:
        small_training("digits_nnclr", ["method.neighbors.support=encoder", "bank.size=40"])
    assert caught.value.what == "bank.size" and "40" in caught.value.got


@pytest.mark.parametrize(
    ("override", "what", "got"),
    [
        ("augment=strnog", "views.crops.augment", "'strnog'"),
        ("scale=[0.5,0.1]", "views.crops.scale", "[0.5, 0.1]"),
        ("count=-1", "views.crops", "-1 crops"),
        ("size=4", "views.crops", "4 pixels"),
    ],
)
def test_invalid_crops_are_refused(override, what, got):
    with pytest.raises(ConfigError) as caught:
        values = recipe.compose("digits_msf", ["views.crops.count=2", f"views.crops.{override}"])
        build_view_plan(values, build_method(values))
    assert caught.value.what == what and got in str(caught.value.got)
