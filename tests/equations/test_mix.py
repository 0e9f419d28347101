"""BSIM and WBSIM: pixels of mixtures, the equations written out, and the limits in which they are the plain method."""

import numpy as np
import pytest
import torch

from hpcssl import rng
from hpcssl.distributed.world import World
from hpcssl.errors import ConfigError
from hpcssl.train import recipe, step
from hpcssl.views import mix
from hpcssl.views.mix import MixOptions, MixPairing, Mixture
from hpcssl.views.plan import Term, View, one_way_plan, symmetric_plan
from tests.tolerances import of_step, rounding

BSIM = ["mix.kind=cutmix"]
SWAP = [1, 0, 3, 2]


def test_cutmix_keeps_the_share_lambda_of_each_image():
    own = torch.zeros(4, 3, 32, 32) + torch.arange(4.0).view(4, 1, 1, 1)
    for place in range(50):
        mixture = mix.draw_mixture(MixOptions(kind="cutmix"), rng.key(0, place), 32)
        mixed = mix.mix_images(own, mixture, own[SWAP])
        for row, partner in enumerate((1, 0, 3, 2)):
            assert set(mixed[row].unique().tolist()) <= {float(row), float(partner)}
            assert float((mixed[row] == row).float().mean()) == mixture.lam  # multiples of 1 / 1024, exact in float32


def test_mixup_is_the_weighted_sum():
    x = torch.rand(4, 3, 8, 8)
    mixed = mix.mix_images(x, Mixture(0.3, None), x[SWAP])
    torch.testing.assert_close(mixed[2], 0.3 * x[2] + 0.7 * x[3], rtol=0, atol=rounding(torch.float32, 4))


@pytest.mark.parametrize("alpha", [0.25, 1.0, 2.0])
def test_lambda_has_the_moments_of_its_beta(alpha):
    """Within 4 sigma, which six correct moments would exceed with a probability of 4e-4.

    The draws are integers by key: they are the same on every CPU. The fourth moment of Beta(a, a) is
    (3 - 6 / (2a + 3)) times the square of its variance.
    """
    n, variance = 4000, 1 / (4 * (2 * alpha + 1))
    lam = np.array([mix.draw_mixture(MixOptions(kind="mixup", alpha=alpha), rng.key(0, i), 8).lam for i in range(n)])
    assert lam.mean() == pytest.approx(0.5, abs=4 * (variance / n) ** 0.5)
    assert lam.var() == pytest.approx(variance, rel=4 * ((2 - 6 / (2 * alpha + 3)) / n) ** 0.5)


def test_add_mixed_views():
    plan = symmetric_plan(View("a", 8), View("b", 8), 0.5)
    bsim = mix.add_mixed_views(plan, MixOptions(kind="cutmix"))
    assert bsim.views == plan.views and bsim.mixed == (0, 1)
    assert bsim.terms == (
        Term(2, 1, 0.5, "own"),
        Term(2, 1, 0.5, "partner"),
        Term(3, 0, 0.5, "own"),
        Term(3, 0, 0.5, "partner"),
    )
    assert bsim.queries == (2, 3) and bsim.targets == (0, 1)
    wbsim = mix.add_mixed_views(plan, MixOptions(kind="cutmix", loss="wbsim", weight=2.0))
    assert wbsim.terms[:2] == plan.terms and {t.share for t in wbsim.terms[2:]} == {1.0}
    control = mix.add_mixed_views(one_way_plan(View("a", 8), View("b", 8)), MixOptions(kind="mixup", loss="augment"))
    assert control.terms == (Term(2, 1, 1.0, "plain"),)
    assert mix.add_mixed_views(plan, MixOptions()) is plan


def partners(run):
    """The image that each of the 16 is mixed with in the first step."""
    pairing = run.training.recipe.mix.pairing
    by_name = {
        "adjacent": [i ^ 1 for i in range(16)],
        "flip": [15 - i for i in range(16)],
        "permutation": rng.permutation(rng.key(0, "pairs", 0), 16).tolist(),
    }
    return torch.tensor(by_name[pairing])


