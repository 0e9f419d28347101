"""One step of any method: encode, aim, agree, backward, step, follow, push. It knows no method by name."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hpcssl import rng
from hpcssl.data.loader import Batch
from hpcssl.memory.bank import Ticket
from hpcssl.methods.base import Context, Emb, Remembering
from hpcssl.methods.diagnostics import spread
from hpcssl.nets import norm
from hpcssl.train.state import Training
from hpcssl.views import mix
from hpcssl.views.mix import Mixture
from hpcssl.views.plan import Term


@dataclass(frozen=True)
class Report:
    """What a step tells the loop: whether it was taken, the flags that some rank raised, scalars for the journal."""

    taken: bool
    flags: tuple[bool, ...]
    scalars: dict[str, Tensor | float]


def train_step(t: Training, batch: Batch, flags: tuple[bool, ...] = ()) -> Report:
    """Take step ``t.step + 1`` on this rank's part of the global batch, or agree with all ranks not to.

    ``flags`` are raised by any rank for all of them; they travel with the verdict on the loss, so that the world
    agrees once per step. A non-finite loss or target on one rank leaves parameters, target, bank and statistics
    untouched on every rank.
    """
    plan, bank = t.plan, t.method.bank
    images, ctx = t.images(batch), t.context(batch)
    remembers = isinstance(t.method, Remembering)
    if remembers and t.step % t.steps_per_epoch == 0:
        t.method.refresh(ctx)
    mixtures = _mix(t, images)
    lr, momentum = t.set_rates()

    target: dict[int, Emb] = {}
    aims: dict[int, object] = {}
    ticket = None
    if t.method.target == "ema":
        found = t.pair.embed_target([images[v] for v in plan.targets], t.shuffles(t.step))
        target = {v: Emb(z, view=v) for v, z in zip(plan.targets, found, strict=True)}
        ticket = _push(t, target, ctx) if bank and bank.push == "before" else None
        aims = {v: t.method.aim(emb, ctx) for v, emb in target.items()}

    losses: list[Tensor] = []
    seen = plan.queries if t.method.target == "ema" else tuple(sorted({*plan.queries, *plan.targets}))
    micros = torch.arange(len(batch.index), device=t.world.device).chunk(t.recipe.machine.accumulate)
    for pos_B in micros:
        last = len(losses) == len(micros) - 1
        with contextlib.nullcontext() if last else t.pair.no_sync():
            found = t.pair.embed([images[v][pos_B] for v in seen])
            query = {v: Emb(*emb, view=v) for v, emb in zip(seen, found, strict=True)}
            if t.method.target != "ema":  # one micro-batch: Training refuses more
                target = {v: Emb(_pointed(query[v].z, t.method.target), view=v) for v in plan.targets}
                ticket = _push(t, target, ctx) if bank and bank.push == "before" else None
                aims = {v: t.method.aim(emb, ctx) for v, emb in target.items()}
            loss_B = sum(_agree(t, term, query, aims, pos_B, ctx, mixtures) for term in plan.terms)
            loss = loss_B.mean() / len(micros)
            losses.append(loss.detach())
            if last:  # on its way while the backward pass runs
                verdict = t.world.maximum(_raised(sum(losses), target, flags))
            t.scaler.scale(loss).backward()

    poor, *raised = verdict.result().bool().tolist()
    if poor:
        if ticket is not None:
            t.bank.take_back(ticket)
        norm.discard(t.norms)
        t.optimizer.zero_grad()
        t.skipped_in_a_row += 1
    else:
        t.scaler.step(t.optimizer)
        t.scaler.update()
        t.optimizer.zero_grad()
        norm.commit(t.norms, t.world)
        t.pair.follow(momentum)
        if bank and bank.push == "after":
            _push(t, target, ctx)
        if remembers:
            t.method.after(target, ctx)
        t.skipped_in_a_row = 0
    t.step += 1
    if t.scaler.is_enabled():
        ctx.notes["scale"] = torch.tensor(t.scaler.get_scale())
    scalars = {"loss": sum(losses), "lr": lr, "ema": momentum, "spread": spread(target[plan.targets[0]].z), **ctx.notes}
    return Report(not poor, tuple(raised), scalars)


def _mix(t: Training, images: list[Tensor]) -> dict[int, Mixture]:
    """Append the plan's mixed views to the images; what each was mixed with, by the number of the view."""
    made = {}
    for source in t.plan.mixed:
        key = rng.key(t.recipe.seed, "mix", t.step, source)
        made[len(images)] = mix.draw(t.recipe.mix, key, t.plan.views[source].size)
        images.append(mix.apply(images[source], made[len(images)]))
    return made


def _agree(t: Training, term: Term, query: dict[int, Emb], aims: dict[int, object], pos_B: Tensor, ctx: Context,
           mixtures: dict[int, Mixture]) -> Tensor:
    """One term's loss per row [b], with its share."""
    if term.role == "plain":
        return term.share * t.method.agree(query[term.query], aims[term.target], pos_B, ctx)
    lam = mixtures[term.query].lam
    ctx = replace(ctx, partner_B=mix.partner_of(pos_B))
    where_B, weight = (pos_B, lam) if term.role == "own" else (ctx.partner_B, 1 - lam)
    return term.share * weight * t.method.agree(query[term.query], aims[term.target], where_B, ctx)


def _push(t: Training, target: dict[int, Emb], ctx: Context) -> Ticket:
    """Feed the bank with the views that the method keeps; the ticket of the last one."""
    for view in t.method.bank.views:
        slots = None
        if t.method.bank.replace == "random":
            slots = t.bank.slots_at(rng.key(ctx.seed, "replace", ctx.step, view), t.recipe.optim.batch)
        more = t.method.columns(target[view], ctx) if isinstance(t.method, Remembering) else {}
        ticket = t.bank.push(slots, key=target[view].z.detach(), index=ctx.index_B, label=ctx.label_B, **more)
    return ticket


def _pointed(z: Tensor, mode: str) -> Tensor:
    return z.detach() if mode == "stop" else z


def _raised(loss: Tensor, target: dict[int, Emb], flags: tuple[bool, ...]) -> Tensor:
    """[1 + flags] float32: whether something is not finite here, and this rank's flags. A row of the target that is
    not finite has no neighbours and costs nothing, so that the loss alone would not tell of it."""
    raised = torch.tensor([False, *flags], dtype=torch.float32).to(loss.device, non_blocking=True)
    raised[0] = ~torch.stack([loss.isfinite(), *(emb.z.isfinite().all() for emb in target.values())]).all()
    return raised
