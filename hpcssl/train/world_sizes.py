"""Checks that a recipe can run on a number of processes."""

from __future__ import annotations

from hpcssl.errors import ConfigError, WorldError
from hpcssl.nets import norm
from hpcssl.train.recipe import Recipe

_MAX_SUGGESTIONS = 6


def check(recipe: Recipe, size: int, *, needs_whole_batch: bool = False) -> None:
    """Check that ``size`` processes can run this recipe.

    Args:
        recipe: The recipe.
        size: Number of processes.
        needs_whole_batch: Whether the recipe's method forbids to cut a batch into micro-batches.

    Raises:
        ConfigError: The batch must not be cut into micro-batches, on any number of processes.
        WorldError: The number of processes does not work; the message lists numbers that do.
    """
    check_micro_batches(recipe, needs_whole_batch)
    reason = explain_unfit(recipe, size)
    if reason is None:
        return
    fitting = [n for n in range(1, recipe.optim.batch + 1) if explain_unfit(recipe, n) is None]
    nearest = sorted(sorted(fitting, key=lambda n: abs(n - size))[:_MAX_SUGGESTIONS])
    if nearest:
        expected = "a number of processes such as " + ", ".join(map(str, nearest))
        fix = "start another number of processes, or change optim.batch"
    else:
        expected = "a recipe that some number of processes can run"
        fix = "change optim.batch, machine.accumulation_steps or mix.pairing"
    micro_batch = recipe.optim.batch // recipe.machine.accumulation_steps
    if recipe.model.norm == "ghost" and micro_batch % size == 0:
        groups = [
            group
            for group in range(2, micro_batch + 1)
            if norm.explain_invalid_group(group, global_batch=micro_batch, world_size=size) is None
        ]
        fix += f", or set model.norm_group_size to one of {', '.join(map(str, groups))}"
    raise WorldError(f"{size} processes", got=reason, expected=expected, fix=fix)


def check_micro_batches(recipe: Recipe, needs_whole_batch: bool) -> None:
    """Check that the batch may be cut into the recipe's number of micro-batches, on any number of processes.

    Args:
        recipe: The recipe.
        needs_whole_batch: Whether the recipe's method forbids it.

    Raises:
        ConfigError: It may not.
    """
    steps = recipe.machine.accumulation_steps
    mixes_far_rows = recipe.mix.kind != "none" and recipe.mix.pairing != "adjacent"
    if steps > 1 and (needs_whole_batch or mixes_far_rows):
        cause = f"mix.pairing={recipe.mix.pairing}" if mixes_far_rows else f"method {recipe.method.name}"
        raise ConfigError(
            "machine.accumulation_steps",
            got=f"{steps} with {cause}",
            expected="1, since the loss of an image depends on other images of its batch",
            fix="set machine.accumulation_steps=1 and use more processes",
        )


def explain_unfit(recipe: Recipe, size: int) -> str | None:
    """Return why ``size`` processes cannot run this recipe, or None if they can."""
    batch, steps = recipe.optim.batch, recipe.machine.accumulation_steps
    if batch % (steps * size):
        cut = f" in {steps} micro-batches" if steps > 1 else ""
        return f"a global batch of {batch}{cut}, which does not divide evenly over them"
    micro_batch = batch // steps
    if recipe.mix.kind != "none" and recipe.mix.pairing == "adjacent" and micro_batch // size % 2:
        return f"{micro_batch // size} images per process at a time, which cannot all be mixed in adjacent pairs"
    group = norm.resolve_group_size(
        recipe.model.norm, global_batch=micro_batch, world_size=size, ghost=recipe.model.norm_group_size
    )
    return norm.explain_invalid_group(group, global_batch=micro_batch, world_size=size)
