"""What torch's CUDA kernels of SyncBatchNorm compute, for machines without a GPU.

Torch has them for CUDA alone: no CPU version, and no shape functions, without which fake tensors cannot pass.
``ON_CPU`` has literal versions by name, written from the definition of batch norm. ``register_shapes`` lets fake
tensors pass.
"""

import torch

from benchmarks.fake_gpu import SYNC_NORM_SHAPES


def _wide(x):
    """[C, values] of each channel."""
    return x.transpose(0, 1).flatten(1)


def _as(x, value_C):
    return value_C.view(1, -1, *[1] * (x.dim() - 2))


def batch_norm_stats(x, eps):
    mean = _wide(x).mean(1)
    return mean, 1 / torch.sqrt(((_wide(x) - mean[:, None]) ** 2).mean(1) + eps)


def batch_norm_gather_stats_with_counts(_x, means, invstds, running_mean, running_var, momentum, eps, counts):
    n, total = counts[:, None], counts.sum()
    mean = (n * means).sum(0) / total
    var = (n * (1 / invstds**2 - eps + (means - mean) ** 2)).sum(0) / total
    running_mean.mul_(1 - momentum).add_(momentum * mean)
    running_var.mul_(1 - momentum).add_(momentum * var * total / (total - 1))
    return mean, 1 / torch.sqrt(var + eps)


def batch_norm_elemt(x, weight, bias, mean, invstd, _eps):
    y = (x - _as(x, mean)) * _as(x, invstd)
    return y if weight is None else y * _as(x, weight) + _as(x, bias)


def batch_norm_backward_reduce(grad, x, mean, invstd, weight, input_g, weight_g, bias_g):
    sum_dy = _wide(grad).sum(1)
    sum_dy_xmu = (_wide(grad) * (_wide(x) - mean[:, None])).sum(1)
    assert input_g and weight_g == bias_g == (weight is not None)
    return sum_dy, sum_dy_xmu, sum_dy_xmu * invstd if weight_g else None, sum_dy if bias_g else None


def batch_norm_backward_elemt(grad, x, mean, invstd, weight, sum_dy, sum_dy_xmu, counts):
    assert counts.dtype == torch.int32
    total, scale = counts.sum(), invstd if weight is None else invstd * weight
    centered = (x - _as(x, mean)) * _as(x, invstd**2 * sum_dy_xmu / total)
    return (grad - _as(x, sum_dy / total) - centered) * _as(x, scale)


ON_CPU = {
    function.__name__: function
    for function in (
        batch_norm_stats,
        batch_norm_gather_stats_with_counts,
        batch_norm_elemt,
        batch_norm_backward_reduce,
        batch_norm_backward_elemt,
    )
}


def register_shapes():
    """Return the library that holds the shape functions; they are gone when it is.

    A version of torch that has them keeps its own.
    """
    library = torch.library.Library("aten", "IMPL")
    for name, shapes in SYNC_NORM_SHAPES.items():
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", "Meta"):
            library.impl(name, shapes, "Meta")
    return library
