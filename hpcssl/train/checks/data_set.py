"""Keys of a recipe whose valid values depend on its method, its data set or its number of processes.

They are checked before a run folder or a job exists. docs/reference/checks.md lists all dependencies.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hpcssl import config
from hpcssl.data.order import Order, SupportOrder
from hpcssl.data.shards import ShardSet
from hpcssl.errors import ConfigError
from hpcssl.methods.base import Method
from hpcssl.methods.cmsf.clusters import require_faiss
from hpcssl.methods.cmsf.options import LABELED_RULES
from hpcssl.methods.cmsf.supervised import require_labels
from hpcssl.nets import heads, resnet
from hpcssl.optim import groups, schedule
from hpcssl.train import world_sizes
from hpcssl.train.builders import build_method, build_view_plan, check_bank_size, check_model_options
from hpcssl.train.recipe import Recipe


def check_method(recipe: Recipe) -> Method:
    """Refuse keys of other sections that the recipe's method cannot use.

    Returns:
        The method.

    Raises:
        ConfigError: Naming the first such key.
    """
    method = build_method(recipe)
    plan = build_view_plan(recipe, method)
    check_model_options(recipe, method, any(view.second for view in plan.views))
    world_sizes.check_micro_batches(recipe, method.needs_whole_batch)
    if method.bank is not None and method.bank.push == "refill" and recipe.data.stage_limit_gb:
        raise ConfigError(
            "data.stage_limit_gb",
            got=f"{recipe.data.stage_limit_gb:g}, with a support set of random images of the whole data set",
            expected="room for the whole data set",
            fix="set data.stage_limit_gb=0",
        )
    width = recipe.model.projector.out
    if method.heads.predictor == "mlp" and recipe.model.predictor.out != width:
        raise ConfigError(
            "model.predictor.out",
            got=recipe.model.predictor.out,
            expected=f"the width of the projections that it predicts, model.projector.out={width}",
            fix=f"set model.predictor.out={width}",
        )
    if recipe.optim.not_excluded:
        _check_not_excluded(recipe, method)
    return method


def _check_not_excluded(recipe: Recipe, method: Method) -> None:
    """Look up the endings of ``optim.not_excluded`` among the names of parameters; no memory is allocated."""
    options = recipe.model
    with torch.device("meta"):
        backbone = resnet.build(recipe.arch)
        parts = {"backbone": backbone}
        parts["projector"] = heads.build(resnet.feature_width(backbone), options.projector, torch.nn.BatchNorm1d)
        if method.heads.predictor == "mlp":
            parts["predictor"] = heads.build(options.projector.out, options.predictor, torch.nn.BatchNorm1d)
        elif method.heads.predictor == "prototypes":
            parts["predictor"] = heads.Prototypes(options.projector.out, method.heads.prototypes)
        groups.group_parameters(
            torch.nn.ModuleDict(parts).named_parameters(),
            weight_decay=recipe.optim.weight_decay,
            exclude_norm_and_bias=recipe.optim.exclude_norm_and_bias,
            not_excluded=recipe.optim.not_excluded,
            constant_lr=(),
        )


def check_data_set(recipe: Recipe, shards: ShardSet, world_size: int | None) -> None:
    """Check a recipe against its training shards and its number of processes. ``check_method`` comes first.

    Args:
        recipe: The recipe.
        shards: Its opened training shards.
        world_size: Number of processes; None if it is not known yet.

    Raises:
        ConfigError: A value that does not fit the data set.
        DataError: The data set is smaller than a batch, or lacks the labels that the method needs.
        WorldError: This number of processes cannot run the recipe.
    """
    method = build_method(recipe)
    if world_size is not None:
        world_sizes.check(recipe, world_size, needs_whole_batch=method.needs_whole_batch)
    images, batch = len(shards), recipe.optim.batch
    order = Order(
        shards.samples_per_shard,
        seed=recipe.seed,
        global_batch=batch,
        window=recipe.data.window_shards,
        micro_batches=recipe.machine.accumulation_steps,
    )
    if method.bank is not None:  # after the batch, which the bank must hold
        check_bank_size(recipe, method.bank)
    if method.bank is not None and method.bank.push == "refill":
        SupportOrder(images, seed=recipe.seed, global_batch=batch, per_step=recipe.bank.size // batch)
    length = schedule.epoch_length(recipe.schedule, order.steps_per_epoch, images=images, batch=batch)
    _check_length(recipe, length, order.steps_per_epoch)
    _check_method_options(recipe, shards, order.steps_per_epoch, schedule.total_steps(recipe.schedule, length))


def training_labels(recipe: Recipe, shards: ShardSet) -> npt.NDArray[np.int64]:
    """The labels of all images, int64 [images], for methods and diagnostics; -1 for images without one.

    Of a paged set they are read only for methods that learn from them: each page would be downloaded. Others train as
    on images without labels, which changes no weights.
    """
    rule, neighbors = _rules(recipe)
    if shards.pages is not None and rule not in LABELED_RULES and neighbors != "oracle":
        return np.broadcast_to(np.int64(-1), len(shards))
    return shards.labels


def _rules(recipe: Recipe) -> tuple[str, str]:
    """The rule of CMSF, and that of NNCLR's neighbors; empty for other methods."""
    method: Any = recipe.method
    rule = method.rule if method.name == "cmsf" else ""
    return rule, method.neighbors.rule if method.name in ("nnclr", "nnsiam") else ""


