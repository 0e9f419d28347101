"""One training step of any method: embed, compute targets and loss, backward, update, feed the bank.

The step knows no method by name. All ranks take it together or skip it together; ``verdict`` explains how they find
out, and when the host does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from hpcssl import rng
from hpcssl.data.batch import Batch
from hpcssl.memory.slots import PushUndo
from hpcssl.methods.base import Embedding, StepContext
from hpcssl.methods.diagnostics import spread
from hpcssl.nets import norm
from hpcssl.optim import masked
from hpcssl.optim.masked import are_finite
from hpcssl.train import verdict
from hpcssl.train.train_state import TrainState
from hpcssl.train.verdict import HostState, LaunchedStep, StepFlags, StepReport, StepVerdict
from hpcssl.views import mix
from hpcssl.views.mix import MixPairing, Mixture
from hpcssl.views.plan import Term

Mixtures = dict[int, tuple[Mixture, MixPairing]]
"""For each mixed view, by its number: how it was mixed, and with which images."""


def train_step(t: TrainState, batch: Batch, flags: Callable[[], StepFlags] = StepFlags) -> StepReport:
    """``launch_step``, and wait for its verdict. A collective.

    Returns:
        The result of the step.
    """
    return launch_step(t, batch, flags).conclude()


def launch_step(
    t: TrainState, batch: Batch, flags: Callable[[], StepFlags] = StepFlags, after: LaunchedStep | None = None
) -> LaunchedStep:
    """Take step ``t.step + 1`` with the global batch, or skip it on all ranks. A collective.

    A step with a loss, target or gradient that is not finite on one rank changes neither parameters, target encoder,
    optimizer, bank nor norm statistics on any rank; only the number of the step advances. A batch that is incomplete
    on one rank does not even advance that.

    Args:
        t: The state to train.
        batch: This rank's rows of the global batch.
        flags: Returns this rank's flags. It is called late, after the backward pass: all that ranks must agree on
            travels in one reduction per step.
        after: The step before, if its verdict was not read yet (``t.late_verdicts``).

    Returns:
        The step, to be concluded before the one after the next is launched.
    """
    start = HostState.of(t)
    images, ctx = t.images(batch), t.context(batch)
    t.hooks.before_step(ctx)
    if t.bank is not None and t.method.bank is not None and t.method.bank.push == "refill":
        _refill_bank(t)
    mixtures = _append_mixed_views(t, images)
    lr, momentum = t.set_rates()
    targets, push_undo = _compute_ema_targets(t, images, ctx)
    loss, finite = _forward_backward(t, images, mixtures, targets, ctx)

    # Gradients are checked as well: those of a finite loss may not be finite.
    packed = verdict.pack(~finite, ~t.gradients_are_finite(), not batch.complete, flags())
    step = LaunchedStep(t, start, StepVerdict(t.world.all_reduce_max(packed)), finite)
    if t.late_verdicts:
        step.taken = ctx.taken = step.verdict.taken(None if after is None else after.taken)
        if push_undo is not None and t.bank is not None:
            t.bank.undo(push_undo, unless=step.taken)
        _update(t, ctx, momentum)
    elif (values := step.verdict.read()).taken:
        _update(t, ctx, momentum)
    else:
        step.reason = _skip_step(t, push_undo, values)
    t.step += 1
    if t.scaler.is_enabled():
        ctx.metrics["scale"] = torch.tensor(t.scaler.get_scale())
    target_spread = spread(ctx.target_embeddings[t.plan.targets[0]].z)
    step.scalars = {"loss": loss, "lr": lr, "ema": momentum, "spread": target_spread, **ctx.metrics}
    return step


def _update(t: TrainState, ctx: StepContext, momentum: float) -> None:
    """Make the update from the gradients, and everything that follows it, unless ``ctx.taken`` is false."""
    taken = ctx.taken
    predictor_is_frozen = t.step < t.method.heads.frozen_steps
    if predictor_is_frozen and t.pair.online.predictor is not None:
        t.pair.online.predictor.zero_grad()
    if taken is None:
        t.scaler.step(t.optimizer)
        t.scaler.update()
    else:
        masked.step_if(taken, t.optimizer)
    t.optimizer.zero_grad()
    norm.commit_pending(t.norms, t.world, taken)
    if not predictor_is_frozen:
        t.pair.normalize_prototypes(taken)
    t.pair.update_ema(momentum, taken)
    if t.bank is not None and t.method.bank is not None and t.method.bank.push == "after":
        _push(t, ctx)
    t.hooks.after_step(ctx.target_embeddings, ctx)


def _skip_step(t: TrainState, push_undo: PushUndo | None, values: verdict.Values) -> str:
    """Discard a step whose verdict is known, and return why where that is not a bad value.

    Gradients that overflow under a loss scale belong to the search for the scale: they lower it, and count as a bad
    step only when it cannot be lowered any further.
    """
    lower_scale = not (values.bad_value or values.incomplete) and t.scaler.is_enabled() and t.scaler.get_scale() > 1
    if lower_scale:
        t.scaler.unscale_(t.optimizer)  # notes the overflow, by which ``update`` lowers the scale
        t.scaler.update()
    if push_undo is not None and t.bank is not None:
        t.bank.undo(push_undo)
    norm.discard_pending(t.norms)
    t.optimizer.zero_grad()
    return f"the gradients overflowed; the loss scale is lowered to {t.scaler.get_scale():g}" if lower_scale else ""


def _compute_ema_targets(
    t: TrainState, images: list[Tensor], ctx: StepContext
) -> tuple[dict[int, Any], PushUndo | None]:
    """Compute targets by view from the moving average, after a push that comes before the lookup, and its undo."""
    if t.method.target_encoder != "ema":
        return {}, None
    views = t.plan.targets
    z = t.pair.embed_target([images[v] for v in views], t.shuffle_orders(t.step), t.second_modality(views))
    ctx.target_embeddings = {v: Embedding(z_BD, view=v) for v, z_BD in zip(views, z, strict=True)}
    push_undo = _push(t, ctx) if t.method.bank is not None and t.method.bank.push == "before" else None
    return {v: t.method.targets(embedding, ctx) for v, embedding in ctx.target_embeddings.items()}, push_undo


def _forward_backward(
    t: TrainState, images: list[Tensor], mixtures: Mixtures, targets: dict[int, Any], ctx: StepContext
) -> tuple[Tensor, Tensor]:
    """Embed the queries and add up gradients, one micro-batch after the other.

    Where targets come from the online encoder, they are computed here, too, and ``ctx.target_embeddings`` is set.

    Returns:
        This rank's loss, and whether the loss and the target embeddings are finite, bool [].
    """
    has_ema = t.method.target_encoder == "ema"
    views = t.plan.online_views(has_target_encoder=has_ema)
    losses: list[Tensor] = []
    online_targets: list[dict[int, Embedding]] = []  # of each micro-batch
    micro_batches = ctx.rows_B.chunk(t.recipe.machine.accumulation_steps)
    for rows_B in micro_batches:
        is_last = len(losses) == len(micro_batches) - 1
        with contextlib.nullcontext() if is_last else t.pair.no_sync():
            embedded = t.pair.embed([images[v][rows_B] for v in views], t.second_modality(views))
            query = {v: Embedding(z_BD, u_BD, view=v) for v, (z_BD, u_BD) in zip(views, embedded, strict=True)}
            micro_ctx, target_rows_B = ctx, rows_B
            if not has_ema:
                online = {v: _as_target(query[v], t.method.target_encoder) for v in t.plan.targets}
                online_targets.append(online)
                index_B, label_B = ctx.index_B[rows_B], ctx.label_B[rows_B]
                micro_ctx = replace(
                    ctx, index_B=index_B, label_B=label_B, rows_B=rows_B, target_embeddings=online, searches={}
                )
                targets = {v: t.method.targets(embedding, micro_ctx) for v, embedding in online.items()}
                target_rows_B = rows_B - rows_B[0]
            terms = [_term_loss(t, term, query, targets, target_rows_B, micro_ctx, mixtures) for term in t.plan.terms]
            loss_B = cast(Tensor, sum(terms))
            loss = loss_B.mean() / len(micro_batches)
            losses.append(loss.detach())
            if is_last:
                t.world.set_phase("backward")  # where ranks wait for each other, in the reduction of gradients
            t.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]  # torch has no annotation
    ctx.target_embeddings = ctx.target_embeddings or _concatenate(online_targets)
    total = cast(Tensor, sum(losses))
    # Targets are checked as well: a target row that is not finite has no neighbors, and adds nothing to the loss.
    return total, are_finite([total, *(embedding.z.detach() for embedding in ctx.target_embeddings.values())])


def _refill_bank(t: TrainState) -> None:
    """Fill the whole bank with embeddings of random images by the current encoder."""
    assert t.bank is not None and t.method.bank is not None and t.support is not None
    for batch in t.support.batches(t.step):
        ctx = t.context(batch)
        for image in t.images(batch, t.method.bank.views):
            t.bank.push(key=t.pair.embed_without_grad(image), index=ctx.index_B, label=ctx.label_B)
    norm.discard_pending(t.norms)  # the running statistics are those of training batches alone


def _append_mixed_views(t: TrainState, images: list[Tensor]) -> Mixtures:
    """Append the mixed views of the plan to the images, and return how they were mixed."""
    options, mixtures = t.recipe.mix, Mixtures()
    pairing = MixPairing.draw(options, rng.key(t.recipe.seed, "pairs", t.step), t.recipe.optim.batch, t.world)
    for source in t.plan.mixed:
        key = rng.key(t.recipe.seed, "mix", t.step, source if options.lambda_scope == "view" else t.plan.mixed[0])
        mixture = mix.draw_mixture(options, key, t.plan.views[source].size)
        mixtures[len(images)] = mixture, pairing
        images.append(mix.mix_images(images[source], mixture, pairing.partner_images(images[source])))
    return mixtures


def _term_loss(
    t: TrainState,
    term: Term,
    query: dict[int, Embedding],
    targets: dict[int, Any],
    rows_B: Tensor,
    ctx: StepContext,
    mixtures: Mixtures,
) -> Tensor:
    """Compute one term of the plan, weighted, for each query row [b].

    A ``partner`` term compares each mixed query with the target of the image that was mixed in; its rows are in the
    order of those images.
    """
    embedding, weight = query[term.query], term.share
    if term.role != "plain":
        mixture, pairing = mixtures[term.query]
        ctx = replace(ctx, same_image_rows=pairing.same_image_rows)
        weight *= mixture.lam if term.role == "own" else 1 - mixture.lam
        if term.role == "partner":
            u_BD = None if embedding.u is None else pairing.to_partner_order(embedding.u)
            embedding = replace(embedding, z=pairing.to_partner_order(embedding.z), u=u_BD)
    return weight * t.method.loss(embedding, targets[term.target], rows_B, ctx)


def _push(t: TrainState, ctx: StepContext) -> PushUndo | None:
    """Push the target views that the method keeps into the bank, and return the undo of the last push."""
    assert t.bank is not None and t.method.bank is not None
    push_undo = None
    for view in t.method.bank.views:
        slots, target = None, ctx.target_embeddings[view]
        if t.method.bank.replace == "random":
            slots = t.bank.draw_slots(rng.key(ctx.seed, "replace", ctx.step, view), t.recipe.optim.batch)
        columns = t.hooks.bank_columns(target, ctx)
        push_undo = t.bank.push(
            slots, ctx.taken, key=target.z.detach(), index=ctx.index_B, label=ctx.label_B, **columns
        )
    return push_undo


def _as_target(embedding: Embedding, target_encoder: str) -> Embedding:
    """Return an online embedding as a target: for ``stop_gradient`` without gradient, for ``shared`` with it."""
    if target_encoder == "shared":
        return embedding
    return replace(embedding, z=embedding.z.detach(), u=None if embedding.u is None else embedding.u.detach())


def _concatenate(parts: list[dict[int, Embedding]]) -> dict[int, Embedding]:
    """Join the target embeddings of all micro-batches, in the order of the rank's rows."""
    if len(parts) == 1:
        return parts[0]
    joined = {}
    for view, embedding in parts[0].items():
        predictions = [part[view].u for part in parts]
        u_BD = None if embedding.u is None else torch.cat(cast(list[Tensor], predictions))
        joined[view] = replace(embedding, z=torch.cat([part[view].z for part in parts]), u=u_BD)
    return joined
