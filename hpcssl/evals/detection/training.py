"""Training a detector: the same global batches on any number of ranks, and the same numbers after a kill.

Images, their sizes and flips, and the sampled anchors and regions are functions of the seed, the step and the image.
Every mean of a loss is taken over the samples of all ranks, so that W ranks compute the gradient that one rank would;
the norms see one batch.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from hpcssl.distributed.world import World
from hpcssl.errors import EvalError, HpcsslError
from hpcssl.evals.common import state
from hpcssl.evals.common.sync import StopCheck, as_eval_error, raise_on_any_rank
from hpcssl.evals.detection.data import DetectionExample
from hpcssl.evals.detection.norm import SyncNorm, accumulate_statistics
from hpcssl.terminal.progress import ProgressLog

_SAVE_PERIOD_S = 600.0
# Detectron2's defaults (config/defaults.py, SOLVER); norms have no weight decay
MOMENTUM, WEIGHT_DECAY, WARMUP_FACTOR, GAMMA = 0.9, 1e-4, 1e-3, 0.1


@dataclass(frozen=True, kw_only=True)
class DetectionSchedule:
    """Learning rate by iteration: a linear warm-up from a thousandth, then a tenth after each milestone.

    Attributes:
        iterations: Optimizer steps.
        lr: Peak learning rate.
        warmup: Iterations of the warm-up; 0 for none.
        milestones: Iterations after which the rate falls to a tenth.
        precise_bn: Forward passes after the last iteration that re-estimate the statistics of the norms.
    """

    iterations: int
    lr: float
    warmup: int
    milestones: list[int]
    precise_bn: int

    def learning_rate(self, step: int) -> float:
        """Learning rate of an iteration."""
        ramp = min(1.0, step / self.warmup) if self.warmup else 1.0
        decay: float = GAMMA ** sum(step >= m for m in self.milestones)
        return self.lr * (WARMUP_FACTOR * (1 - ramp) + ramp) * decay


class DetectionTrainer:
    """A detector, its SGD, and the number of iterations it has taken: everything that a resume needs.

    Args:
        model: The detector.
        world: The processes that train together.
    """

    def __init__(self, model: GeneralizedRCNN, world: World) -> None:
        self.model, self.world, self.step = model, world, 0
        self.ddp_model = world.wrap_in_ddp(model)
        norms = {p for module in model.modules() if isinstance(module, SyncNorm) for p in module.parameters()}
        self.optimizer = torch.optim.SGD(
            [
                {"params": [p for p in model.parameters() if p not in norms], "weight_decay": WEIGHT_DECAY},
                {"params": [p for p in model.parameters() if p in norms], "weight_decay": 0.0},
            ],
            lr=0.0,
            momentum=MOMENTUM,
        )

    def loss(self, examples: list[DetectionExample], step: int, network: nn.Module | None = None) -> Tensor:
        """Compute the scalar whose gradient, averaged over ranks, is that of the global batch's loss. A collective.

        torchvision takes means over this rank's samples; each is weighted by its share of the samples of all ranks.

        Args:
            examples: This rank's images.
            step: The iteration, which keys the sampling of anchors and regions.
            network: The network, by default the one wrapped in DDP.

        Raises:
            EvalError: On every rank, if the loss of one rank is not finite.
        """
        dtype = next(self.model.parameters()).dtype
        samplers = self.model.rpn.fg_bg_sampler, self.model.roi_heads.fg_bg_sampler
        for sampler in samplers:
            sampler.set_images(step, [example.index for example in examples])
        images = [example.image.to(self.world.device, non_blocking=True) for example in examples]
        targets = [
            {name: value.to(self.world.device) for name, value in example.target.items()}
            | {"boxes": example.target["boxes"].to(self.world.device, dtype)}
            for example in examples
        ]
        losses: dict[str, Tensor] = (network or self.ddp_model)(images, targets)
        anchors, regions = samplers
        nonfinite = not torch.stack(list(losses.values())).detach().isfinite().all()
        mine = [anchors.total, regions.total, regions.positives, float(nonfinite)]
        counts = torch.tensor(mine, dtype=torch.float64, device=self.world.device)
        *totals, nonfinite_ranks = self.world.all_reduce_sum(counts).tolist()
        if nonfinite_ranks:
            raise EvalError(
                "detection",
                got=f"a loss that is NaN or infinite at iteration {step}",
                expected="finite numbers",
                fix="lower evals.detect.lr, or raise evals.detect.warmup_iterations",
            )
        share = [mine[i] * self.world.size / max(1, totals[i]) for i in range(3)]
        mean_over = {
            "loss_objectness": 0,
            "loss_rpn_box_reg": 0,
            "loss_classifier": 1,
            "loss_box_reg": 1,
            "loss_mask": 2,
        }
        first, *others = (loss * share[mean_over[name]] for name, loss in losses.items())
        total: Tensor = sum(others, first)
        return total

    def train_step(self, examples: list[DetectionExample], lr: float) -> float:
        """Take one iteration. A collective.

        Args:
            examples: This rank's images.
            lr: Learning rate.

        Returns:
            This rank's loss.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        loss = self.loss(examples, self.step)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch
        self.optimizer.step()
        self.step += 1
        return float(loss.detach())

    def save(self, path: Path, identity: str) -> None:
        """Write the state file.

        Args:
            path: The file.
            identity: Identity of the evaluation; ``load`` reads the file of this one only.

        Raises:
            OSError: The file cannot be written.
        """
        moments = {
            f"momentum.{name}": self.optimizer.state[p]["momentum_buffer"]
            for name, p in self.model.named_parameters()
            if "momentum_buffer" in self.optimizer.state[p]
        }
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()} | moments
        state.write(path, identity, tensors, {"step": self.step})

    def load(self, path: Path, identity: str) -> bool:
        """Continue from the state file of an earlier attempt at this evaluation; False if there is none."""
        saved = state.read(path, identity)
        if saved is None:
            return False
        tensors, note = saved
        self.model.load_state_dict(
            {name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")}
        )
        for name, p in self.model.named_parameters():
            if f"momentum.{name}" in tensors:
                self.optimizer.state[p]["momentum_buffer"] = tensors[f"momentum.{name}"].to(p.device, p.dtype)
        self.step = note["step"]
        return True


def train_detector(
    trainer: DetectionTrainer,
    examples: Iterator[list[DetectionExample]],
    schedule: DetectionSchedule,
    *,
    stop: StopCheck,
    state_file: Path | None,
    identity: str,
) -> None:
    """Train from ``trainer.step`` to the end, and re-estimate the statistics of the norms. A collective.

    The training is saved every ten minutes, at its end, and on a request to stop.

    Args:
        trainer: The detector.
        examples: This rank's images of each iteration, beginning with ``trainer.step``.
        schedule: Iterations and learning rates.
        stop: Whether this process was asked to stop.
        state_file: File that keeps the training, or None.
        identity: Identity of the evaluation.

    Raises:
        EvalError: What one rank raised, on all ranks.
        Stopped: After a request to stop.
    """
    trainer.model.train()
    world, last = trainer.world, schedule.iterations
    saved, progress = time.monotonic(), ProgressLog("detect", last, "iterations", first=trainer.step)
    problem: HpcsslError | None = None
    for step in range(trainer.step, last + schedule.precise_bn):
        batch: list[DetectionExample] = []
        stopping = stop()
        try:
            batch = next(examples)
        except (HpcsslError, OSError) as caught:
            problem = as_eval_error(caught)
        if step < last and (stopping or time.monotonic() - saved > _SAVE_PERIOD_S):
            saved, problem = time.monotonic(), problem or _save(trainer, state_file, identity)
        trainer.model.transform.side = _padded_shape(world, batch, stopping or problem is not None)
        if trainer.model.transform.side is None:
            raise_on_any_rank(world, "detection", stop=stopping, error=problem)
        if step < last:
            loss = trainer.train_step(batch, schedule.learning_rate(step))
            if trainer.step == last:  # the re-estimated statistics are not saved: they are computed again
                problem = _save(trainer, state_file, identity)
            progress.update(step + 1, f"loss {loss:.3f}")
        else:
            accumulate_statistics(trainer.model, step - last)
            with torch.no_grad():
                trainer.loss(batch, step, trainer.model)
    raise_on_any_rank(world, "detection", error=problem)


def _save(trainer: DetectionTrainer, state_file: Path | None, identity: str) -> HpcsslError | None:
    """Save on rank 0; return the error, if any, which all ranks must raise together."""
    if trainer.world.is_main and state_file is not None:
        try:
            trainer.save(state_file, identity)
        except OSError as caught:
            return as_eval_error(caught)
    return None


def _padded_shape(world: World, batch: list[DetectionExample], halt: bool) -> tuple[int, int] | None:
    """Height and width that hold every image of all ranks' batches; None if some rank has to halt. A collective."""
    edges = [max((example.image.shape[axis] for example in batch), default=0) for axis in (1, 2)]
    sent = torch.tensor([*edges, int(halt)], dtype=torch.float32, device=world.device)
    height, width, halted = (int(value) for value in world.all_reduce_max(sent).result())
    return None if halted else (height, width)
