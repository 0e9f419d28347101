"""The formulas of MoCo, SimCLR, NNCLR and SimSiam against loops, closed forms and limits."""

import math

import pytest
import torch
import torch.nn.functional as F

from hpcssl import rng
from hpcssl.methods import equations
from tests.tolerances import rounding

TAU = 0.3
TERMS = 64  # at most 9 logits of 5 products each, their exponentials, and a logarithm


def unit(*shape, at):
    return F.normalize(torch.randn(shape, generator=rng.generator(rng.key(0, at)), dtype=torch.float64), dim=-1)


def dot(a, b):
    return sum(float(x) * float(y) for x, y in zip(a, b, strict=True))


def nll(positive, terms):
    """−log of the share of exp(positive/τ) in the sum of exp(term/τ)."""
    return -math.log(math.exp(positive / TAU) / sum(math.exp(t / TAU) for t in terms))


def assert_close(actual, literal):
    torch.testing.assert_close(
        actual, torch.tensor(literal, dtype=torch.float64), rtol=0, atol=rounding(torch.float64, TERMS, scale=4 / TAU)
    )


def test_negative_cosine_is_half_the_squared_distance_minus_one():
    u, v = unit(6, 5, at="u"), unit(6, 5, at="v")
    assert_close(equations.negative_cosine(u, v), [-dot(a, b) for a, b in zip(u, v, strict=True)])
    torch.testing.assert_close(
        2 + 2 * equations.negative_cosine(u, v),
        equations.squared_distance(u, v),
        rtol=0,
        atol=rounding(torch.float64, 10, scale=4),
    )


def test_info_nce_against_loops():
    q, k, bank = unit(5, 4, at="q"), unit(5, 4, at="k"), unit(9, 4, at="bank")
    assert_close(
        equations.info_nce(q, k, bank, TAU),
        [nll(dot(q[i], k[i]), [dot(q[i], k[i]), *(dot(q[i], n) for n in bank)]) for i in range(5)],
    )


def test_info_nce_is_zero_without_negatives_and_a_logarithm_with_equal_ones():
    q = unit(5, 4, at="q")
    assert_close(equations.info_nce(q, q, q[:0], TAU), [0.0] * 5)
    assert_close(equations.info_nce(q[:1], q[:1], q[:1].expand(7, 4), TAU), [math.log(8)])


def test_in_batch_info_nce_against_loops():
    a, b = unit(5, 4, at="a"), unit(8, 4, at="b")
    partner = torch.tensor([3, 1, 7, 0, 4])
    assert_close(
        equations.in_batch_info_nce(a, b, partner, TAU),
        [nll(dot(a[i], b[p]), [dot(a[i], n) for n in b]) for i, p in enumerate(partner.tolist())],
    )


def test_gradient_of_in_batch_info_nce_is_the_softmax_minus_one():
    """∂L_i/∂b_n = (softmax_n − [n = i]) a_i / τ in closed form."""
    a, b = unit(5, 4, at="a"), unit(5, 4, at="b").requires_grad_()
    equations.in_batch_info_nce(a, b, torch.arange(5), TAU).sum().backward()
    share = (a @ b.detach().T / TAU).softmax(1) - torch.eye(5, dtype=torch.float64)
    torch.testing.assert_close(b.grad, share.T @ a / TAU, rtol=0, atol=rounding(torch.float64, TERMS, scale=1 / TAU))


def test_nt_xent_against_loops():
    """Algorithm 1 of SimCLR over the 2N concatenated rows: every row against all rows but itself."""
    a, b = unit(4, 5, at="a"), unit(4, 5, at="b")
    rows, own = torch.cat((a, b)), torch.arange(4)
    literal = [
        nll(dot(rows[i], rows[(i + 4) % 8]), [dot(rows[i], rows[k]) for k in range(8) if k != i]) for i in range(8)
    ]
    assert_close(equations.nt_xent(a, b, a, own, own[:, None], TAU), literal[:4])
    assert_close(equations.nt_xent(b, a, b, own, own[:, None], TAU), literal[4:])


def test_nt_xent_of_orthogonal_images_in_closed_form():
    """Equal views, orthogonal images: log(1 + (2N − 2) exp(−1/τ))."""
    z, own = torch.eye(4, dtype=torch.float64), torch.arange(4)
    assert_close(equations.nt_xent(z, z, z, own, own[:, None], TAU), [math.log(1 + 6 * math.exp(-1 / TAU))] * 4)


def test_nt_xent_excludes_the_partner_of_a_mixture():
    """BSIM eq. 1: the sum over the same view excludes both of the mixed images."""
    a, b, own = unit(4, 5, at="a"), unit(4, 5, at="b"), torch.arange(4)
    pairs = torch.stack((own, own ^ 1), 1)
    literal = [
        nll(dot(a[i], b[i]), [*(dot(a[i], n) for n in b), *(dot(a[i], a[k]) for k in range(4) if k not in (i, i ^ 1))])
        for i in range(4)
    ]
    assert_close(equations.nt_xent(a, b, a, own, pairs, TAU), literal)


def test_soft_nearest_neighbor_against_loops_and_at_a_low_temperature():
    z, bank = unit(3, 4, at="z"), unit(6, 4, at="bank")
    for row, actual in zip(z, equations.soft_nearest_neighbor(z, bank, TAU), strict=True):
        weights = [math.exp(dot(row, q) / TAU) for q in bank]
        mixed = [sum(w * float(q[d]) for w, q in zip(weights, bank, strict=True)) for d in range(4)]
        length = math.sqrt(sum(x * x for x in mixed))
        assert_close(actual, [x / length for x in mixed])
    nearest = bank[(z @ bank.T).argmax(1)]
    gap = -float((z @ bank.T).topk(2).values.diff().max())  # the other rows together weigh 5 exp(-gap / tau)
    tolerance = 2 * 5 * math.exp(-gap / 1e-3) + rounding(torch.float64, TERMS)
    torch.testing.assert_close(equations.soft_nearest_neighbor(z, bank, 1e-3), nearest, rtol=0, atol=tolerance)


@pytest.mark.parametrize("tau", [0.05, 1.0])
def test_in_batch_info_nce_with_swapped_sides_is_the_column_softmax(tau):
    """The second term in the text of NNCLR: −log exp(a_i·b_i/τ) / Σ_k exp(a_k·b_i/τ)."""
    a, b = unit(5, 4, at="a"), unit(5, 4, at="b")
    columns = F.cross_entropy((a @ b.T / tau).T, torch.arange(5), reduction="none")
    torch.testing.assert_close(
        equations.in_batch_info_nce(b, a, torch.arange(5), tau),
        columns,
        rtol=0,
        atol=rounding(torch.float64, TERMS, scale=1 / tau),
    )
