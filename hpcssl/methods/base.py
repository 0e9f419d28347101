"""What a method is: a plan, an aim and an agreement. ``train_step`` knows nothing else about it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from torch import Tensor

from hpcssl.memory.bank import Bank
from hpcssl.views.plan import ViewPlan
from hpcssl.world import World


@dataclass(frozen=True)
class Emb:
    """Embeddings of one view, unit length, in the precision of the loss (float32, or float64 in proofs).

    ``z`` [b, D] is the projection, ``u`` [b, D] the prediction: None on the target's side and for methods without
    a predictor.
    """

    z: Tensor
    u: Tensor | None = None


@dataclass(frozen=True)
class BankSpec:
    """What a method keeps of the past: which columns, and whether it looks before or after feeding the bank.

    The column ``key`` holds target projections; ``index`` the sample's number and ``label`` its class, or -1.
    ``push``: ``before`` the lookup, so that an image finds itself (MSF), or ``after`` the step, so that it cannot
    (NNCLR, MoCo). ``views`` are the target views whose embeddings are kept, one after the other; before the lookup
    only one can be.
    """

    push: Literal["before", "after"]
    views: tuple[int, ...]


@dataclass
class Context:
    """What ``aim`` and ``agree`` may look at beside embeddings. ``notes`` takes diagnostics (scalar tensors).

    ``partner_B``: int64 [b], whose image each row's query is mixed with; None for a query of one image.
    ``watch_labels``: the data set has labels, so that diagnostics may use them.
    """

    step: int
    world: World
    bank: Bank | None
    index_B: Tensor
    label_B: Tensor
    partner_B: Tensor | None = None
    watch_labels: bool = False
    notes: dict[str, Tensor] = field(default_factory=dict)


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
