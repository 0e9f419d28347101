"""What a method is: a plan, an aim and an agreement. ``train_step`` knows nothing else about it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from hpcssl import rng
from hpcssl.memory.bank import Bank
from hpcssl.memory.rows import Memory
from hpcssl.views.ops import sent
from hpcssl.views.plan import ViewPlan
from hpcssl.world import World


@dataclass(frozen=True)
class Emb:
    """Embeddings of one view, unit length, in the precision of the loss (float32, or float64 in proofs).

    ``z`` [b, D] is the projection, ``u`` [b, D] the prediction: None on the target's side and for methods without
    a predictor. ``view`` is its position in the plan.
    """

    z: Tensor
    u: Tensor | None = None
    view: int = 0


@dataclass(frozen=True)
class BankSpec:
    """What a method keeps of the past: which columns, and whether it looks before or after feeding the bank.

    The column ``key`` holds target projections; ``index`` the sample's number and ``label`` its class, or -1.
    ``push``: ``before`` the lookup, so that an image finds itself (MSF), or ``after`` the step, so that it cannot
    (NNCLR, MoCo). ``views`` are the target views whose embeddings are kept, one after the other; before the lookup
    only one can be. ``replace``: new rows take the place of the ``oldest``, or of rows drawn at ``random``.
    ``vectors``, ``numbers``: names of further columns, as wide as ``key`` or of one integer, which the method's
    ``columns`` fills (``Remembering``); in rows that were never pushed the integer is -1.
    """

    push: Literal["before", "after"]
    views: tuple[int, ...]
    replace: Literal["oldest", "random"] = "oldest"
    vectors: tuple[str, ...] = ()
    numbers: tuple[str, ...] = ()


@dataclass
class Context:
    """What ``aim`` and ``agree`` may look at beside embeddings. ``notes`` takes diagnostics (scalar tensors).

    ``partner_B``: int64 [b], whose image each row's query is mixed with; None for a query of one image.
    ``watch_labels``: the data set has labels, so that diagnostics may use them. ``memories``: what the method keeps
    beside the bank, by name (``Remembering``).
    """

    step: int
    seed: int
    world: World
    bank: Bank | None
    index_B: Tensor
    label_B: Tensor
    partner_B: Tensor | None = None
    watch_labels: bool = False
    notes: dict[str, Tensor] = field(default_factory=dict)
    memories: dict[str, Memory] = field(default_factory=dict)

    def uniform(self, *address: int | str) -> Tensor:
        """[b] float64 in [0, 1): one number for each image of this step, whichever rank it is on."""
        whole = rng.uniform(rng.key(self.seed, *address, self.step), len(self.index_B) * self.world.size)
        return self.world.part(sent(whole, self.index_B.device))

    def everyone(self, x: Tensor) -> Tensor:
        """[b, …] of this rank as [W·b, …] of the global batch, with gradient to the rank that each row came from."""
        return self.world.gather_grad(x)

    def rows(self, pos_B: Tensor | None = None) -> Tensor:
        """Numbers in the global batch of this rank's rows, or of those at ``pos_B``; [b] int64."""
        b = len(self.index_B)
        own_B = torch.arange(b, device=self.index_B.device) if pos_B is None else pos_B
        return own_B + self.world.rank * b


class Method(Protocol):
    """A method of self-supervised learning.

    ``target``: the encoder that is aimed at is a moving average of the online one (``ema``), the online one without
    gradient (``stop``), or with it (``same``). ``predictor``: whether the online side has a prediction head.
    ``in_batch``: the loss of a row looks at other rows of its batch (in-batch negatives, codes), so that a batch
    cannot be cut into micro-batches. ``constant_lr``: prefixes of online parameters that do not follow the schedule.
    """

    plan: ViewPlan
    target: Literal["ema", "stop", "same"]
    predictor: bool
    in_batch: bool
    constant_lr: tuple[str, ...]
    bank: BankSpec | None

    def aim(self, target: Emb, ctx: Context) -> Any:
        """What the queries of one target view should come near to. Called once per target view."""

    def agree(self, query: Emb, aim: Any, pos_B: Tensor, ctx: Context) -> Tensor:
        """Loss of each query row, [b]. Row i belongs to the image of row ``pos_B[i]`` of the aim."""


@dataclass(frozen=True)
class Scene:
    """What memories are made from: a data set of ``images``, embeddings of ``width`` entries of ``dtype``, the bank's
    ``placement`` (replicated or sharded)."""

    images: int
    width: int
    dtype: torch.dtype
    placement: str
    world: World


@runtime_checkable
class Remembering(Protocol):
    """What a method has besides if it remembers more than the bank does. All ranks call each function at one step.

    A run's memories are saved, loaded and digested beside the bank. ``refresh`` and ``after`` alone change them.
    """

    def memories(self, scene: Scene) -> dict[str, Memory]:
        """The memories of a new run, by name. Called once."""

    def refresh(self, ctx: Context) -> None:
        """Called in the first step of every epoch, before anything is embedded: also if the step is refused later."""

    def columns(self, target: Emb, ctx: Context) -> dict[str, Tensor]:
        """Values [b, D] or [b] of the bank's further columns, for the rows that are about to be pushed."""

    def after(self, target: dict[int, Emb], ctx: Context) -> None:
        """Called after a step that was taken, with its targets by view; a refused step leaves no trace."""
