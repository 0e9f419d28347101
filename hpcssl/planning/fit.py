"""Choose the values of a recipe that depend on the data and the machine, each with its reason.

Everything else comes from a packaged recipe of the same method. Powers of two are used for batch, bank and norm groups,
so that they divide each other and the usual numbers of processes.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from hpcssl import config
from hpcssl.errors import ConfigError, DataError, format_bytes
from hpcssl.planning.data_summary import DataSummary
from hpcssl.planning.machine import Machine, fit_machine
from hpcssl.planning.methods import MethodChoice
from hpcssl.planning.recipe_text import Value
from hpcssl.train import gpu_memory
from hpcssl.train import recipe as recipes
from hpcssl.train.builders import build_method
from hpcssl.train.recipe import Recipe

FEWEST_IMAGES = 16
"""Images below which no recipe is written: four steps of a batch of 4."""
SMALL_SIDE = 64
"""Pixels of the smaller side below which images are small: the network then starts without halving them twice."""
LARGEST_VIEW = {"cpu": 64, "gpu": 224}
"""Largest side of views in pixels. A view of 224 has twelve times the pixels of one of 64."""
MANY_IMAGES = 100_000
"""Images from which on a ResNet-50 takes the place of the ResNet-18, on GPUs."""
EPOCHS, MOST_EPOCHS = 200, 1000
"""Epochs without ``--hours``, as the packaged recipes have them, and the most that ``--hours`` gives: the longest
training that the papers report."""
TRAINING_SHARE = 0.9
"""Share of ``--hours`` for the steps; the rest is for evaluations, checkpoints and the start."""
_MEMORY_SHARE = 0.8  # of the GPU memory that the estimate may fill: workspaces of cuDNN are not part of it


@dataclass(frozen=True)
class Fit:
    """A recipe that fits.

    Attributes:
        base: The packaged recipe that it is based on.
        values: The values that differ from it, without the length.
        batch: Images per step, over all processes.
        steps_per_epoch: Steps per epoch.
        scores: Whether k-NN runs during the training.
        warmup: Warm-up of the base, as a share of its length.
    """

    base: Recipe
    values: list[Value]
    batch: int
    steps_per_epoch: int
    scores: bool
    warmup: float

    def with_length(self, epochs: int, reason: str) -> list[Value]:
        """Return all values, for a training of this number of epochs; ``reason`` says why it is that number."""
        steps = epochs * self.steps_per_epoch
        reason = f"{steps:,} steps; {reason}"
        values = [_shorten_freeze(value, steps) if value.key == "method" else value for value in self.values]
        schedule = [Value("schedule.epochs", epochs, reason), Value("schedule.interval", "step")]
        if self.warmup:
            schedule.append(
                Value("schedule.warmup_epochs", round(epochs * self.warmup, 3), f"{self.warmup:.0%} of them")
            )
        every = 0
        if self.scores:
            every = min(epochs, max(5, epochs // 10))
        why = "k-NN accuracy on data.val, by the labels" if every else "k-NN needs labels and data.val"
        return [*values, *schedule, Value("evals.knn_every_epochs", every, why)]


def _shorten_freeze(method: Value, steps: int) -> Value:
    """Prototypes that are frozen must be trained for one step at least."""
    freeze = method.value.get("freeze_steps", 0)
    if freeze < steps:
        return method
    return dataclasses.replace(method, value=method.value | {"freeze_steps": steps - 1})


def fit_recipe(data: DataSummary, choice: MethodChoice, machine: Machine) -> Fit:
    """Choose everything but the length.

    Args:
        data: The data.
        choice: The method.
        machine: Where it will run.

    Raises:
        DataError: There are too few images.
        ConfigError: There are too few images for this number of GPUs, or too little memory.
    """
    if data.images < FEWEST_IMAGES:
        raise DataError(
            f"shard folder {data.train.root}",
            got=f"{data.images} images",
            expected=f"{FEWEST_IMAGES} or more to train on",
            fix="write shards of more images",
        )
    small = data.side < SMALL_SIDE
    base = recipes.compose(choice.small if small else choice.photos)
    changes: list[Value] = [*_fit_views(data, base, machine, small), *_fit_network(data, machine, small)]
    method = {} if small else dict(choice.photos_method)
    if choice.mix:
        changes.append(Value("mix", choice.mix, "the query is a CutMix of two images"))
    # what the other values depend on, as one recipe
    draft = _compose(base, [*changes, *([Value("method", method)] if method else [])])
    batch = _fit_batch(data, draft, machine)
    steps_per_epoch = data.images // batch.value
    bank = _fit_bank(data, draft, batch.value)
    method |= _fit_method(data, draft, batch.value, bank.value if bank else 0, steps_per_epoch)
    values = [
        *_fit_data(data),
        *changes,
        *_fit_norm(draft, batch.value, machine),
        *([Value("method", method, _explain_method(method, bank))] if method else []),
        *([bank] if bank else []),
        batch,
        *_fit_optim(draft, batch.value, machine),
        *_fit_evals(data),
        *fit_machine(machine),
    ]
    schedule = draft.schedule
    warmup = schedule.warmup_epochs / schedule.epochs if schedule.epochs else 0.0
    return Fit(base, values, batch.value, steps_per_epoch, data.has_scores, warmup)


def _compose(base: Recipe, values: list[Value]) -> Recipe:
    """The base with values in place of its own."""
    layers = config.as_dict(base)
    for value in values:
        if value.key == "method":
            layers["method"] = value.value
            continue
        layers = config.merge(layers, config.nest(value.key, value.value))
    return recipes.from_values(layers, f"recipe {base.name}")


def _power_of_two(limit: float) -> int:
    """The largest power of two up to a limit of 1 or more."""
    return 1 << (int(limit).bit_length() - 1)


def _fit_data(data: DataSummary) -> list[Value]:
    labels = f"{data.labeled:,} with a label" if data.labeled else "without labels"
    values = [Value("data.train", str(data.train.root), f"{data.images:,} images, {labels}")]
    if data.val is not None:
        values.append(Value("data.val", str(data.val.root), f"{len(data.val):,} images"))
    return values


def _fit_views(data: DataSummary, base: Recipe, machine: Machine, small: bool) -> list[Value]:
    probed = f"the smaller side of {data.probed} images has a median of {data.side} pixels"
    if small:
        size = max(16, data.side // 4 * 4)
    else:
        size = min(LARGEST_VIEW[machine.kind], max(64, int(data.side * 0.875) // 32 * 32))
        if size == LARGEST_VIEW[machine.kind]:
            probed += f"; at most {size} on a {machine.kind.upper()}"
    values = [Value("views.size", size, probed)]
    if base.views.crops.count:
        crop = max(8, size * base.views.crops.size // base.views.size)
        values.append(Value("views.crops", {"size": crop}, f"{base.views.crops.count} small crops"))
    return values


def _fit_network(data: DataSummary, machine: Machine, small: bool) -> list[Value]:
    if machine.gpus and not small and data.images >= MANY_IMAGES:
        return [Value("model.arch", "resnet50", f"from {MANY_IMAGES:,} images on, instead of resnet18")]
    return []


def _fit_batch(data: DataSummary, draft: Recipe, machine: Machine) -> Value:
    """A quarter of the images at most, and what fits into the memory of a GPU."""
    own, processes = draft.optim.batch, machine.processes
    most = min(own, data.images // 4)
    per_process = most // processes
    if per_process < 2:
        raise ConfigError(
            "--gpus",
            got=f"{processes} for {data.images} images, of which a step takes {most} at most",
            expected="at least 2 images per GPU and step",
            fix=f"set --gpus {most // 2} or less",
        )
    per_process = _power_of_two(per_process)
    batch = per_process * processes
    reason = f"as {draft.name}" if batch == own else f"{data.images // batch} steps per epoch; {draft.name} has {own}"
    if not (machine.gpus and machine.gpu_bytes):
        return Value("optim.batch", batch, reason)

    def needed(batch: int) -> int:
        optim = dataclasses.replace(draft.optim, batch=batch)
        return gpu_memory.estimate(dataclasses.replace(draft, optim=optim), processes).total

    while needed(batch) > machine.gpu_bytes * _MEMORY_SHARE:
        if per_process == 2:
            raise ConfigError(
                "the memory of this GPU",
                got=f"{format_bytes(machine.gpu_bytes)} for about {format_bytes(needed(batch))} with 2 images per GPU",
                expected="enough for 2 images per GPU",
                fix="choose another --method, or a larger GPU",
            )
        per_process //= 2
        batch = per_process * processes
        reason = f"for {format_bytes(machine.gpu_bytes)} of GPU memory; {draft.name} has {own}"
    reason += f"; about {format_bytes(needed(batch))} per GPU"
    return Value("optim.batch", batch, reason)


def _fit_bank(data: DataSummary, draft: Recipe, batch: int) -> Value | None:
    """At most half of the images, so that the bank forgets an image before it comes again."""
    if build_method(draft).bank is None:
        return None
    own = draft.bank.size
    size = max(own, min(131_072, _power_of_two(data.images / 10)))
    size = max(min(size, _power_of_two(data.images / 2)), batch)
    reason = f"rows, of {data.images:,} images"
    if size != own:
        reason += f"; {draft.name} has {own:,}"
    return Value("bank.size", size, reason)


def _fit_method(data: DataSummary, draft: Recipe, batch: int, bank: int, steps_per_epoch: int) -> dict[str, Any]:
    """The options of the method that depend on the numbers of images and of bank rows."""
    options, method = draft.method, {}
    if hasattr(options, "k") and bank:
        k = min(options.k, max(2, bank // 64))
        method["k"] = k
        if getattr(options, "rule", "") in ("two_queues", "cross_modal"):
            method["k_constraint"] = max(k, min(options.k_constraint, max(2, bank // 64)))
    if hasattr(options, "prototypes"):
        method |= {"prototypes": min(options.prototypes, max(2, batch)), "freeze_steps": steps_per_epoch}
    return method


def _explain_method(method: dict[str, Any], bank: Value | None) -> str:
    if "prototypes" in method:
        return "no more prototypes than images per step; they are frozen at first"
    if "k" in method and bank is not None:
        return f"the {method['k']} nearest of {bank.value:,} rows"
    return ""


def _fit_norm(draft: Recipe, batch: int, machine: Machine) -> list[Value]:
    if draft.model.norm != "ghost":
        return []
    per_process = batch // machine.processes
    group = min(draft.model.norm_group_size, per_process, max(16, batch // 2))
    return [Value("model.norm_group_size", group, f"images per norm group, {batch // group} groups per step")]


def _fit_optim(draft: Recipe, batch: int, machine: Machine) -> list[Value]:
    optim, values = draft.optim, []
    if optim.lr_scaling == "none" and batch != optim.batch:
        lr = float(f"{optim.lr * batch / optim.batch:.4g}")
        values.append(Value("optim.lr", lr, f"{optim.lr:g} at a batch of {optim.batch}, in proportion"))
    if not machine.gpus:
        values.append(Value("optim.precision", "fp32", "bf16 is for GPUs"))
    return values


def _fit_evals(data: DataSummary) -> list[Value]:
    if not data.has_scores:
        return []
    # as the packaged recipes, where there are enough images to be neighbors
    weighted = [k for k in (20, 200) if k <= data.images // 2] or [min(5, data.images)]
    votes = [k for k in (1, 20) if k <= data.images // 2]
    return [Value("evals.knn", {"k": votes, "weighted_k": weighted, "temperature": 0.1})]
