"""Ours beside official code on the same tensors: ``python -m benchmarks official --repos DIR [--steps 50]``.

DIR holds clones of the official repositories, each in a folder OWNER-NAME (``CASES`` says which):

    git clone https://github.com/UMBCvision/MSF DIR/UMBCvision-MSF

For every method whose clone is there, both sides start from the same weights and the same bank, see the same images,
and step at the same rates; the official side runs its own classes, its own ``train`` and the optimiser of its main.
After every step losses, bank and pointer, parameters and running statistics of both networks are compared: float64
over all steps, float32 after the first. Exit 1 if anything differs by more than the goal.

NNCLR and BSIM have no official code: their equations, as the tests write them out, are evaluated beside ours
(``official_literal.py``).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import common, official_code
from benchmarks.official_code import Clone, Side
from benchmarks.official_literal import LITERAL
from benchmarks.official_methods import CASES, TIES, Case
from hpcssl import rng
from hpcssl.data.loader import Batch
from hpcssl.errors import DataError, HpcsslError
from hpcssl.train import recipe
from hpcssl.train.state import Training
from hpcssl.train.step import train_step
from hpcssl.world import World

GOALS = {"fp64": 1e-8, "fp32": 1e-5}
DTYPES = {"fp64": torch.float64, "fp32": torch.float32}
BATCH, PER_EPOCH, BANK, CLASSES, SIZE = 16, 5, 48, 8, 16
IMAGES = BATCH * PER_EPOCH  # more than the bank holds: no image stands in it twice
COMMON = [f"optim.batch={BATCH}", f"bank.size={BANK}", f"views.size={SIZE}", "optim.lr=0.05", "schedule.per=epoch",
          "model.norm=whole", "model.projector.out=32", "model.predictor.out=32",
          # official code's layout: next to the kink of a ReLU another rounding, in float32, is another gradient
          "machine.channels_last=false"]


class Ours:
    """A run of ours on given tensors, without a run folder."""

    def __init__(self, name: str, overrides: list[str], precision: str, steps: int):
        epochs = -(-steps // PER_EPOCH)
        made = recipe.compose(name, [*COMMON, f"optim.precision={precision}", f"schedule.epochs={epochs}", *overrides])
        self.order = rng.permutation(rng.key(0, "order"), IMAGES)
        labels = np.empty(IMAGES, np.int64)
        labels[self.order] = np.arange(IMAGES) % CLASSES  # as many of each class in every batch
        self.training = Training(made, World.alone(), steps_per_epoch=PER_EPOCH, labels=labels, data_digest="given")
        self.training.images = lambda batch: batch.images
        self.labels = labels

    def batch(self, step: int) -> Batch:
        """Step ``step``'s images, the same for every method: a picture per image and noise per view. All epochs run
        in one order."""
        place, dtype = step % PER_EPOCH, self.training.dtype
        index = self.order[place * BATCH:(place + 1) * BATCH]
        base = torch.randn(IMAGES, 3, 4, 4, generator=rng.generator(rng.key(0, "pictures")))[index]
        images = []
        for number, view in enumerate(self.training.plan.views):
            draw = rng.generator(rng.key(0, "noise", step, number))
            noise = torch.randn(BATCH, 3, view.size, view.size, generator=draw)
            images.append((F.interpolate(base, view.size, mode="bilinear") + 0.5 * noise).to(dtype))
        return Batch(step, step // PER_EPOCH, index, self.labels[index], images, [])

    def step(self, batch: Batch) -> dict[str, dict[str, Tensor]]:
        """Take a step; everything that is compared, by kind and name. The target is the one that the step used."""
        pair, bank, memories = self.training.pair, self.training.bank, self.training.memories
        used = {} if pair.target is None else {n: p.clone() for n, p in pair.target.named_parameters()}
        loss = train_step(self.training, batch).scalars["loss"]
        found = {"loss": {"": loss}} | _halves("online", official_code.weights(pair.online))
        if pair.target is not None:
            found |= _halves("target", official_code.weights(pair.target) | used)
        if bank is not None:
            found |= {"bank": {"": bank.everything("key")}, "pointer": {"": torch.tensor(bank.pointer)}}
            found |= {f"bank's {name}": {"": bank.everything(name)} for name in ("label", "twin", "group", "other")
                      if name in bank.columns}
        if "ledger" in memories:
            found["ledger"] = {"": memories["ledger"].everything()[0]}
        if "groups" in memories:  # where ours knows no cluster yet, theirs are all one
            found["clusters"] = {"": memories["groups"].of(torch.arange(IMAGES)).clamp(min=0)}
        if "labelled" in memories:
            found["labelled"] = {"": memories["labelled"].known()[0]}
            found["head"] = {"": torch.cat([p.flatten() for p in memories["head"].net.parameters()])}
        return found


def _halves(kind: str, tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    found = {f"{kind} parameters": {}, f"{kind} statistics": {}}
    for name, tensor in tensors.items():
        found[f"{kind} {'statistics' if 'running' in name else 'parameters'}"][name] = tensor
    return found


class Epoch:
    """An official loader's place: batches of one epoch, after each of which the official side's state is kept."""

    def __init__(self, number: int, steps: int, ours: Ours, side: Side, losses: list[float], trace: list):
        self.steps = range(number * PER_EPOCH, min(steps, (number + 1) * PER_EPOCH))
        self.ours, self.side, self.losses, self.trace = ours, side, losses, trace

    def __len__(self) -> int:
        return PER_EPOCH

    def __iter__(self) -> Iterator[object]:
        for step in self.steps:
            yield self.side.form(self.ours.batch(step))
            self.trace.append(self._state(step))  # asked for the next batch, it has taken the step

    def _state(self, step: int) -> dict[str, dict[str, Tensor]]:
        side = self.side
        side.settle()
        found = {"loss": {"": torch.tensor(self.losses[-1], dtype=torch.float64)}}
        found |= _halves("online", side.tensors(side.names))
        if side.slow:
            found |= _halves("target", side.tensors(side.slow))
        if side.bank is not None:
            rows, pointer = side.bank()
            found |= {"bank": {"": rows}, "pointer": {"": torch.tensor(pointer)}}
        found |= {kind: {"": tensor} for kind, tensor in side.extra(step).items()}
        return {kind: {n: t.detach().clone() for n, t in tensors.items()} for kind, tensors in found.items()}


def gaps(ours: dict[str, dict[str, Tensor]], theirs: dict[str, dict[str, Tensor]]) -> dict[str, float]:
    """The largest difference of each kind that they have. A tensor of ours that they lack is an error."""
    found = {}
    for kind, tensors in theirs.items():
        missing = ours[kind].keys() - tensors.keys()
        if missing:
            raise DataError(f"the official side's {kind}", got=f"no {sorted(missing)[0]}",
                            expected="a tensor for each of ours", mend="use the commit that the results name")
        found[kind] = max(float((t - tensors[name]).detach().abs().nan_to_num(torch.inf).max())
                          for name, t in ours[kind].items())
    return found


def beside(case: Case, clone: Clone, precision: str, steps: int) -> list[dict[str, float]]:
    """The gaps after each step."""
    ours = Ours(case.recipe, list(case.overrides), precision, steps)
    losses, trace = [], []
    torch.manual_seed(0)  # official code draws from the global generator
    with official_code.one_process(losses, ties=TIES in case.notes):
        with official_code.default_dtype(DTYPES[precision]):
            side = case.build(clone, ours.training, torch.from_numpy(ours.order))
        side.take_weights(ours.training)
        for number in range(-(-steps // PER_EPOCH)):
            side.epoch(number, Epoch(number, steps, ours, side, losses, trace))
    moved = max(s["loss"][""] for s in trace) - min(s["loss"][""] for s in trace)
    if steps > 1 and not moved > 1e-3:
        raise DataError("the official side", got=f"a loss that moves by {float(moved):.1e} in {steps} steps",
                         expected="one that moves", mend="look at its rates: equal standstill proves nothing")
    return [gaps(ours.step(ours.batch(step)), found) for step, found in enumerate(trace)]


def summary(found: dict[str, list[dict[str, float]]]) -> dict[str, float]:
    """The largest gap of each kind: in float64 over all steps, in float32 after the first."""
    kinds = dict.fromkeys((precision, kind) for precision, steps in found.items() for step in steps for kind in step)
    return {f"{precision} {kind}": max(step[kind] for step in found[precision] if kind in step)
            for precision, kind in kinds}


def verdict(rows: dict[str, float]) -> str:
    wrong = [name for name, gap in rows.items() if not gap <= GOALS[name.split()[0]]]
    return "differs: " + ", ".join(wrong) if wrong else "agrees"


def figures(name: str, repos: Path, steps: int) -> tuple[dict[str, list[dict[str, float]]], dict]:
    """The gaps by precision and step, and what was loaded and shimmed for them."""
    found, about = {}, {}
    for precision in GOALS:
        many = steps if precision == "fp64" else 1
        if name in LITERAL:
            make = partial(Ours, precision=precision, steps=many)
            found[precision] = [gaps(*both) for both in LITERAL[name](make, many)]
        else:
            clone = Clone(repos.resolve() / CASES[name].clone)
            found[precision] = beside(CASES[name], clone, precision, many)
            about = {"clone": CASES[name].clone, "files": clone.digests, "notes": list(CASES[name].notes)}
    return found, about


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.official", description=__doc__.splitlines()[0])
    parser.add_argument("--repos", type=Path, required=True, help="folder of clones, each named OWNER-NAME")
    parser.add_argument("--steps", type=int, default=50, help="in float64")
    parser.add_argument("--only", choices=[*CASES, *LITERAL], nargs="+", metavar="METHOD", help="these alone")
    parser.add_argument("--out", type=Path, default=None, help="write the figures here as JSON")
    options = parser.parse_args()
    if options.steps < 1:
        parser.error(f"--steps {options.steps}: 1 or more")
    torch.set_num_threads(1)
    if not options.repos.is_dir():
        raise DataError(f"--repos {options.repos}", got="no such folder", expected="a folder of clones",
                        mend="clone " + ", ".join(sorted({case.clone for case in CASES.values()})) + " into it")
    body = {}
    for name in options.only or [*CASES, *LITERAL]:
        if name in CASES and not (options.repos / CASES[name].clone).is_dir():
            print(f"{name}: left out, no folder {CASES[name].clone} in {options.repos}", file=sys.stderr)
            continue
        found, about = figures(name, options.repos, options.steps)
        rows = summary(found)
        body[name] = {"verdict": verdict(rows)} | {key: float(f"{gap:.2g}") for key, gap in rows.items()} | about
    if not body:
        raise DataError(f"--repos {options.repos}", got="none of the clones that were asked for",
                        expected="folders named OWNER-NAME", mend="clone " + CASES[options.only[0]].clone + " into it")
    common.report("official", f"largest differences over {options.steps} steps in float64 (goal 1e-8) and after the "
                  "first in float32 (goal 1e-5)", body, options.out)
    return int(any(rows["verdict"] != "agrees" for rows in body.values()))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except HpcsslError as error:
        sys.exit(f"benchmarks.official: {error}")
