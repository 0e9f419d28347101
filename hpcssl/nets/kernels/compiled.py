"""Residual blocks compiled by ``torch.compile``, forward and backward, for ``machine.compile``.

Each block is a compiled function of its own, and not the network as a whole. Gradients of the last blocks are then
ready while the first ones are still computed, so that their reduction over ranks overlaps with the backward pass. The
stem and the heads are not compiled.

A norm appends its statistics to ``pending``. Within the compiled function the lists start empty, and what they hold at
its end is a result: otherwise the compiled code would depend on how many views have passed before. Names of parameters
do not change, nor does what a step does with gradients.

The same machine compiles the same code again, so that a resumed run has the same bits. To that end inductor does
not choose kernels by timing them (its option ``deterministic``).
"""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch._dynamo
import torch._inductor.config
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from hpcssl.distributed import kernel_choice
from hpcssl.distributed.kernel_choice import Trial
from hpcssl.distributed.world import World
from hpcssl.nets import norm

LOG = logging.getLogger("hpcssl")
_BACKEND = "inductor"
_TOLERANCE = 0.01
"""Largest difference of a block's compiled and plain results, relative to the largest value: TensorFloat-32 rounds to
0.001, and code that is wrong is off by much more."""
_Run = Callable[[nn.Module, tuple[norm.BatchNorm, ...], Tensor], tuple[Tensor, list[Tensor]]]


def compile_blocks(networks: Iterable[nn.Module], world: World) -> bool:
    """Compile the residual blocks of networks in place, if a trial shows on all ranks that this works. A collective.

    A block is compiled when it first runs, and again for each further shape of its input.

    Args:
        networks: Their blocks keep parameters, names and results, up to rounding.
        world: The processes that train together.

    Returns:
        Whether the blocks are compiled now. If not, a warning has the reason.
    """
    blocks = [part for network in networks for part in network.modules() if isinstance(part, BasicBlock | Bottleneck)]
    # guards tell blocks, shapes and modes apart; at torch's limit of 8, further ones would silently not be compiled
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 16 * len(blocks))
    trial = Trial("a compiled block", "the plain one", _TOLERANCE, functools.partial(_measure_difference, world))
    if fault := kernel_choice.gather_fault(kernel_choice.run_trials([trial]), world):
        if world.is_main:
            LOG.warning("machine.compile=true is not used, and blocks run as they are: %s.", fault)
        return False
    run = _compile()
    for block in blocks:
        _replace_forward(block, run)
    return True


def _compile() -> _Run:
    options: dict[str, Any] = {"deterministic": True} if hasattr(torch._inductor.config, "deterministic") else {}
    run: _Run = torch.compile(_run_block, backend=_BACKEND, dynamic=False, options=options or None)
    return run


def _run_block(block: nn.Module, norms: tuple[norm.BatchNorm, ...], x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The block's result, and in training the statistics of each of its norms."""
    for layer in norms:
        layer.pending = []
    y: Tensor = type(block).forward(block, x)
    statistics = [part for layer in norms for part in layer.pending]
    for layer in norms:
        layer.pending = []
    return y, statistics


def _replace_forward(block: nn.Module, run: _Run) -> None:
    norms = tuple(norm.find_norms([block]))

    @functools.wraps(type(block).forward)
    def forward(x: Tensor) -> Tensor:
        before = [layer.pending for layer in norms]
        y, statistics = run(block, norms, x)
        added = [[part] for part in statistics] or [[] for _ in norms]  # none in evaluation mode
        for layer, old, new in zip(norms, before, added, strict=True):
            layer.pending = [*old, *new]
        return y

    block.forward = forward


def _measure_difference(world: World) -> float:
    """The largest difference of output, statistics and gradients of a small block, relative to the largest of each."""
    generator = torch.Generator().manual_seed(0)
    plain: nn.Module = BasicBlock(8, 8, norm_layer=lambda c: norm.BatchNorm(c, group=4, world=world))
    for parameter in plain.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    plain = plain.to(world.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.randn(4, 8, 6, 6, generator=generator).to(world.device, memory_format=torch.channels_last)
    block = copy.deepcopy(plain)
    _replace_forward(block, _compile())
    results = []
    for network in (block, plain):
        leaf = x.clone().requires_grad_()
        y = network(leaf)
        y.square().sum().backward()
        statistics = [part for layer in norm.find_norms([network]) for part in layer.pending]
        results.append([y.detach(), *statistics, leaf.grad, *(p.grad for p in network.parameters())])
    pairs = list(zip(*results, strict=True))
    return max(float((ours - theirs).abs().max() / theirs.abs().max()) for ours, theirs in pairs)
