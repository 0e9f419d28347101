"""Tolerances for comparing two computations that differ only in the order of their arithmetic.

A tolerance that was found by running a test on one CPU and rounding up is a statement about that CPU: another
instruction set (AVX2, AVX-512), another BLAS, or another number of threads adds the same terms in another order. The
functions here derive a bound from what is computed instead of from what was once observed.
"""

from __future__ import annotations

import math

import torch

CONFIDENCE = 6.0  # lambda in ``rounding``

# Roundings on the longest path through one training step of the small network of tests/equations (resnet_tiny, batch
# of 16, images of 16 pixels). Forward: convolutions and linear layers add 27 + 3 * 288 + 2 * 576 + 1152 + 448 numbers,
# about 4,000; batch norms average 3 * 16 * 256 + 2 * 16 * 64 + 2 * 16 * 16 + 2 * 16 numbers, about 15,000. Backward:
# the same sums again for the gradients of the inputs, and sums over the same positions for those of the weights.
STEP_TERMS = 60_000


def rounding(
    dtype: torch.dtype, terms: int, *, steps: int = 1, amplification: float = 1.0, scale: float = 1.0
) -> float:
    """Bound the difference between two results that differ only by rounding.

    Derivation. Let u = eps / 2 be the unit roundoff. Summing n terms in some order gives the exact sum up to a factor
    1 + theta. In the worst case |theta| <= n * u (Higham, Accuracy and Stability of Numerical Algorithms, section 4.2).
    Rounding errors do not all point the same way: if they are independent with mean zero, then
    |theta| <= lambda * sqrt(n) * u with probability at least 1 - 2 * exp(-lambda^2 / 2) (Higham and Mary 2019, A New
    Approach to Probabilistic Rounding Error Analysis, theorem 2.4). Two orders of summation therefore differ by at
    most 2 * lambda * sqrt(n) * u = lambda * sqrt(n) * eps, relative to ``scale``. With lambda = 6 the probability of
    exceeding the bound is below 2 * 2 * exp(-18) = 6e-8 per compared number (two sums, two tails each). Below 36 terms
    the worst case, 2 * n * u = n * eps, is the smaller of the two, and is returned.

    Training repeats this: every step adds a new error of that size and carries the earlier ones along, multiplied by
    at most ``amplification``. Hence the factor ``steps * amplification``.

    Args:
        dtype: Floating-point type in which both results were computed.
        terms: Number of additions, or of other operations that round, on the longest path from the inputs to the
            result.
        steps: Number of training steps that both results have behind them.
        amplification: Largest factor by which a relative perturbation of the parameters, made once, changes the result
            within these steps. Measure it by perturbing the parameters; do not measure the rounding itself.
        scale: Magnitude of the terms: the sum of their absolute values for a sum, 1 for unit vectors.

    Returns:
        The absolute tolerance.
    """
    roundings = min(terms, CONFIDENCE * math.sqrt(terms))
    return roundings * torch.finfo(dtype).eps * steps * amplification * scale


def of_step(steps: int, amplification: float = 100.0, scale: float = 1.0) -> float:
    """Bound how far two float64 runs of the small network may be apart after some training steps.

    The default amplification was measured as follows. For SimSiam, NNSiam, NNCLR, SimCLR, MoCo v2, MSF, BYOL and CMSF
    on the digits recipes, one run was perturbed before its first step by a relative 1e-11 in all parameters. Over 24
    steps the losses then differed by at most 1e-9 (SimCLR) and the parameters by at most 4e-10, that is by factors of
    100 and 40. The factor does not grow with the steps: training at these rates is not chaotic within 24 steps.

    Args:
        steps: Number of training steps taken so far.
        amplification: See ``rounding``.
        scale: Magnitude of the loss or the parameters.

    Returns:
        The absolute tolerance.
    """
    return rounding(torch.float64, STEP_TERMS, steps=steps, amplification=amplification, scale=scale)
