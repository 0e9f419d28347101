"""Training a detector: the same global batches on any number of ranks, and the same numbers after a kill.

Pictures, their sizes and flips, and the anchors and regions that are chosen have addresses; every mean of a loss is
taken over the world's choices, so that W ranks compute the gradient that one would; the norms see one batch.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from hpcssl import files
from hpcssl.errors import EvalError, HpcsslError
from hpcssl.evals.detect_data import Example
from hpcssl.evals.detect_norm import SyncNorm, averaging
from hpcssl.evals.together import Stop, agree, as_error
from hpcssl.nets import weights
from hpcssl.world import World

log = logging.getLogger("hpcssl")
_SAVED_EVERY, _SAID_EVERY = 600.0, 20.0  # seconds; neither changes a number
MOMENTUM, WEIGHT_DECAY, WARMUP_FROM, DROP = 0.9, 1e-4, 1e-3, 0.1
"""Detectron2's defaults (config/defaults.py, SOLVER); norms are not decayed."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Rates by iteration: linear warm-up from a thousandth, then a tenth after each of ``milestones``.

    ``precise``: forward passes after the last iteration that re-estimate the norms' statistics.
    """

    iterations: int
    lr: float
    warmup: int
    milestones: list[int]
    precise: int

    def lr_at(self, step: int) -> float:
        ramp = min(1.0, step / self.warmup) if self.warmup else 1.0
        return self.lr * (WARMUP_FROM * (1 - ramp) + ramp) * DROP ** sum(step >= m for m in self.milestones)


class Training:
    """A detector, its SGD, and how many iterations it has taken. Everything that a resume needs."""

    def __init__(self, model: GeneralizedRCNN, world: World):
        self.model, self.world, self.step = model, world, 0
        self.parallel = world.parallel(model)
        norms = {p for part in model.modules() if isinstance(part, SyncNorm) for p in part.parameters()}
        self.optimiser = torch.optim.SGD(
            [{"params": [p for p in model.parameters() if p not in norms], "weight_decay": WEIGHT_DECAY},
             {"params": [p for p in model.parameters() if p in norms], "weight_decay": 0.0}],
            lr=0.0, momentum=MOMENTUM)

    def loss(self, examples: list[Example], step: int, network: nn.Module | None = None) -> Tensor:
        """The scalar whose gradient, averaged over ranks, is that of the global batch's loss. A collective.

        torchvision takes means over this rank's choices; each is weighed by its share of the world's. ``step``: the
        address of the choices. Raises ``EvalError`` on every rank where it is not finite on one.
        """
        kind = next(self.model.parameters()).dtype
        samplers = self.model.rpn.fg_bg_sampler, self.model.roi_heads.fg_bg_sampler
        for sampler in samplers:
            sampler.at(step, [example.index for example in examples])
        images = [example.image.to(self.world.device, non_blocking=True) for example in examples]
        targets = [{name: value.to(self.world.device) for name, value in example.target.items()}
                   | {"boxes": example.target["boxes"].to(self.world.device, kind)} for example in examples]
        found = (network or self.parallel)(images, targets)
        anchors, regions = samplers
        poor = not torch.stack(list(found.values())).detach().isfinite().all()
        mine = [anchors.total, regions.total, regions.positives, float(poor)]
        *every, poor = self.world.sum(torch.tensor(mine, dtype=torch.float64, device=self.world.device)).tolist()
        if poor:
            raise EvalError("detection", got=f"a loss that is NaN or infinite at iteration {step}",
                            expected="finite numbers", mend="lower evals.detect.lr, or lengthen its warmup")
        share = [mine[i] * self.world.size / max(1, every[i]) for i in range(3)]
        of = {"loss_objectness": 0, "loss_rpn_box_reg": 0, "loss_classifier": 1, "loss_box_reg": 1, "loss_mask": 2}
        return sum(loss * share[of[name]] for name, loss in found.items())

    def learn(self, examples: list[Example], lr: float) -> float:
        """One iteration; this rank's loss."""
        for group in self.optimiser.param_groups:
            group["lr"] = lr
        loss = self.loss(examples, self.step)
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        self.step += 1
        return float(loss.detach())

    def save(self, path: Path, identity: str) -> None:
        moments = {f"momentum.{name}": self.optimiser.state[p]["momentum_buffer"]
                   for name, p in self.model.named_parameters() if "momentum_buffer" in self.optimiser.state[p]}
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()} | moments
        files.atomic_write(path, weights.pack(tensors, {"identity": identity, "step": str(self.step)}))

    def load(self, path: Path, identity: str) -> bool:
        """Take up the state of an earlier attempt at the same evaluation; False where there is none."""
        try:
            with safe_open(path, framework="pt") as file:
                meta = file.metadata()
                if meta.get("identity") != identity:
                    return False
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        except (OSError, SafetensorError):
            return False
        self.model.load_state_dict({name.removeprefix("model."): value for name, value in tensors.items()
                                    if name.startswith("model.")})
        for name, p in self.model.named_parameters():
            if f"momentum.{name}" in tensors:
                self.optimiser.state[p]["momentum_buffer"] = tensors[f"momentum.{name}"].to(p.device, p.dtype)
        self.step = int(meta["step"])
        return True


def train(t: Training, examples: Iterator[list[Example]], schedule: Schedule, *, stop: Stop, state: Path | None,
          identity: str) -> None:
    """Go on from ``t.step`` to the end, and re-estimate the norms. A collective.

    ``examples``: those of iteration ``t.step`` first. ``state`` keeps the training every ten minutes, at its end, and
    on a stop. Raises ``Stopped``, and what one rank met as ``EvalError`` on all.
    """
    t.model.train()
    saved = said = time.monotonic()
    problem: HpcsslError | None = None
    for now in range(t.step, schedule.iterations + schedule.precise):
        batch, stopping = [], stop()
        try:
            batch = next(examples)
        except (HpcsslError, OSError) as caught:
            problem = as_error(caught)
        if now < schedule.iterations and (stopping or time.monotonic() - saved > _SAVED_EVERY):
            saved, problem = time.monotonic(), problem or _save(t, state, identity)
        t.model.transform.side = _side(t.world, batch, stopping or problem is not None)
        if t.model.transform.side is None:
            agree(t.world, "detection", stop=stopping, error=problem)
        if now < schedule.iterations:
            loss = t.learn(batch, schedule.lr_at(now))
            if t.step == schedule.iterations:  # the norms' new statistics are not kept: they are made again
                problem = _save(t, state, identity)
        else:
            averaging(t.model, now - schedule.iterations)
            with torch.no_grad():
                t.loss(batch, now, t.model)
        if time.monotonic() - said > _SAID_EVERY and now < schedule.iterations:
            said = time.monotonic()
            log.info("detect: iteration %d of %d, loss %.3f", now + 1, schedule.iterations, loss)
    agree(t.world, "detection", error=problem)


def _save(t: Training, state: Path | None, identity: str) -> HpcsslError | None:
    """Save on rank 0; what went wrong is for all ranks to hear."""
    if t.world.main and state is not None:
        try:
            t.save(state, identity)
        except OSError as caught:
            return as_error(caught)
    return None


def _side(world: World, batch: list[Example], halt: bool) -> tuple[int, int] | None:
    """Height and width that hold every picture of the world's batch; None where some rank has to halt."""
    edges = [max((example.image.shape[axis] for example in batch), default=0) for axis in (1, 2)]
    sent = torch.tensor([*edges, int(halt)], dtype=torch.float32, device=world.device)
    height, width, halted = (int(value) for value in world.maximum(sent).result())
    return None if halted else (height, width)
