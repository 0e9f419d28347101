"""One step of any method: encode, aim, agree, backward, step, follow, push. It knows no method by name."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from hpcssl import rng
from hpcssl.data.loader import Batch
from hpcssl.memory.bank import Ticket
from hpcssl.methods.base import Context, Emb, Remembering
from hpcssl.methods.diagnostics import spread
from hpcssl.nets import norm
from hpcssl.train.state import Training
from hpcssl.views import mix
from hpcssl.views.mix import Mixture, Pairs
from hpcssl.views.plan import Term


@dataclass(frozen=True)
class Report:
    """What a step tells the loop: whether it was taken (else ``why`` not), the flags that some rank raised, scalars for
    the journal. ``void``: some rank had given up waiting for its batch; the step was never there."""

    taken: bool
    flags: tuple[bool, ...]
    scalars: dict[str, Tensor | float]
    why: str = ""
    void: bool = False


def train_step(t: Training, batch: Batch, flags: Callable[[], tuple[bool, ...]] = tuple) -> Report:
    """Take step ``t.step + 1`` on this rank's part of the global batch, or agree with all ranks not to.

    ``flags()`` are raised by any rank for all of them; they are asked for late and travel with the verdict on loss and
    gradients, so that the world agrees once per step, on what is known by then. What is not finite on one rank leaves
    parameters, target, optimiser, bank and statistics untouched on every rank; a batch that is not whole on one rank
    leaves the step's number as well.
    """
    images, ctx = t.images(batch), t.context(batch)
    remembers = isinstance(t.method, Remembering)
    if remembers:
        t.method.refresh(ctx)
    if t.bank is not None and t.method.bank.push == "anew":
        _fill_anew(t)
    mixtures = _mix(t, images)
    lr, momentum = t.set_rates()
    aims, ticket = _aim_at_average(t, images, ctx)
    loss, finite = _learn(t, images, mixtures, aims, ctx)

    # after the backward pass: a finite loss may have gradients that are not
    wrong = (~finite, ~_finite_gradients(t), not batch.whole, *flags())
    poor, overflow, void, *raised = t.world.maximum(_raised(wrong, loss.device)).result().bool().tolist()
    why = ""
    if void:
        _undo(t, ticket)
        return Report(False, tuple(raised), {}, "some rank gave up waiting for its images", void=True)
    if poor or overflow:
        why = _leave_untouched(t, ticket, finite, poor)
    else:
        still = t.step < t.method.heads.still_steps
        if still:
            t.pair.online.predictor.zero_grad()
        t.scaler.step(t.optimizer)
        t.scaler.update()
        t.optimizer.zero_grad()
        norm.commit(t.norms, t.world)
        if not still:
            t.pair.settle()
        t.pair.follow(momentum)
        if t.bank is not None and t.method.bank.push == "after":
            _push(t, ctx)
        if remembers:
            t.method.after(ctx.targets, ctx)
        t.skipped_in_a_row = 0
    t.step += 1
    if t.scaler.is_enabled():
        ctx.notes["scale"] = torch.tensor(t.scaler.get_scale())
    scalars = {"loss": loss, "lr": lr, "ema": momentum, "spread": spread(ctx.targets[t.plan.targets[0]].z), **ctx.notes}
    return Report(not why, tuple(raised), scalars, why)


def _leave_untouched(t: Training, ticket: Ticket | None, finite: Tensor, poor: bool) -> str:
    """Undo what the step has done so far; which ranks could not take it. ``poor``: the loss or a target of some rank is
    not finite, and not only gradients. Gradients that overflow under a loss scale are part of how the scale is found:
    they lower it, and count as a bad step only once there is none left to lower."""
    lowered = not poor and t.scaler.is_enabled() and t.scaler.get_scale() > 1
    if lowered:
        t.scaler.unscale_(t.optimizer)  # what it finds there is what ``update`` goes by
        t.scaler.update()
    _undo(t, ticket)
    t.skipped_in_a_row += not lowered
    if lowered:
        return f"the gradients overflowed; the loss scale is lowered to {t.scaler.get_scale():g}"
    if not poor:
        return "a gradient was not finite, with a finite loss"
    ranks = t.world.gather((~finite)[None]).nonzero()[:, 0].tolist()
    return f"the loss or a target was not finite on rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


def _aim_at_average(t: Training, images: list[Tensor], ctx: Context) -> tuple[dict[int, object], Ticket | None]:
    """What the moving average's embeddings point at, by view, and the ticket of a push before the lookup."""
    if t.method.target != "ema":
        return {}, None
    views = t.plan.targets
    found = t.pair.embed_target([images[v] for v in views], t.shuffles(t.step), t.second(views))
    ctx.targets = {v: Emb(z, view=v) for v, z in zip(views, found, strict=True)}
    ticket = _push(t, ctx) if t.bank is not None and t.method.bank.push == "before" else None
    return {v: t.method.aim(emb, ctx) for v, emb in ctx.targets.items()}, ticket


def _undo(t: Training, ticket: Ticket | None) -> None:
    if ticket is not None:
        t.bank.take_back(ticket)
    norm.discard(t.norms)
    t.optimizer.zero_grad()


