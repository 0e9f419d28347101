"""The Triton kernels of grouped norms in Triton's interpreter, on a CPU: ``python interpreted_norms.py FILE``.

A process of its own, because triton decides when it is imported whether it interprets. What was compared, and the
largest differences from float64, go to FILE as JSON.
"""

import json
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import torch

from hpcssl.nets.kernels import grouped_triton
from tests import triton_interpreter

EPS = 1e-5
# groups, rows of one group and channels, height and width, type, offset of the values from zero, what follows the norm
CASES = (
    (2, 3, 20, (5, 4), torch.float32, 0.0, ""),
    (3, 37, 70, None, torch.float32, 30.0, ""),  # more than one block of channels, none of them full; several splits
    (2, 4, 16, (3, 3), torch.bfloat16, 1.0, ""),
    (2, 2, 5, None, torch.float16, 0.0, ""),  # without weight and bias
    (2, 3, 20, (5, 4), torch.float32, 0.0, "relu"),
    (1, 9, 70, (4, 3), torch.float32, 0.0, "residual relu"),
    (2, 4, 16, (3, 3), torch.bfloat16, 0.0, "residual relu"),
    (2, 4, 5, None, torch.float16, 0.0, "relu"),
)


def reference(x, grad, weight, bias, groups, residual, relu):
    """Results of torch in float64, group by group."""
    x = x.double().requires_grad_()
    affine = [None if t is None else t.double().requires_grad_() for t in (weight, bias)]
    parts = [torch.nn.functional.batch_norm(p, None, None, *affine, training=True, eps=EPS) for p in x.chunk(groups)]
    y = torch.cat(parts)
    if residual is not None:
        residual = residual.double().requires_grad_()
        y = y + residual
    y = y.relu() if relu else y
    y.backward(grad.double())
    axes = [0, *range(2, x.dim())]
    moments = [torch.cat((p.mean(axes), p.var(axes))) for p in x.detach().chunk(groups)]
    results = {"y": y.detach(), "statistics": torch.stack(moments), "grad_x": x.grad}
    if weight is not None:
        results |= {"grad_weight": affine[0].grad, "grad_bias": affine[1].grad}
    if residual is not None:
        results["grad_residual"] = residual.grad
    return results


def measure(groups, samples, channels, side, dtype, offset, after):
    """What the case compares; the largest difference of each result from float64, and its largest value."""
    generator = torch.Generator().manual_seed(samples)
    layout = torch.channels_last if side else torch.contiguous_format
    shape = (groups * samples, channels, *(side or ()))
    x, grad, residual = (
        torch.randn(shape, generator=generator).to(dtype).contiguous(memory_format=layout) for _ in range(3)
    )
    residual, relu = residual if "residual" in after else None, "relu" in after
    x = x + offset
    weight, bias = (torch.randn(channels, generator=generator) for _ in range(2)) if channels > 5 else (None, None)
    y, moments, statistics = grouped_triton.forward(x, groups, weight, bias, EPS, residual, relu)
    grad_x, grad_weight, grad_bias, grad_residual = grouped_triton.backward(
        grad, x, moments, weight, y if relu else None, residual is not None
    )
    assert y.is_contiguous(memory_format=layout) and y.dtype == grad_x.dtype == dtype
    ours = {"y": y, "statistics": statistics, "grad_x": grad_x, "grad_weight": grad_weight, "grad_bias": grad_bias}
    ours["grad_residual"] = grad_residual
    expected = reference(x, grad, weight, bias, groups, residual, relu)
    assert not relu or torch.equal(y > 0, expected["y"] > 0)  # no rounding decides where the gradient is 0
    differences = {
        name: [float((ours[name].double() - value).abs().max()), float(value.abs().max())]
        for name, value in expected.items()
    }
    values = x.numel() // channels // groups
    stored_eps = torch.finfo(dtype).eps
    return {"groups": groups, "values": values, "offset": offset, "eps": stored_eps, "differences": differences}


if __name__ == "__main__":
    triton_interpreter.check()
    torch.set_num_threads(1)
    grouped_triton._PROGRAMS = 16  # several splits with little to interpret
    with open(sys.argv[1], "w") as file:
        json.dump([measure(*case) for case in CASES], file)
