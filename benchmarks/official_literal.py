"""Methods without official code: our steps compared with the equations of the papers, written out.

NNCLR: Algorithm 1 as a separate script, with its own networks, bank and SGD. BSIM: equations 1 and 2 (SimCLR), 3 (MoCo
v2) and 4 (BYOL), whose loss is computed from our networks before each step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from hpcssl import rng
from hpcssl.nets import norm
from hpcssl.train.train_state import TrainState
from hpcssl.views import mix

TAU = 0.2
Make = Callable[[str, list[str]], object]  # makes our run from the name of a recipe and overrides
# each function yields, after every step, our tensors and those of the equation, by kind and name


def nnclr(make: Make, steps: int) -> Iterator[tuple[dict, dict]]:
    ours, theirs = (make("digits_nnclr", []) for _ in range(2))
    t, rows = theirs.training, theirs.batch_size
    recipe, f = t.recipe, t.pair.online
    bank, pointer = t.bank.all_rows("key").clone(), 0
    sgd = torch.optim.SGD(
        f.parameters(), lr=recipe.optim.lr, momentum=recipe.optim.momentum, weight_decay=recipe.optim.weight_decay
    )

    def nearest(z: Tensor) -> Tensor:
        return bank[torch.cdist(F.normalize(z.detach(), dim=1), bank).argmin(1)]

    def one(nn: Tensor, p: Tensor) -> Tensor:
        return F.cross_entropy(nn @ F.normalize(p, dim=1).T / recipe.method.temperature, torch.arange(rows))

    for step in range(steps):
        batch = ours.batch(step)
        mine = ours.step(batch)
        (z1, p1), (z2, p2) = ((z, f.predictor(z)) for z in (f.projector(f.backbone(x)) for x in batch.images))
        loss = one(nearest(z1), p2) / 2 + one(nearest(z2), p1) / 2
        sgd.param_groups[0]["lr"] = (
            recipe.optim.lr * (1 + math.cos(math.pi * (step // t.steps_per_epoch) / recipe.schedule.epochs)) / 2
        )
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        bank[pointer : pointer + rows] = F.normalize(z1.detach(), dim=1)
        pointer = (pointer + rows) % len(bank)
        found = {"loss": {"": loss.detach()}, "bank": {"": bank.clone()}, "pointer": {"": torch.tensor(pointer)}}
        yield mine, found | {"online parameters": {name: p.detach() for name, p in f.named_parameters()}}


def bsim_simclr(make: Make, steps: int) -> Iterator[tuple[dict, dict]]:
    overrides = ["mix.kind=cutmix", "mix.pairing=flip", "method.reduction=mean", f"method.temperature={TAU}"]
    return _losses(make("digits_simclr", overrides), steps, _equations_1_and_2)


def bsim_moco(make: Make, steps: int) -> Iterator[tuple[dict, dict]]:
    overrides = ["mix.kind=cutmix", f"method.temperature={TAU}", "bank.init=random"]
    return _losses(make("digits_moco_v2", overrides), steps, _equation_3)


def bsim_byol(make: Make, steps: int) -> Iterator[tuple[dict, dict]]:
    return _losses(make("digits_byol", ["mix.kind=cutmix"]), steps, _equation_4)


def _equations_1_and_2(t: TrainState, images: list[Tensor], mixture: mix.Mixture) -> float:
    """Both parents are positive over one denominator; mixtures that show one of them are no negatives."""
    count, total = len(images[0]), 0.0
    other = list(reversed(range(count)))
    clean = [z for z, _ in t.pair.embed(images)]
    mixed = [z for z, _ in t.pair.embed([mix.mix_images(x, mixture, x[other]) for x in images])]
    for view in (0, 1):
        close, among = ((mixed[view] @ rows.T / TAU).exp() for rows in (clean[1 - view], mixed[view]))
        for i in range(count):
            j = other[i]
            negatives = sum(float(among[i, k]) for k in range(count) if not {k, other[k]} & {i, j})
            denominator = float(close[i].sum()) + negatives
            for share, k in ((mixture.lam, i), (1 - mixture.lam, j)):
                total -= share * math.log(float(close[i, k]) / denominator)
    return total / (2 * count)


def _equation_3(t: TrainState, images: list[Tensor], mixture: mix.Mixture) -> float:
    """λ times InfoNCE with the own key and 1 - λ times that with the partner's, on the bank before the step."""
    (query, key), other, total = images, torch.arange(len(images[0])) ^ 1, 0.0
    ((q, _),) = t.pair.embed([mix.mix_images(query, mixture, query[other])])
    (k,) = t.pair.embed_target([key])
    queue = (q @ t.bank.all_rows("key").T / TAU).exp().sum(1)
    for share, keys in ((mixture.lam, k), (1 - mixture.lam, k[other])):
        positive = ((q * keys).sum(1) / TAU).exp()
        total -= share * float((positive / (positive + queue)).log().mean())
    return total


def _equation_4(t: TrainState, images: list[Tensor], mixture: mix.Mixture) -> float:
    """As squared distances, which adds 2 for each of the two directions."""
    other, total = torch.arange(len(images[0])) ^ 1, 0.0
    queries = [u for _, u in t.pair.embed([mix.mix_images(x, mixture, x[other]) for x in images])]
    for query, target in zip(queries, reversed(t.pair.embed_target(images)), strict=True):
        for share, goal in ((mixture.lam, target), (1 - mixture.lam, target[other])):
            total += share * float((2 - 2 * (query * goal).sum(1)).mean())
    return total


def _losses(ours: object, steps: int, equation: Callable) -> Iterator[tuple[dict, dict]]:
    """Compare the loss of each step with an equation on the same networks, images and mixture."""
    t = ours.training
    for step in range(steps):
        batch, size = ours.batch(step), t.plan.views[0].size
        mixture = mix.draw_mixture(t.recipe.mix, rng.key(t.recipe.seed, "mix", step, 0), size)
        with torch.no_grad():
            wanted = equation(t, list(batch.images), mixture)
        norm.discard_pending(t.norms)
        yield ours.step(batch), {"loss": {"": torch.tensor(wanted, dtype=torch.float64)}}


LITERAL = {
    "nnclr, Algorithm 1": nnclr,
    "bsim over simclr, equations 1 and 2": bsim_simclr,
    "bsim over moco_v2, equation 3": bsim_moco,
    "bsim over byol, equation 4": bsim_byol,
}
