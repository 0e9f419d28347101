"""BSIM and WBSIM: the mixture as pixels, its equations written out, and the limits in which it is the plain method."""

import numpy as np
import pytest
import torch

from hpcssl import rng
from hpcssl.errors import ConfigError
from hpcssl.train import recipe, step
from hpcssl.views import mix
from hpcssl.views.mix import MixOptions, Mixture, Pairs
from hpcssl.views.plan import Term, View, both_ways, one_way
from hpcssl.world import World

BSIM = ["mix.kind=cutmix"]
SWAP = [1, 0, 3, 2]


def test_cutmix_keeps_the_share_lambda_of_each_image():
    own = torch.zeros(4, 3, 32, 32) + torch.arange(4.0).view(4, 1, 1, 1)
    for place in range(50):
        made = mix.draw(MixOptions(kind="cutmix"), rng.key(0, place), 32)
        mixed = mix.apply(own, made, own[SWAP])
        for row, partner in enumerate((1, 0, 3, 2)):
            assert set(mixed[row].unique().tolist()) <= {float(row), float(partner)}
            assert float((mixed[row] == row).float().mean()) == pytest.approx(made.lam, abs=1e-6)


def test_mixup_is_the_weighted_sum():
    x = torch.rand(4, 3, 8, 8)
    made = mix.apply(x, Mixture(0.3, None), x[SWAP])
    torch.testing.assert_close(made[2], 0.3 * x[2] + 0.7 * x[3])


@pytest.mark.parametrize("alpha", [0.25, 1.0, 2.0])
def test_lambda_has_the_moments_of_its_beta(alpha):
    drawn = np.array([mix.draw(MixOptions(kind="mixup", alpha=alpha), rng.key(0, i), 8).lam for i in range(4000)])
    assert drawn.mean() == pytest.approx(0.5, abs=0.02)
    assert drawn.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.06)


def test_rewriting_a_plan():
    plan = both_ways(View("a", 8), View("b", 8), 0.5)
    bsim = mix.rewrite(plan, MixOptions(kind="cutmix"))
    assert bsim.views == plan.views and bsim.mixed == (0, 1)
    assert bsim.terms == (Term(2, 1, 0.5, "own"), Term(2, 1, 0.5, "partner"), Term(3, 0, 0.5, "own"),
                          Term(3, 0, 0.5, "partner"))
    assert bsim.queries == (2, 3) and bsim.targets == (0, 1)
    wbsim = mix.rewrite(plan, MixOptions(kind="cutmix", loss="wbsim", weight=2.0))
    assert wbsim.terms[:2] == plan.terms and {t.share for t in wbsim.terms[2:]} == {1.0}
    control = mix.rewrite(one_way(View("a", 8), View("b", 8)), MixOptions(kind="mixup", loss="augment"))
    assert control.terms == (Term(2, 1, 1.0, "plain"),)
    assert mix.rewrite(plan, MixOptions()) is plan


def partners(made):
    """Whose image each of the 16 is mixed with in the first step."""
    pairing = made.training.recipe.mix.pairing
    by_name = {"neighbours": [i ^ 1 for i in range(16)], "flip": [15 - i for i in range(16)],
               "permutation": rng.permutation(rng.key(0, "pairs", 0), 16).tolist()}
    return torch.tensor(by_name[pairing])


def literal_byol(made, mixtures, *, plain):
    """Eq. 4 (as distances: + 4 for the two directions), and the plain loss beside it for WBSIM."""
    pair = made.training.pair
    x1, x2 = made.training.images(made.batch(0))
    swap = partners(made)
    total = 0.0
    seen = [x1, x2] * plain + [mix.apply(x, m, x[swap]) for x, m in zip((x1, x2), mixtures, strict=True)]
    u = [u for _, u in pair.embed(seen)]
    z1, z2 = pair.embed_target([x1, x2])
    for lam, query, target in ((mixtures[0].lam, u[-2], z2), (mixtures[1].lam, u[-1], z1)):
        own, partner = (query * target).sum(1), (query * target[swap]).sum(1)
        total += (2 - 2 * (lam * own + (1 - lam) * partner)).mean()
    if plain:
        total += (2 - 2 * (u[0] * z2).sum(1)).mean() + (2 - 2 * (u[1] * z1).sum(1)).mean()
    return float(total.detach())


@pytest.mark.parametrize("kind,loss,pairing", [
    ("cutmix", "bsim", "neighbours"), ("mixup", "bsim", "neighbours"), ("cutmix", "wbsim", "neighbours"),
    ("mixup", "wbsim", "neighbours"), ("cutmix", "bsim", "flip"), ("mixup", "wbsim", "permutation")])
def test_byol_against_equation_4(small_training, kind, loss, pairing):
    made = small_training("digits_byol", [f"mix.kind={kind}", f"mix.loss={loss}", f"mix.pairing={pairing}"])
    options = made.training.recipe.mix
    mixtures = [mix.draw(options, rng.key(0, "mix", 0, view), 16) for view in (0, 1)]
    assert 0 < mixtures[0].lam < 1 and mixtures[0].lam != mixtures[1].lam
    wanted = literal_byol(made, mixtures, plain=loss == "wbsim")
    assert float(made.step(made.batch(0)).scalars["loss"]) == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("name", [n for n in recipe.names() if n.startswith("digits_")
                                  and not n.endswith(("_bsim", "_wbsim")) and "simclr" not in n])