def _learn(t: Training, images: list[Tensor], mixtures: dict[int, tuple[Mixture, Pairs]], aims: dict[int, object],
           ctx: Context) -> tuple[Tensor, Tensor]:
    """Forward and backward of the online network, one micro-batch after the other: this rank's loss, and whether it and
    the targets are finite (bool [])."""
    average = t.method.target == "ema"
    views = t.plan.queries if average else tuple(sorted({*t.plan.queries, *t.plan.targets}))
    losses: list[Tensor] = []
    passed: list[dict[int, Emb]] = []  # the targets of each micro-batch, where they come from the queries' own pass
    micros = ctx.pos_B.chunk(t.recipe.machine.accumulate)
    for pos_B in micros:
        last = len(losses) == len(micros) - 1
        with contextlib.nullcontext() if last else t.pair.no_sync():
            found = t.pair.embed([images[v][pos_B] for v in views], t.second(views))
            query = {v: Emb(*emb, view=v) for v, emb in zip(views, found, strict=True)}
            here, where_B = ctx, pos_B
            if not average:
                passed.append({v: _pointed(query[v], t.method.target) for v in t.plan.targets})
                here = replace(ctx, index_B=ctx.index_B[pos_B], label_B=ctx.label_B[pos_B], pos_B=pos_B,
                               targets=passed[-1])
                aims, where_B = {v: t.method.aim(emb, here) for v, emb in passed[-1].items()}, pos_B - pos_B[0]
            loss_B = sum(_agree(t, term, query, aims, where_B, here, mixtures) for term in t.plan.terms)
            loss = loss_B.mean() / len(micros)
            losses.append(loss.detach())
            if last:
                t.world.mark("backward")  # where the ranks meet, in the reduction of the gradients
            t.scaler.scale(loss).backward()
    ctx.targets = ctx.targets or _joined(passed)
    # a row of the target that is not finite has no neighbours and costs nothing: the loss alone would not tell of it
    finite = torch.stack([sum(losses).isfinite(), *(emb.z.isfinite().all() for emb in ctx.targets.values())]).all()
    return sum(losses), finite


def _fill_anew(t: Training) -> None:
    """Fill the whole bank with the present embeddings of random images; their statistics are not the batch's."""
    for batch in t.support(t.step):
        ctx = t.context(batch)
        for image in t.images(batch, t.method.bank.views):
            t.bank.push(key=t.pair.embed_now(image), index=ctx.index_B, label=ctx.label_B)
    norm.discard(t.norms)


def _mix(t: Training, images: list[Tensor]) -> dict[int, tuple[Mixture, Pairs]]:
    """Append the plan's mixed views to the images; what each was mixed with, by the number of the view."""
    made = {}
    pairs = Pairs.draw(t.recipe.mix, rng.key(t.recipe.seed, "pairs", t.step), t.recipe.optim.batch, t.world)
    for source in t.plan.mixed:
        key = rng.key(t.recipe.seed, "mix", t.step, source)
        mixture = mix.draw(t.recipe.mix, key, t.plan.views[source].size)
        made[len(images)] = mixture, pairs
        images.append(mix.apply(images[source], mixture, pairs.partners(images[source])))
    return made


def _agree(t: Training, term: Term, query: dict[int, Emb], aims: dict[int, object], pos_B: Tensor, ctx: Context,
           mixtures: dict[int, tuple[Mixture, Pairs]]) -> Tensor:
    """One term's loss per row [b], with its share. A term of the partners stands in the partners' order."""
    emb, weight = query[term.query], term.share
    if term.role != "plain":
        mixture, pairs = mixtures[term.query]
        ctx = replace(ctx, kin=pairs.kin)
        weight *= mixture.lam if term.role == "own" else 1 - mixture.lam
        if term.role == "partner":
            emb = replace(emb, z=pairs.to_partner(emb.z), u=None if emb.u is None else pairs.to_partner(emb.u))
    return weight * t.method.agree(emb, aims[term.target], pos_B, ctx)


def _push(t: Training, ctx: Context) -> Ticket:
    """Feed the bank with the views that the method keeps; the ticket of the last one."""
    for view in t.method.bank.views:
        slots, target = None, ctx.targets[view]
        if t.method.bank.replace == "random":
            slots = t.bank.slots_at(rng.key(ctx.seed, "replace", ctx.step, view), t.recipe.optim.batch)
        more = t.method.columns(target, ctx) if isinstance(t.method, Remembering) else {}
        ticket = t.bank.push(slots, key=target.z.detach(), index=ctx.index_B, label=ctx.label_B, **more)
    return ticket


def _pointed(emb: Emb, mode: str) -> Emb:
    """An online embedding as a target: ``stop`` without gradient, ``same`` with it."""
    if mode == "same":
        return emb
    return replace(emb, z=emb.z.detach(), u=None if emb.u is None else emb.u.detach())


def _joined(parts: list[dict[int, Emb]]) -> dict[int, Emb]:
    """The targets of all micro-batches, in the order of the rank's rows."""
    if len(parts) == 1:
        return parts[0]
    return {v: replace(emb, z=torch.cat([part[v].z for part in parts]),
                       u=None if emb.u is None else torch.cat([part[v].u for part in parts]))
            for v, emb in parts[0].items()}


def _finite_gradients(t: Training) -> Tensor:
    """bool []: whether every averaged gradient is finite. Their bits are those of all ranks."""
    gradients = [p.grad for p in t.pair.online.parameters() if p.grad is not None]
    return nn.utils.get_total_norm(gradients, norm_type=float("inf")).isfinite()


def _raised(wrong: tuple[Tensor | bool, ...], device: torch.device) -> Tensor:
    """[flags] float32, in one transfer: flags that lie on the device, before those of the host."""
    there = [flag for flag in wrong if isinstance(flag, Tensor)]
    raised = torch.tensor([float(flag) for flag in wrong if not isinstance(flag, Tensor)])
    return torch.cat([torch.stack(there).float(), raised.to(device, non_blocking=True)])
