"""Everything that a training step reads and changes, and its way into a checkpoint and back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hpcssl import config, rng
from hpcssl.checkpoint.manager import CheckpointState
from hpcssl.checkpoint.reader import SavedCheckpoint
from hpcssl.checkpoint.shard import TensorShard
from hpcssl.checkpoint.shared_reads import read_shared, row_reader
from hpcssl.data.batch import Batch
from hpcssl.distributed.batch_layout import BatchLayout
from hpcssl.distributed.devices import copy_images, to_device
from hpcssl.distributed.world import World
from hpcssl.errors import ResumeError
from hpcssl.memory.bank import Bank
from hpcssl.memory.checkpointed import CheckpointedMemory
from hpcssl.methods.base import MemoryContext, StateHooks, StepContext
from hpcssl.nets import norm
from hpcssl.optim import build, schedule
from hpcssl.optim.masked import are_finite
from hpcssl.train import builders, world_sizes
from hpcssl.train.recipe import Recipe, recipe_mismatch_error
from hpcssl.train.support_set import SupportLoader
from hpcssl.views.augment import ViewSpec, augment_batch
from hpcssl.views.kernels.selection import use_fast_views

_PREDICTOR_PREFIXES = ("predictor.", "second.predictor.")


class TrainState:
    """The networks, optimizer, memory bank and method of a run, after ``step`` finished steps.

    Args:
        recipe: The recipe of the run.
        world: The processes that train together.
        steps_per_epoch: Steps per epoch; with the recipe it gives the length of the run.
        labels: Class of each image of the data set, int64 [images], -1 where unknown. Methods with labels learn from
            them; for others they serve diagnostics.
        data_digest: Digest of the training shards.
        support: Loads the random images of a bank that is refilled at every step; required for methods with one.
        fill_bank: Whether to draw the bank's random rows at once, which ``load`` would overwrite.

    Attributes:
        step: Number of finished steps.
        epoch_length: Steps per epoch that the schedule counts with, which may be a fraction.
        last_step: Number of steps of the whole run.
        science: The values that the run's result depends on.
        method: The self-supervised method.
        plan: Its views, with small crops and mixed views.
        pair: Online and target encoder.
        bank: The memory bank, or None.
        memories: What the method keeps besides the bank, by name.
        late_verdicts: Whether the host reads one step late whether a step is taken; see ``verdict``.
        skipped_in_a_row: Number of steps in a row that were skipped because of values that are not finite.
        rollbacks: For each rollback so far, the step of the checkpoint and the step from which the run went on.
        parent_fingerprint: Of the run that this one is a branch of (``start.branch``), whose checkpoint it may load.

    Raises:
        ConfigError: Keys of the recipe do not fit each other or the method.
        WorldError: The recipe cannot run on this number of processes.
    """

    def __init__(
        self,
        recipe: Recipe,
        world: World,
        *,
        steps_per_epoch: int,
        labels: npt.NDArray[np.int64],
        data_digest: str,
        support: SupportLoader | None = None,
        fill_bank: bool = True,
    ):
        self.recipe, self.world, self.support = recipe, world, support
        self.has_labels = bool((labels >= 0).any())
        self.science = recipe.science(data_digest, world.size)
        self.method = builders.build_method(recipe)
        self.hooks = StateHooks.of(self.method)
        self.plan = builders.build_view_plan(recipe, self.method)
        world_sizes.check(recipe, world.size, needs_whole_batch=self.method.needs_whole_batch)
        self.layout = BatchLayout(recipe.optim.batch, recipe.machine.accumulation_steps)
        self.steps_per_epoch, self.step = steps_per_epoch, 0
        self.epoch_length = schedule.epoch_length(
            recipe.schedule, steps_per_epoch, images=len(labels), batch=recipe.optim.batch
        )
        self.last_step = schedule.total_steps(recipe.schedule, self.epoch_length)
        self.dtype = builders.state_dtype(recipe)
        self.fast_views = use_fast_views(recipe.machine.kernels, world)
        self.image_dtype = builders.image_dtype(recipe, self.plan, self.fast_views)
        group_size = self.science["model"]["norm_group_size"]
        self.pair = builders.build_encoders(recipe, self.method, self.plan, world, self.layout, group_size)
        self.norms = norm.find_norms(n for n in (self.pair.online, self.pair.target) if n is not None)
        self.is_compiled = builders.compile_encoders(recipe, self.pair, world, group_size)
        for layer in self.norms:
            layer.micro_batches = recipe.machine.accumulation_steps
        self.optimizer = build.build_optimizer(
            recipe.optim,
            self.pair.online.named_parameters(),
            global_batch=recipe.optim.batch,
            constant_lr=_PREDICTOR_PREFIXES if self.method.heads.constant_lr else (),
            fused=recipe.machine.fused,
        )
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=recipe.optim.precision == "fp16")
        self.bank = builders.build_bank(recipe, self.method.bank, world, self.layout, fill=fill_bank)
        width, placement = recipe.model.projector.out, recipe.bank.placement
        self.memories: dict[str, CheckpointedMemory] = self.hooks.build_memories(
            MemoryContext(labels, recipe.seed, width, self.dtype, placement, world, self.layout)
        )
        is_refilled = self.method.bank is not None and self.method.bank.push == "refill"
        can_be_late = self.hooks.heeds_taken and not self.scaler.is_enabled() and not is_refilled
        self.late_verdicts = world.device.type == "cuda" and can_be_late
        self.skipped_in_a_row = 0
        self.rollbacks: list[tuple[int, int]] = []
        self.parent_fingerprint: str | None = None

    def set_rates(self) -> tuple[float, float]:
        """Set the learning rate of the next update.

        Returns:
            The rate as the optimizer applies it, and the momentum of the target encoder (0 without one).
        """
        optim = self.recipe.optim
        lr = schedule.learning_rate(self.recipe.schedule, self.step, peak=optim.lr, steps_per_epoch=self.epoch_length)
        build.set_lr(self.optimizer, optim, lr, global_batch=optim.batch)
        momentum = 0.0
        if self.method.target_encoder == "ema":
            momentum = schedule.target_momentum(self.recipe.method.ema, self.step, total=self.last_step)
        return lr * build.batch_factor(optim, optim.batch), momentum

    @property
    def view_specs(self) -> list[ViewSpec]:
        """The views that the loader cuts from each image, in the order of the plan."""
        return [builders.view_spec(number, view) for number, view in enumerate(self.plan.views)]

    def second_modality(self, views: Iterable[int]) -> list[bool]:
        """Return, for each of these views of the plan, whether it shows the second modality.

        Args:
            views: Numbers of views; those of mixed views follow the others.
        """
        return [self.plan.views[self.plan.sources[v]].second for v in views]

    def images(self, batch: Batch, views: Sequence[int] | None = None) -> list[Tensor]:
        """Augment and normalize the views of a batch, on the device.

        Args:
            batch: This rank's rows.
            views: Numbers of the views in the plan that the batch holds; by default all, in order.

        Returns:
            One tensor [b, 3, S, S] per view.
        """
        options = self.recipe.views
        plan = self.plan.views if views is None else [self.plan.views[number] for number in views]
        images = copy_images(batch.images, self.world.device)
        settings: dict[str, Any] = {"dtype": self.image_dtype, "fast": self.fast_views}
        return [
            augment_batch(image, params, view.augmentation, mean=options.mean, std=options.std, **settings)
            for image, params, view in zip(images, batch.params, plan, strict=True)
        ]

    def context(self, batch: Batch) -> StepContext:
        """Build what the method may use in the step of this batch."""
        device = self.world.device
        return StepContext(
            step=batch.step,
            steps_per_epoch=self.steps_per_epoch,
            seed=self.recipe.seed,
            world=self.world,
            layout=self.layout,
            bank=cast(Bank, self.bank),  # methods without a bank do not use it
            memories=self.memories,
            has_labels=self.has_labels,
            index_B=to_device(batch.index, device),
            label_B=to_device(batch.label, device),
            rows_B=torch.arange(len(batch.index), device=device),
            predict=self.pair.predict,
        )

    def shuffle_orders(self, step: int) -> list[Tensor] | None:
        """Draw a permutation of the global batch for each target view, int64 [W·b], for shuffling BN.

        None where ``model.shuffle_bn`` is false.
        """
        if not self.recipe.model.shuffle_bn:
            return None
        keys = [rng.key(self.recipe.seed, "shuffle", step, view) for view in self.plan.targets]
        return [to_device(rng.permutation(key, self.recipe.optim.batch), self.world.device) for key in keys]

    def gradients_are_finite(self) -> Tensor:
        """Return whether every gradient is finite, bool []. Gradients are averaged, and so equal on all ranks."""
        return are_finite([p.grad for p in self.pair.online.parameters() if p.grad is not None])

    def state(self) -> CheckpointState:
        """Return the whole state at this step. Its tensors are not copied."""
        tensors = {f"pair.{name}": TensorShard(tensor) for name, tensor in self.pair.state_dict().items()}
        tensors |= {
            f"optim.{name}": TensorShard(tensor) for name, tensor in build.momentum_tensors(self.optimizer).items()
        }
        numbers: dict[str, Any] = {"skipped_in_a_row": self.skipped_in_a_row, "rolled_back": self.rollbacks}
        if self.scaler.is_enabled():
            numbers["scaler"] = self.scaler.state_dict()
        for memory, part in self._named_memories():
            shards, numbers[memory] = part.state()
            tensors |= {f"{memory}.{name}": shard for name, shard in shards.items()}
        fingerprint = config.fingerprint(self.science)
        return CheckpointState(self.step, tensors, numbers, fingerprint, self.science, self._machinery())

    def replicas(self, state: CheckpointState) -> dict[str, Tensor]:
        """Return all tensors that every rank holds with equal bits, by name.

        Args:
            state: What ``state`` returned at this step. Tensors that only it splits are added whole.
        """
        tensors = {name: shard.tensor for name, shard in state.tensors.items() if shard.is_replicated}
        for memory, part in self._named_memories():
            tensors |= {f"{memory}.{name}": tensor for name, tensor in part.replicas().items()}
        return tensors

    def _named_memories(self) -> list[tuple[str, CheckpointedMemory]]:
        return ([("bank", self.bank)] if self.bank is not None else []) + sorted(self.memories.items())

    def _machinery(self) -> dict[str, Any]:
        """Return what may change the rounding of results: software, hardware and how they are used."""
        machine, gpu = self.recipe.machine, self.world.device.type == "cuda"
        return {
            "threads": torch.get_num_threads(),
            "cpu": torch.backends.cpu.get_cpu_capability(),
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name() if gpu else "cpu",
            "cuda": torch.version.cuda if gpu else None,
            "cudnn": torch.backends.cudnn.version() if gpu else None,  # type: ignore[no-untyped-call]
            "world": self.world.size,
            "deterministic": machine.deterministic if gpu else None,
            "fast_norms": any(layer.fast for layer in self.norms) if gpu else None,
            "fast_views": self.fast_views if gpu else None,
            "fused": machine.fused if machine.fused != "torch" else None,
            "compiled": self.is_compiled or None,
            "channels_last": machine.channels_last,
            "accumulation_steps": machine.accumulation_steps,
        }

    def load(self, saved: SavedCheckpoint) -> list[str]:
        """Restore a checkpoint. A collective.

        Returns:
            What differs from the attempt that wrote it and may change the rounding from here on, in words.

        Raises:
            ResumeError: The checkpoint is of another recipe, or of other networks.
        """
        if saved.manifest["fingerprint"] not in (config.fingerprint(self.science), self.parent_fingerprint):
            raise recipe_mismatch_error(f"checkpoint {saved.folder}", self.science, saved.manifest["science"])
        own = self.pair.state_dict()
        _check_names(saved, {f"pair.{name}" for name in own})
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(read_shared(self.world, saved, f"pair.{name}"))
        momentum = [name for name in saved.names if name.startswith("optim.")]
        build.load_momentum(
            self.optimizer, {name.removeprefix("optim."): read_shared(self.world, saved, name) for name in momentum}
        )
        numbers = saved.manifest["numbers"]
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(numbers["scaler"])
        for memory, part in self._named_memories():
            part.load(numbers[memory], row_reader(self.world, saved, memory, part.replicas().keys()))
        self.skipped_in_a_row, self.step = numbers["skipped_in_a_row"], saved.step
        self.rollbacks = [(source, following) for source, following in numbers.get("rolled_back", [])]
        before, now = saved.manifest["machinery"], self._machinery()
        return [f"{key} {before.get(key)} → {now[key]}" for key in now if before.get(key) != now[key]]

    def roll_back(self, saved: SavedCheckpoint) -> None:
        """Restore everything but the step from a checkpoint: the batches since then are skipped."""
        step, rollbacks = self.step, self.rollbacks
        self.load(saved)
        self.step, self.rollbacks, self.skipped_in_a_row = step, [*rollbacks, (saved.step, step)], 0


def _check_names(saved: SavedCheckpoint, expected: set[str]) -> None:
    names = {name for name in saved.names if name.startswith("pair.")}
    if names != expected:
        raise ResumeError(
            f"checkpoint {saved.folder}",
            got=f"missing tensors {sorted(expected - names)[:3]}, unknown tensors {sorted(names - expected)[:3]}",
            expected="the tensors of this recipe's networks",
            fix="resume with the version of hpcssl that wrote it (RUN/code)",
        )
