"""Which numbers of processes a recipe can run on."""

from __future__ import annotations

from hpcssl.errors import WorldError
from hpcssl.nets import norm
from hpcssl.train.recipe import Recipe

_SHOWN = 6


def check(recipe: Recipe, size: int) -> None:
    """Raise ``WorldError``, with the numbers of processes that work, where ``size`` does not."""
    why = why_not(recipe, size)
    if why is None:
        return
    fitting = [n for n in range(1, recipe.optim.batch + 1) if why_not(recipe, n) is None]
    near = sorted(sorted(fitting, key=lambda n: abs(n - size))[:_SHOWN])
    expected = "a number of processes such as " + ", ".join(map(str, near)) if near else \
        "a recipe that some number of processes can run"
    mend = "start another number of processes, or change optim.batch" if near else \
        "change optim.batch, machine.accumulate or mix.pairing"
    micro = recipe.optim.batch // recipe.machine.accumulate
    if recipe.model.norm == "ghost" and micro % size == 0:
        groups = [g for g in range(2, micro + 1) if norm.why_not(g, global_batch=micro, world_size=size) is None]
        mend += f", or set model.norm_group to one of {', '.join(map(str, groups))}"
    raise WorldError(f"{size} processes", got=why, expected=expected, mend=mend)


def why_not(recipe: Recipe, size: int) -> str | None:
    """Why ``size`` processes cannot run this recipe, or None."""
    batch, accumulate = recipe.optim.batch, recipe.machine.accumulate
    if batch % (accumulate * size):
        cut = f" in {accumulate} micro-batches" if accumulate > 1 else ""
        return f"a global batch of {batch}{cut}, which does not divide evenly over them"
    micro = batch // accumulate
    if recipe.mix.kind != "none" and recipe.mix.pairing == "neighbours" and micro // size % 2:
        return f"{micro // size} images of a process at a time, of which neighbours cannot all be mixed in pairs"
    group = norm.group_size(recipe.model.norm, global_batch=micro, world_size=size, ghost=recipe.model.norm_group)
    return norm.why_not(group, global_batch=micro, world_size=size)