def literal_byol(run, mixtures, *, plain):
    """Eq. 4 (as distances: + 4 for the two directions); for WBSIM the plain loss is added."""
    pair = run.training.pair
    x1, x2 = run.training.images(run.batch(0))
    swap = partners(run)
    total = 0.0
    images = [x1, x2] * plain + [mix.mix_images(x, m, x[swap]) for x, m in zip((x1, x2), mixtures, strict=True)]
    u = [u for _, u in pair.embed(images)]
    z1, z2 = pair.embed_target([x1, x2])
    for lam, query, target in ((mixtures[0].lam, u[-2], z2), (mixtures[1].lam, u[-1], z1)):
        own, partner = (query * target).sum(1), (query * target[swap]).sum(1)
        total += (2 - 2 * (lam * own + (1 - lam) * partner)).mean()
    if plain:
        total += (2 - 2 * (u[0] * z2).sum(1)).mean() + (2 - 2 * (u[1] * z1).sum(1)).mean()
    return float(total.detach())


@pytest.mark.parametrize(
    "kind,loss,pairing",
    [
        ("cutmix", "bsim", "adjacent"),
        ("mixup", "bsim", "adjacent"),
        ("cutmix", "wbsim", "adjacent"),
        ("mixup", "wbsim", "adjacent"),
        ("cutmix", "bsim", "flip"),
        ("mixup", "wbsim", "permutation"),
    ],
)
def test_byol_against_equation_4(small_training, kind, loss, pairing):
    run = small_training("digits_byol", [f"mix.kind={kind}", f"mix.loss={loss}", f"mix.pairing={pairing}"])
    mixture = mix.draw_mixture(run.training.recipe.mix, rng.key(0, "mix", 0, 0), 16)
    assert 0 < mixture.lam < 1
    expected = literal_byol(run, [mixture, mixture], plain=loss == "wbsim")
    assert float(run.step(run.batch(0)).scalars["loss"]) == pytest.approx(expected, abs=of_step(1))


@pytest.mark.parametrize(
    "name",
    [
        n
        for n in recipe.names()
        if n.startswith("digits_") and not n.endswith(("_bsim", "_wbsim")) and "simclr" not in n
    ],
)
def test_lambda_one_is_the_plain_method(small_training, monkeypatch, name):
    """λ = 1 and an empty box: the same loss and parameters, for every method but SimCLR, whose eq. 1 drops a term.
    Views that pass the norms together would meet other ones."""
    plain = small_training(name, ["model.joint_forward=false"])
    monkeypatch.setattr(step.mix, "draw_mixture", lambda *_: Mixture(1.0, (0, 0, 0, 0)))
    mixed = small_training(name, [*BSIM, "model.joint_forward=false"])
    for number in range(3):
        batch = plain.batch(number)
        assert float(plain.step(batch).scalars["loss"]) == pytest.approx(
            float(mixed.step(batch).scalars["loss"]), abs=of_step(number + 1)
        )
    for one, other in zip(plain.training.pair.parameters(), mixed.training.pair.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=of_step(3))


def test_lambda_zero_is_the_plain_method_on_partners(small_training, monkeypatch):
    """λ = 0: the whole image is the partner's, and so is the target: the batch in another order."""
    plain = small_training("digits_byol", [])
    monkeypatch.setattr(step.mix, "draw_mixture", lambda *_: Mixture(0.0, (0, 16, 0, 16)))
    mixed = small_training("digits_byol", BSIM)
    batch = plain.batch(0)
    losses = [float(run.step(batch).scalars["loss"]) for run in (plain, mixed)]
    assert losses[0] == pytest.approx(losses[1], abs=of_step(1))


def test_the_control_asks_for_the_own_image_alone(small_training):
    bsim, control = (small_training("digits_msf", [*BSIM, f"mix.loss={loss}"]) for loss in ("bsim", "augment"))
    batch = bsim.batch(0)
    assert abs(float(bsim.step(batch).scalars["loss"]) - float(control.step(batch).scalars["loss"])) > 1e-4