def describe_large_bank(recipe: Recipe, images: int) -> str:
    """Say what a memory bank with more rows than the data set has images means; empty if nothing.

    This is no error: published results use such banks on small data sets, and earlier embeddings of the same image are
    a small part of the negatives, or of the neighbors, of a well-trained encoder. The queue of SwAV takes no harm: it
    only evens out the assignment of a batch.

    Args:
        recipe: The recipe.
        images: Number of training images.
    """
    method = build_method(recipe)
    if method.bank is None or method.bank.push == "refill" or recipe.method.name == "swav":
        return ""
    size, batch = recipe.bank.size, recipe.optim.batch
    role = "negatives" if recipe.method.name == "moco" else "neighbors"
    if size <= images:
        return ""
    return (
        f"bank.size={size} is more than the {images} images: earlier embeddings of an image are among its own {role}. "
        f"bank.size={images // batch * batch} avoids that."
    )


def count_steps(recipe: Recipe, images: int) -> int:
    """Return the number of steps of a whole run on a data set of this many images."""
    batch = recipe.optim.batch
    length = schedule.epoch_length(recipe.schedule, images // batch, images=images, batch=batch)
    return schedule.total_steps(recipe.schedule, length)


def _check_length(recipe: Recipe, epoch_length: int | Fraction, steps_per_epoch: int) -> None:
    """Compare the length of the run with the keys that count epochs."""
    total, options = schedule.total_steps(recipe.schedule, epoch_length), recipe.schedule
    if options.milestones and options.milestones[-1] * epoch_length >= total:
        raise ConfigError(
            "schedule.milestones",
            got=list(options.milestones),
            expected=f"epochs before the end of the run, {float(total / epoch_length):g}",
            fix="remove the last ones, or lengthen the run",
        )
    every = int(recipe.evals.get("knn_every_epochs") or 0)
    if every * steps_per_epoch > total and not options.fractional_epochs:
        raise ConfigError(
            "evals.knn_every_epochs",
            got=f"{every}, in a run of {total / steps_per_epoch:g} epochs",
            expected="at most the length of the run",
            fix=f"set evals.knn_every_epochs={total // steps_per_epoch}",
        )


def _check_method_options(recipe: Recipe, shards: ShardSet, steps_per_epoch: int, total: int) -> None:
    """Compare the method's options with the number of images, their labels, and the number of steps."""
    method: Any = recipe.method
    rule, neighbors = _rules(recipe)
    if rule in LABELED_RULES:
        require_labels(shards.labels, "write shards from folders named by class, or choose another method.rule")
    if neighbors == "oracle":
        fix = "write shards from folders named by class, or set method.neighbors.rule=nearest"
        require_labels(shards.labels, fix)
    if rule == "kmeans":
        require_faiss("method.rule=kmeans")
    wrong: list[tuple[str, bool, str, str]] = []
    if rule == "kmeans":
        images = len(shards)
        wrong.append(("num_clusters", method.num_clusters >= images, f"fewer than the {images} images", "0"))
    if rule == "semi_supervised":
        fits, expected = method.pseudo_labels.fits_per_epoch, f"at most the {steps_per_epoch} steps of an epoch"
        wrong.append(("pseudo_labels.fits_per_epoch", fits > steps_per_epoch, expected, str(steps_per_epoch)))
    if method.name == "swav":
        expected = f"fewer than the {total} steps of the run"
        wrong.append(("freeze_steps", method.freeze_steps >= total, expected, "0"))
    for name, is_wrong, expected, value in wrong:
        if is_wrong:
            raise ConfigError(
                f"method.{name}", got=config.lookup(method, name), expected=expected, fix=f"set method.{name}={value}"
            )
    if method.name == "swav" and method.queue:
        _check_queue(recipe, steps_per_epoch, total)


def _check_queue(recipe: Recipe, steps_per_epoch: int, total: int) -> None:
    """SwAV's queue is used once it was filled, from ``queue_start_epoch`` on."""
    fill = -(-recipe.bank.size // recipe.optim.batch)
    latest = (total - 1 - fill) // steps_per_epoch
    if recipe.method.queue_start_epoch > latest:
        fix = f"set method.queue_start_epoch={latest}" if latest >= 0 else "lower bank.size, or lengthen the run"
        raise ConfigError(
            "method.queue_start_epoch",
            got=f"{recipe.method.queue_start_epoch}, in a run of {total} steps whose queue fills in {fill}",
            expected="a queue that is used before the run ends",
            fix=fix,
        )
