"""What a method is: a view plan, training targets and a loss. ``train_step`` knows nothing else about it.

Letters in shapes: b rows of this rank, W ranks, D entries per embedding, C prototypes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hpcssl import rng
from hpcssl.distributed.batch_layout import BatchLayout
from hpcssl.distributed.devices import to_device
from hpcssl.distributed.world import World
from hpcssl.errors import ConfigError
from hpcssl.memory.bank import Bank
from hpcssl.memory.checkpointed import CheckpointedMemory
from hpcssl.memory.embedding_table import EmbeddingTable
from hpcssl.views.plan import ViewPlan


@dataclass(frozen=True)
class Embedding:
    """Embeddings of one view, unit length, in the precision of the loss (float32, or float64 in tests).

    Attributes:
        z: [b, D], projection.
        u: [b, D], prediction. None if there is no predictor: a moving average never has one. With prototypes it holds
            their scores z·c, [b, C].
        view: position of the view in the plan.
    """

    z: Tensor
    u: Tensor | None = None
    view: int = 0

    @property
    def prediction(self) -> Tensor:
        """``u`` of a method with a predictor. Raises ``ValueError`` if there is none."""
        if self.u is None:
            raise ValueError(f"view {self.view} has no prediction: the method's HeadSpec names no predictor")
        return self.u


@dataclass(frozen=True)
class HeadSpec:
    """What follows the online projector.

    Attributes:
        predictor: ``none``; ``mlp``, a multi-layer perceptron; or ``prototypes``, a layer of unit vectors whose inner
            products with z are the prediction (SwAV).
        prototypes: number of prototypes, C; 0 for the other kinds.
        constant_lr: whether the predictor keeps the peak learning rate while the rest follows the schedule.
        frozen_steps: number of steps at the start in which the predictor is not updated.
    """

    predictor: Literal["none", "mlp", "prototypes"] = "none"
    prototypes: int = 0
    constant_lr: bool = False
    frozen_steps: int = 0


@dataclass(frozen=True)
class BankSpec:
    """What a method keeps in the memory bank.

    Every bank has the columns ``key`` [D], the projections of the target encoder, ``index``, the number of the image,
    and ``label``, its class or -1.

    Attributes:
        push: when the bank is fed. ``before`` the lookup, so that an image finds itself (MSF); ``after`` the step, so
            that it cannot (NNCLR, MoCo); or ``refill``: before each step the whole bank is filled with random images
            of the data set, embedded by the current encoder.
        views: the target views whose embeddings are pushed, one after the other; with ``before`` only one. With
            ``refill``: how the random images are augmented.
        replace: new rows replace the ``oldest`` rows, or rows drawn at ``random``.
        vectors: names of further columns as wide as ``key``, which ``StateHooks.bank_columns`` fills.
        numbers: names of further columns of one integer. Rows that were never pushed hold -1.
    """

    push: Literal["before", "after", "refill"]
    views: tuple[int, ...]
    replace: Literal["oldest", "random"] = "oldest"
    vectors: tuple[str, ...] = ()
    numbers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.push == "before" and len(self.views) != 1:  # a step that is not taken restores the last push
            fix = 'set push="after"'
            raise ConfigError("BankSpec.views", got=self.views, expected='one view with push="before"', fix=fix)


@dataclass
class StepContext:
    """What ``targets`` and ``loss`` may use besides embeddings.

    Attributes:
        step: number of the step, from 0.
        steps_per_epoch: number of steps in one epoch.
        seed: the recipe's seed.
        world: the ranks that train together. Methods use the functions below instead.
        layout: how the global batch is split over micro-batches and ranks.
        bank: the memory bank. Only for methods that have a ``BankSpec``; it is None for the others.
        index_B: [b] int64, image numbers.
        label_B: [b] int64, classes, or -1 where unknown.
        rows_B: [b] int64, which of this rank's rows these are: all of them, or those of one micro-batch.
        predict: applies the predictor to rows [n, D], without gradient.
        same_image_rows: for queries that mix two images: maps rows [b] of the global batch to the rows [b, M] whose
            queries show one of the same images (``views/mix.py``). None for queries of one image.
        has_labels: whether the data set has labels, so that diagnostics may use them.
        metrics: scalars that are logged with the step, by name.
        target_embeddings: embeddings of all target views, by view.
        memories: what the method keeps besides the bank, by name; see ``StateHooks``.
        searches: neighbors of all target views of this step or micro-batch, by their number and by view; see
            ``neighbors.search_bank``.
        taken: bool [] on the device, equal on all ranks, after the backward pass of a step whose verdict the host has
            not read: whether the step is taken (``train/verdict.py``). None where it is known to be.
    """

    step: int
    steps_per_epoch: int
    seed: int
    world: World
    layout: BatchLayout
    bank: Bank
    index_B: Tensor
    label_B: Tensor
    rows_B: Tensor
    predict: Callable[[Tensor], Tensor]
    same_image_rows: Callable[[Tensor], Tensor] | None = None
    has_labels: bool = False
    metrics: dict[str, Tensor] = field(default_factory=dict)
    target_embeddings: dict[int, Embedding] = field(default_factory=dict)
    memories: dict[str, Any] = field(default_factory=dict)
    searches: dict[int, dict[int, Any]] = field(default_factory=dict)
    taken: Tensor | None = None

    @property
    def global_batch_size(self) -> int:
        """Number of rows of all ranks together."""
        return len(self.rows_B) * self.world.size

    def uniform(self, *key: int | str) -> Tensor:
        """Draw one number per image of this step, the same for an image whichever rank it is on.

        Args:
            *key: RNG key of the draw; the step is added.

        Returns:
            [b] float64 in [0, 1).
        """
        whole = rng.uniform(rng.key(self.seed, *key, self.step), self.layout.batch)
        return self.world.local_batch_rows(to_device(whole, self.index_B.device), self.layout)[self.rows_B]

    def all_gather_rows(self, x: Tensor) -> Tensor:
        """Gather [b, …] of every rank into [W·b, …]. Gradients flow back to the rank that each row came from."""
        return self.world.all_gather_with_grad(x)

    def all_reduce_sum(self, x: Tensor) -> Tensor:
        """Add x over all ranks, without gradient."""
        return self.world.all_reduce_sum(x)

    def share_of(self, x: Tensor) -> Tensor:
        """Return this rank's share of the rows of x, which is equal on all ranks: about 1/W of them."""
        return x.tensor_split(self.world.size)[self.world.rank]

    def global_rows(self) -> Tensor:
        """Return the positions [b] int64 of this rank's rows in the result of ``all_gather_rows``.

        Only for methods with ``needs_whole_batch``, whose batch is not split into micro-batches.
        """
        return self.rows_B + self.world.rank * len(self.rows_B)


