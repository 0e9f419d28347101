"""What a method is: a plan, an aim and an agreement. ``train_step`` knows nothing else about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from hpcssl import rng
from hpcssl.memory.bank import Bank
from hpcssl.memory.ledger import Ledger
from hpcssl.memory.rows import Memory
from hpcssl.views.ops import sent
from hpcssl.views.plan import ViewPlan
from hpcssl.world import World


@dataclass(frozen=True)
class Emb:
    """Embeddings of one view, unit length, in the precision of the loss (float32, or float64 in proofs).

    ``z`` [b, D] is the projection, ``u`` [b, D] the prediction: None from a moving average, which has no predictor, and
    for methods without one; with prototypes the scores z·c [b, C]. ``view`` is its position in the plan.
    """

    z: Tensor
    u: Tensor | None = None
    view: int = 0


@dataclass(frozen=True)
class Heads:
    """What stands behind the online projector. ``predictor``: nothing, a perceptron of its own (``mlp``), or a layer of
    so many ``prototypes``, unit vectors whose inner products with z are the prediction (SwAV). ``constant_lr``: the
    predictor does not follow the rate's schedule; for the first ``still_steps`` steps it is not updated."""

    predictor: Literal["none", "mlp", "prototypes"] = "none"
    prototypes: int = 0
    constant_lr: bool = False
    still_steps: int = 0


@dataclass(frozen=True)
class BankSpec:
    """What a method keeps of the past: which columns, and whether it looks before or after feeding the bank.

    The column ``key`` holds target projections; ``index`` the sample's number and ``label`` its class, or -1.
    ``push``: ``before`` the lookup, so that an image finds itself (MSF), or ``after`` the step, so that it cannot
    (NNCLR, MoCo); or ``anew``: before each step the whole bank is filled with random images of the data set, embedded
    by the encoder as it is. ``views`` are the target views whose embeddings are kept (``anew``: how the random images
    are augmented), one after the other; before the lookup only one can be. ``replace``: new rows take the place of the
    ``oldest``, or of rows drawn at ``random``.
    ``vectors``, ``numbers``: names of further columns, as wide as ``key`` or of one integer, which the method's
    ``columns`` fills (``Remembering``); in rows that were never pushed the integer is -1.
    """

    push: Literal["before", "after", "anew"]
    views: tuple[int, ...]
    replace: Literal["oldest", "random"] = "oldest"
    vectors: tuple[str, ...] = ()
    numbers: tuple[str, ...] = ()


@dataclass
class Context:
    """What ``aim`` and ``agree`` may look at beside embeddings. ``notes`` takes diagnostics (scalar tensors).

    ``step`` counts from 0, ``epoch_steps`` make an epoch. ``pos_B`` int64 [b]: which of the rank's rows these are: all
    of them, or those of a micro-batch. ``kin``: for queries of two images, from rows of the global batch to those
    whose queries show one of the same images (``views/mix.py``). ``predict``: the predictor on rows, no gradient.
    ``watch_labels``: the data set has labels, so that diagnostics may use them. ``targets``: the embeddings of all
    target views. ``memories``: what the method keeps beside the bank, by name (``Remembering``).
    """

    step: int
    epoch_steps: int
    seed: int
    world: World
    bank: Bank | None
    index_B: Tensor
    label_B: Tensor
    pos_B: Tensor
    predict: Callable[[Tensor], Tensor]
    kin: Callable[[Tensor], Tensor] | None = None
    watch_labels: bool = False
    notes: dict[str, Tensor] = field(default_factory=dict)
    targets: dict[int, Emb] = field(default_factory=dict)
    memories: dict[str, Memory] = field(default_factory=dict)

    def uniform(self, *address: int | str) -> Tensor:
        """[b] float64 in [0, 1): one number for each image of this step, whichever rank it is on."""
        whole = rng.uniform(rng.key(self.seed, *address, self.step), self.world.batch)
        return self.world.part_of_batch(sent(whole, self.index_B.device))[self.pos_B]

    def everyone(self, x: Tensor) -> Tensor:
        """[b, …] of this rank as [W·b, …] of the global batch, with gradient to the rank that each row came from."""
        return self.world.gather_grad(x)

    def rows(self) -> Tensor:
        """Numbers in the global batch of this rank's rows, [b] int64; of methods whose batch is not cut."""
        return self.pos_B + self.world.rank * len(self.pos_B)


class Method(Protocol):
    """A method of self-supervised learning.

    ``target``: the encoder that is aimed at is a moving average of the online one (``ema``), the online one without
    gradient (``stop``), or with it (``same``). ``heads``: what stands behind the online projector. ``in_batch``: the
    loss of a row looks at other rows of its batch (in-batch negatives, codes), so that a batch cannot be cut into
    micro-batches. Where the plan has views of a second modality, that one has encoders of its own.
    """

    plan: ViewPlan
    target: Literal["ema", "stop", "same"]
    heads: Heads
    in_batch: bool
    bank: BankSpec | None

    def aim(self, target: Emb, ctx: Context) -> Any:
        """What the queries of one target view should come near to. Called once per target view (and micro-batch, where
        the target is no moving average)."""

    def agree(self, query: Emb, aim: Any, pos_B: Tensor, ctx: Context) -> Tensor:
        """Loss of each query row, [b]. Row i belongs to the image of row ``pos_B[i]`` of the aim."""


@dataclass(frozen=True)
class Scene:
    """What memories are made from: a data set whose images have these ``labels`` (int64 [images], -1 for none),
    embeddings of ``width`` entries of ``dtype``, the bank's ``placement`` (replicated or sharded)."""

    labels: np.ndarray
    seed: int
    width: int
    dtype: torch.dtype
    placement: str
    world: World

    def ledger(self, images: int | None = None) -> Ledger:
        """A ledger of all images, or of so many."""
        return Ledger(len(self.labels) if images is None else images, self.width, self.world,
                      placement=self.placement, dtype=self.dtype)


@runtime_checkable
class Remembering(Protocol):
    """What a method has besides if it remembers more than the bank does. All ranks call each function at one step.

    A run's memories are saved, loaded and digested beside the bank. ``refresh`` and ``after`` alone change them.
    """

    def memories(self, scene: Scene) -> dict[str, Memory]:
        """The memories of a new run, by name. Called once."""

    def refresh(self, ctx: Context) -> None:
        """Called at the start of every step, before anything is embedded: also if the step is refused later."""

    def columns(self, target: Emb, ctx: Context) -> dict[str, Tensor]:
        """Values [b, D] or [b] of the bank's further columns, for the rows that are about to be pushed."""

    def after(self, target: dict[int, Emb], ctx: Context) -> None:
        """Called after a step that was taken, with its targets by view; a refused step leaves no trace."""