@pytest.mark.parametrize("pairing", ["adjacent", "flip", "permutation"])
def test_simclr_against_equations_1_and_2(small_training, pairing):
    """Both parents positive over one denominator; the other mixtures are negatives, but for those that show one of the
    two images."""
    run = small_training(
        "digits_simclr", [*BSIM, "method.reduction=mean", "method.temperature=0.2", f"mix.pairing={pairing}"]
    )
    other = partners(run).tolist()
    mixtures = [mix.draw_mixture(run.training.recipe.mix, rng.key(0, "mix", 0, 0), 16)] * 2
    x = run.training.images(run.batch(0))
    n = len(x[0])
    z = [z.detach().numpy() for z, _ in run.training.pair.embed(x)]
    m = [
        z.detach().numpy()
        for z, _ in run.training.pair.embed(
            [mix.mix_images(view, mixture, view[other]) for view, mixture in zip(x, mixtures, strict=True)]
        )
    ]
    total = 0.0
    for view, lam in ((0, mixtures[0].lam), (1, mixtures[1].lam)):
        anchor, clean = m[view], z[1 - view]
        for i in range(n):
            j = other[i]
            close = [np.exp(anchor[i] @ clean[k] / 0.2) for k in range(n)]
            den = sum(close) + sum(np.exp(anchor[i] @ anchor[k] / 0.2) for k in range(n) if not {k, other[k]} & {i, j})
            total -= lam * np.log(close[i] / den) + (1 - lam) * np.log(close[j] / den)
    assert float(run.step(run.batch(0)).scalars["loss"]) == pytest.approx(total / (2 * n), abs=of_step(1))


def test_moco_against_equation_3(small_training):
    """λ times InfoNCE with the own key plus 1 − λ times that with the partner's key, on the bank before the step."""
    run = small_training("digits_moco_v2", [*BSIM, "method.temperature=0.2"])
    t = run.training
    mixture = mix.draw_mixture(t.recipe.mix, rng.key(0, "mix", 0, 0), 16)
    query, key = t.images(run.batch(0))
    bank = t.bank.all_rows("key").clone()
    ((q, _),) = t.pair.embed([mix.mix_images(query, mixture, query[np.arange(len(query)) ^ 1])])
    (k,) = t.pair.embed_target([key])
    q, k, total = q.detach(), k.detach(), 0.0
    for i in range(len(q)):
        queue = np.exp((q[i] @ bank.T).numpy() / 0.2).sum()
        for weight, j in ((mixture.lam, i), (1 - mixture.lam, i ^ 1)):
            positive = np.exp(float(q[i] @ k[j]) / 0.2)
            total -= weight * np.log(positive / (positive + queue))
    assert float(run.step(run.batch(0)).scalars["loss"]) == pytest.approx(total / len(q), abs=of_step(1))


def test_same_image_rows_in_either_order():
    """Mixture i has the rows that show image i or its partner, in the order of the images or of their partners."""
    for pairing in ("adjacent", "flip", "permutation"):
        pairs = MixPairing.draw(MixOptions(kind="cutmix", pairing=pairing), 5, 12, World.single_process())
        rows = torch.arange(12)
        other = (pairs.order if pairs.order is not None else rows ^ 1).tolist()
        assert torch.equal(pairs.partner_images(rows.float()), torch.tensor(other).float())
        moved = pairs.to_partner_order(rows).tolist()
        assert [other[i] for i in moved] == rows.tolist()
        same_image = pairs.same_image_rows(rows)
        for i in range(12):
            for order in (rows.tolist(), moved):
                own = {order[i], other[order[i]]}
                assert set(same_image[i].tolist()) == {k for k in range(12) if {order[k], other[order[k]]} & own}


def test_pairings_across_processes_refuse_micro_batches(small_training):
    with pytest.raises(ConfigError) as caught:
        small_training("digits_byol", [*BSIM, "mix.pairing=flip", "machine.accumulation_steps=2"])
    assert caught.value.what == "machine.accumulation_steps" and "mix.pairing=flip" in caught.value.got


def test_each_view_may_have_its_own_lambda(small_training):
    run = small_training("digits_byol", [*BSIM, "mix.lambda_scope=view"])
    mixtures = [mix.draw_mixture(run.training.recipe.mix, rng.key(0, "mix", 0, view), 16) for view in (0, 1)]
    assert mixtures[0].lam != mixtures[1].lam
    expected = literal_byol(run, mixtures, plain=False)
    assert float(run.step(run.batch(0)).scalars["loss"]) == pytest.approx(expected, abs=of_step(1))