def test_lambda_one_is_the_plain_method(small_training, monkeypatch, name):
    """λ = 1 and an empty box: the same loss and parameters, for every method but SimCLR, whose eq. 1 drops a term.
    Views that pass the norms together would meet other ones."""
    plain = small_training(name, ["model.joint=false"])
    monkeypatch.setattr(step.mix, "draw", lambda *_: Mixture(1.0, (0, 0, 0, 0)))
    mixed = small_training(name, [*BSIM, "model.joint=false"])
    for number in range(3):
        batch = plain.batch(number)
        assert float(plain.step(batch).scalars["loss"]) == pytest.approx(
            float(mixed.step(batch).scalars["loss"]), abs=1e-11)
    for one, other in zip(plain.training.pair.parameters(), mixed.training.pair.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


def test_lambda_zero_is_the_plain_method_on_partners(small_training, monkeypatch):
    """λ = 0: the whole image is the partner's, and so is the target: the batch in another order."""
    plain = small_training("digits_byol", [])
    monkeypatch.setattr(step.mix, "draw", lambda *_: Mixture(0.0, (0, 16, 0, 16)))
    mixed = small_training("digits_byol", BSIM)
    batch = plain.batch(0)
    losses = [float(made.step(batch).scalars["loss"]) for made in (plain, mixed)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-11)


def test_the_control_asks_for_the_own_image_alone(small_training):
    bsim, control = (small_training("digits_msf", [*BSIM, f"mix.loss={loss}"]) for loss in ("bsim", "augment"))
    batch = bsim.batch(0)
    assert abs(float(bsim.step(batch).scalars["loss"]) - float(control.step(batch).scalars["loss"])) > 1e-4


@pytest.mark.parametrize("pairing", ["neighbours", "flip", "permutation"])
def test_simclr_against_equations_1_and_2(small_training, pairing):
    """Both parents positive over one denominator; the other mixtures are negatives, but for those that show one of the
    two images."""
    made = small_training("digits_simclr", [*BSIM, "method.reduction=mean", "method.tau=0.2",
                                            f"mix.pairing={pairing}"])
    other = partners(made).tolist()
    mixtures = [mix.draw(made.training.recipe.mix, rng.key(0, "mix", 0, view), 16) for view in (0, 1)]
    x = made.training.images(made.batch(0))
    n = len(x[0])
    z = [z.detach().numpy() for z, _ in made.training.pair.embed(x)]
    m = [z.detach().numpy() for z, _ in made.training.pair.embed(
        [mix.apply(view, mixture, view[other]) for view, mixture in zip(x, mixtures, strict=True)])]
    total = 0.0
    for view, lam in ((0, mixtures[0].lam), (1, mixtures[1].lam)):
        anchor, clean = m[view], z[1 - view]
        for i in range(n):
            j = other[i]
            close = [np.exp(anchor[i] @ clean[k] / 0.2) for k in range(n)]
            den = sum(close) + sum(np.exp(anchor[i] @ anchor[k] / 0.2) for k in range(n)
                                   if not {k, other[k]} & {i, j})
            total -= lam * np.log(close[i] / den) + (1 - lam) * np.log(close[j] / den)
    assert float(made.step(made.batch(0)).scalars["loss"]) == pytest.approx(total / (2 * n), abs=1e-11)


def test_moco_against_equation_3(small_training):
    """λ times the own key's InfoNCE and 1 − λ times the partner's, each beside the bank as it was before the step."""
    made = small_training("digits_moco_v2", [*BSIM, "method.tau=0.2"])
    t = made.training
    mixture = mix.draw(t.recipe.mix, rng.key(0, "mix", 0, 0), 16)
    query, key = t.images(made.batch(0))
    bank = t.bank.everything("key").clone()
    (q, _), = t.pair.embed([mix.apply(query, mixture, query[np.arange(len(query)) ^ 1])])
    k, = t.pair.embed_target([key])
    q, k, total = q.detach(), k.detach(), 0.0
    for i in range(len(q)):
        queue = np.exp((q[i] @ bank.T).numpy() / 0.2).sum()
        for weight, j in ((mixture.lam, i), (1 - mixture.lam, i ^ 1)):
            positive = np.exp(float(q[i] @ k[j]) / 0.2)
            total -= weight * np.log(positive / (positive + queue))
    assert float(made.step(made.batch(0)).scalars["loss"]) == pytest.approx(total / len(q), abs=1e-11)


def test_pairs_find_their_kin_in_either_order():
    """Of mixture i those that show i or its partner, whether rows stand in the own images' order or the partners'."""
    for pairing in ("neighbours", "flip", "permutation"):
        pairs = Pairs.draw(MixOptions(kind="cutmix", pairing=pairing), 5, 12, World.alone())
        rows = torch.arange(12)
        other = (pairs.order if pairs.order is not None else rows ^ 1).tolist()
        assert torch.equal(pairs.partners(rows.float()), torch.tensor(other).float())
        moved = pairs.to_partner(rows).tolist()
        assert [other[i] for i in moved] == rows.tolist()
        kin = pairs.kin(rows)
        for i in range(12):
            for order in (rows.tolist(), moved):
                own = {order[i], other[order[i]]}
                assert set(kin[i].tolist()) == {k for k in range(12) if {order[k], other[order[k]]} & own}


def test_mixtures_that_leave_their_process_refuse_micro_batches(small_training):
    with pytest.raises(ConfigError, match=r"mix\.pairing=flip"):
        small_training("digits_byol", [*BSIM, "mix.pairing=flip", "machine.accumulate=2"])
