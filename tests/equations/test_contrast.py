"""The formulas of MoCo, SimCLR, NNCLR and SimSiam against loops, closed forms and limits."""

import math

import pytest
import torch
import torch.nn.functional as F

from hpcssl import rng
from hpcssl.methods import equations

TAU = 0.3


def unit(*shape, at):
    return F.normalize(torch.randn(shape, generator=rng.generator(rng.key(0, at)), dtype=torch.float64), dim=-1)


def dot(a, b):
    return sum(float(x) * float(y) for x, y in zip(a, b, strict=True))


def nll(positive, terms):
    """−log of the share of exp(positive/τ) in the sum of exp(term/τ)."""
    return -math.log(math.exp(positive / TAU) / sum(math.exp(t / TAU) for t in terms))


def close(found, literal):
    torch.testing.assert_close(found, torch.tensor(literal, dtype=torch.float64), rtol=0, atol=1e-13)


def test_negative_cosine_is_half_the_distance_less_one():
    u, v = unit(6, 5, at="u"), unit(6, 5, at="v")
    close(equations.negative_cosine(u, v), [-dot(a, b) for a, b in zip(u, v, strict=True)])
    torch.testing.assert_close(2 + 2 * equations.negative_cosine(u, v), equations.regression(u, v))


def test_info_nce_by_loops():
    q, k, bank = unit(5, 4, at="q"), unit(5, 4, at="k"), unit(9, 4, at="bank")
    close(equations.info_nce(q, k, bank, TAU),
          [nll(dot(q[i], k[i]), [dot(q[i], k[i]), *(dot(q[i], n) for n in bank)]) for i in range(5)])


def test_info_nce_without_negatives_costs_nothing_and_with_equal_ones_the_logarithm():
    q = unit(5, 4, at="q")
    close(equations.info_nce(q, q, q[:0], TAU), [0.0] * 5)
    close(equations.info_nce(q[:1], q[:1], q[:1].expand(7, 4), TAU), [math.log(8)])


def test_contrast_by_loops():
    a, b = unit(5, 4, at="a"), unit(8, 4, at="b")
    partner = torch.tensor([3, 1, 7, 0, 4])
    close(equations.contrast(a, b, partner, TAU),
          [nll(dot(a[i], b[p]), [dot(a[i], n) for n in b]) for i, p in enumerate(partner.tolist())])


def test_contrast_gradient_is_softmax_less_one():
    """∂L_i/∂b_n = (softmax_n − [n = i]) a_i / τ: closed form."""
    a, b = unit(5, 4, at="a"), unit(5, 4, at="b").requires_grad_()
    equations.contrast(a, b, torch.arange(5), TAU).sum().backward()
    share = (a @ b.detach().T / TAU).softmax(1) - torch.eye(5, dtype=torch.float64)
    torch.testing.assert_close(b.grad, share.T @ a / TAU, rtol=0, atol=1e-13)


def test_nt_xent_by_loops():
    """SimCLR's Algorithm 1 over the 2N rows laid end to end, every row against all but itself."""
    a, b = unit(4, 5, at="a"), unit(4, 5, at="b")
    rows, own = torch.cat((a, b)), torch.arange(4)
    literal = [nll(dot(rows[i], rows[(i + 4) % 8]), [dot(rows[i], rows[k]) for k in range(8) if k != i])
               for i in range(8)]
    close(equations.nt_xent(a, b, a, own, own[:, None], TAU), literal[:4])
    close(equations.nt_xent(b, a, b, own, own[:, None], TAU), literal[4:])


def test_nt_xent_of_orthogonal_images_in_closed_form():
    """Equal views, orthogonal images: log(1 + (2N − 2) exp(−1/τ))."""
    z, own = torch.eye(4, dtype=torch.float64), torch.arange(4)
    close(equations.nt_xent(z, z, z, own, own[:, None], TAU), [math.log(1 + 6 * math.exp(-1 / TAU))] * 4)


def test_nt_xent_leaves_out_the_partner_of_a_mixture():
    """BSIM eq. 1: the same-view sum runs over k that are neither of the two mixed images."""
    a, b, own = unit(4, 5, at="a"), unit(4, 5, at="b"), torch.arange(4)
    pairs = torch.stack((own, own ^ 1), 1)
    literal = [nll(dot(a[i], b[i]), [*(dot(a[i], n) for n in b), *(dot(a[i], a[k]) for k in range(4)
                                                                    if k not in (i, i ^ 1))]) for i in range(4)]
    close(equations.nt_xent(a, b, a, own, pairs, TAU), literal)


def test_soft_neighbour_by_loops_and_in_the_cold():
    z, bank = unit(3, 4, at="z"), unit(6, 4, at="bank")
    for row, found in zip(z, equations.soft_neighbour(z, bank, TAU), strict=True):
        weights = [math.exp(dot(row, q) / TAU) for q in bank]
        mixed = [sum(w * float(q[d]) for w, q in zip(weights, bank, strict=True)) for d in range(4)]
        length = math.sqrt(sum(x * x for x in mixed))
        close(found, [x / length for x in mixed])
    nearest = bank[(z @ bank.T).argmax(1)]
    torch.testing.assert_close(equations.soft_neighbour(z, bank, 1e-3), nearest, rtol=0, atol=1e-6)


@pytest.mark.parametrize("tau", [0.05, 1.0])
def test_swapping_the_sides_of_contrast_is_the_column_softmax(tau):
    """What the text of NNCLR adds: −log exp(a_i·b_i/τ) / Σ_k exp(a_k·b_i/τ)."""
    a, b = unit(5, 4, at="a"), unit(5, 4, at="b")
    columns = F.cross_entropy((a @ b.T / tau).T, torch.arange(5), reduction="none")
    torch.testing.assert_close(equations.contrast(b, a, torch.arange(5), tau), columns, rtol=0, atol=1e-13)