class Method(Protocol):
    """A method of self-supervised learning. Where the plan has views of a second modality, that has its own encoders.

    A method that keeps state besides the bank also has some of the functions of ``StateHooks``.

    Attributes:
        plan: which views of an image exist, and which query is trained toward which target view.
        target_encoder: the encoder that embeds target views. ``ema``: an exponential moving average of the online
            encoder. ``stop_gradient``: the online encoder, without gradient. ``shared``: the online encoder, with
            gradient.
        heads: what follows the online projector.
        needs_whole_batch: whether the loss of a row depends on other rows of its batch, as with negatives from the
            batch or codes of the batch. Such a batch cannot be split into micro-batches.
        bank: what the memory bank keeps; None for no bank.
    """

    plan: ViewPlan
    target_encoder: Literal["ema", "stop_gradient", "shared"]
    heads: HeadSpec
    needs_whole_batch: bool
    bank: BankSpec | None

    def targets(self, target: Embedding, ctx: StepContext) -> Any:
        """Compute what queries are trained toward, from the embeddings of one target view.

        Called once per target view and step; unless the target encoder is a moving average, once per micro-batch.

        Args:
            target: embeddings of the target view, b rows.
            ctx: the step.

        Returns:
            Anything that ``loss`` can use for queries of the same b images, typically [b, D].
        """

    def loss(self, query: Embedding, targets: Any, rows_B: Tensor, ctx: StepContext) -> Tensor:
        """Compute the loss of each query row. The mean over rows and ranks is taken by the training step.

        Args:
            query: embeddings of the query view, with gradient.
            targets: the result of ``targets`` for the target view of this term.
            rows_B: int64, one entry per query: row i shows the image of row ``rows_B[i]`` of the targets.
            ctx: the step.

        Returns:
            One loss per query row.
        """


@dataclass(frozen=True)
class MemoryContext:
    """What a method's own memories are built from.

    Attributes:
        labels: [images] int64, the classes of the data set, or -1 where unknown.
        seed: the recipe's seed.
        width: entries per embedding, D.
        dtype: dtype of embeddings.
        placement: of the bank and the embedding tables, ``replicated`` or ``sharded``.
        world: the ranks that train together.
        layout: how the global batch is split over micro-batches and ranks.
    """

    labels: npt.NDArray[np.int64]
    seed: int
    width: int
    dtype: torch.dtype
    placement: str
    world: World
    layout: BatchLayout

    def embedding_table(self, images: int | None = None) -> EmbeddingTable:
        """Create an embedding table for this number of images; None means all of the data set."""
        return EmbeddingTable(
            len(self.labels) if images is None else images,
            self.width,
            self.world,
            layout=self.layout,
            placement=self.placement,
            dtype=self.dtype,
        )


@dataclass(frozen=True)
class StateHooks:
    """Functions that a method has if it keeps state besides the bank. All are optional.

    A method defines those that it needs under the names below; ``StateHooks.of`` fills in the rest. All ranks call each
    function at the same step. Only ``before_step`` and ``after_step`` may change the memories, which are saved, loaded
    and compared between ranks together with the bank.

    Attributes:
        build_memories: returns the memories of a new run, by name. Called once. Default: none.
        before_step: called at the start of every step, before anything is embedded, even if the step is discarded
            later. Default: does nothing.
        bank_columns: returns values [b, D] or [b] of the bank's further columns, for the rows that are about to be
            pushed. Default: none.
        after_step: called with the target embeddings, by view, after a step that was not discarded: a discarded step
            leaves no trace. Default: does nothing.
        heeds_taken: an attribute and not a function: whether ``after_step`` changes nothing where ``ctx.taken`` is
            false. Without it, a GPU run waits for every step before it queues the next. Default: True for a method
            without ``after_step``, else False.
    """

    build_memories: Callable[[MemoryContext], dict[str, CheckpointedMemory]]
    before_step: Callable[[StepContext], None]
    bank_columns: Callable[[Embedding, StepContext], dict[str, Tensor]]
    after_step: Callable[[dict[int, Embedding], StepContext], None]
    heeds_taken: bool

    @classmethod
    def of(cls, owner: object) -> StateHooks:
        """Return the hooks that ``owner`` defines, and the defaults for those that it does not."""
        return cls(
            build_memories=getattr(owner, "build_memories", lambda context: {}),
            before_step=getattr(owner, "before_step", lambda ctx: None),
            bank_columns=getattr(owner, "bank_columns", lambda target, ctx: {}),
            after_step=getattr(owner, "after_step", lambda targets, ctx: None),
            heeds_taken=getattr(owner, "heeds_taken", not hasattr(owner, "after_step")),
        )
