"""Our methods compared with official code on the same tensors: ``python -m benchmarks official --repos DIR``.

DIR holds clones of the official repositories, each in a folder OWNER-NAME (``CASES`` lists them):

    git clone https://github.com/UMBCvision/MSF DIR/UMBCvision-MSF

For every method whose clone is there, both start from the same weights and the same bank, see the same images, and use
the same learning rates. The official run uses its own classes, its own ``train`` and the optimizer of its main.
After every step losses, bank and pointer, parameters and running statistics of both networks are compared: in float64
over all steps, in float32 after the first. The exit code is 1 if anything differs by more than the goal.

NNCLR and BSIM have no official code: their equations are compared with ours (``official_literal.py``).

``--recipes`` runs packaged recipes as shipped, with nothing changed but the sizes of networks, batches and banks, next
to the authors' training code (``official_recipes.py``), and prints "exact" or the first difference.
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
from benchmarks.official_code import Clone, OfficialRun
from benchmarks.official_literal import LITERAL
from benchmarks.official_methods import CASES, TIES, Case
from benchmarks.official_recipes import RECIPE_STEPS_PER_EPOCH, RECIPES, shrink
from hpcssl import rng
from hpcssl.data.batch import Batch
from hpcssl.distributed.world import World
from hpcssl.errors import DataError, HpcsslError
from hpcssl.train import recipe
from hpcssl.train.step import train_step
from hpcssl.train.train_state import TrainState

GOALS = {"fp64": 1e-8, "fp32": 1e-5}
DTYPES = {"fp64": torch.float64, "fp32": torch.float32}
PER_EPOCH, CLASSES = 5, 8
COMMON = [
    "optim.batch=16",
    "bank.size=48",  # less than the images: no image is in it twice
    "views.size=16",
    "optim.lr=0.05",
    "schedule.interval=epoch",
    "model.norm=sync",
    "model.projector.out=32",
    "model.predictor.out=32",
    # the layout of official code: in float32 another rounding next to the kink of a ReLU gives another gradient
    "machine.channels_last=false",
]


class Ours:
    """Our run on tensors in memory, without a run folder.

    Args:
        name: The recipe.
        overrides: What differs from it.
        precision: ``fp64`` or ``fp32``.
        per_epoch: Steps per epoch.
    """

    def __init__(self, name: str, overrides: list[str], precision: str, per_epoch: int):
        resolved = recipe.compose(name, [*overrides, f"optim.precision={precision}"])
        self.batch_size, self.per_epoch = resolved.optim.batch, per_epoch
        self.image_count = per_epoch * self.batch_size
        self.order = rng.permutation(rng.key(0, "order"), self.image_count)
        labels = np.empty(self.image_count, np.int64)
        labels[self.order] = np.arange(self.image_count) % CLASSES  # the same number of each class in every batch
        self.training = TrainState(
            resolved, World.single_process(), steps_per_epoch=per_epoch, labels=labels, data_digest="benchmark"
        )
        self.training.images = lambda batch: batch.images
        self.labels = labels

    def batch(self, step: int) -> Batch:
        """Return the batch of a step, the same for every method: a smooth image plus noise per view.

        All epochs have the same order.
        """
        (epoch, position), rows, dtype = divmod(step, self.per_epoch), self.batch_size, self.training.dtype
        index = self.order[position * rows : (position + 1) * rows]
        base = torch.randn(self.image_count, 3, 4, 4, generator=rng.generator(rng.key(0, "pictures")))[index]
        images = []
        for number, view in enumerate(self.training.plan.views):
            draw = rng.generator(rng.key(0, "noise", step, number))
            noise = torch.randn(rows, 3, view.size, view.size, generator=draw)
            images.append((F.interpolate(base, view.size, mode="bilinear") + 0.5 * noise).to(dtype))
        return Batch(step, epoch, index, self.labels[index], images, [])

    def step(self, batch: Batch, *, average_after_step: bool = False) -> dict[str, dict[str, Tensor]]:
        """Take a step; returns all compared tensors by kind and name.

        The moving average is that which the step used, or with ``average_after_step`` that which it left behind.
        """
        pair, bank, memories = self.training.pair, self.training.bank, self.training.memories
        used = {}
        if pair.target is not None and not average_after_step:
            used = {n: p.clone() for n, p in pair.target.named_parameters()}
        loss = train_step(self.training, batch).scalars["loss"]
        found = {"loss": {"": loss}} | _halves("online", official_code.weights(pair.online))
        if pair.target is not None:
            found |= _halves("target", official_code.weights(pair.target) | used)
        if bank is not None:
            found |= {"bank": {"": bank.all_rows("key")}, "pointer": {"": torch.tensor(bank.pointer)}}
            found |= {
                f"bank's {name}": {"": bank.all_rows(name)}
                for name in ("label", "previous_epoch", "group", "second_view")
                if name in bank.columns
            }
        if "embedding_table" in memories:
            found["embedding_table"] = {"": memories["embedding_table"].all_rows()[0]}
        if "clusters" in memories:  # before the first clustering theirs are all 0
            found["clusters"] = {"": memories["clusters"].cluster_of(torch.arange(self.image_count)).clamp(min=0)}
        if "labeled" in memories:
            found["labeled"] = {"": memories["labeled"].known_rows()[0]}
            found["head"] = {"": torch.cat([p.flatten() for p in memories["head"].net.parameters()])}
        return found


def _halves(kind: str, tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    found = {f"{kind} parameters": {}, f"{kind} statistics": {}}
    for name, tensor in tensors.items():
        found[f"{kind} {'statistics' if 'running' in name else 'parameters'}"][name] = tensor
    return found


class Epoch:
    """In place of an official loader: the batches of one epoch; it records the official state after each of them."""

    def __init__(self, number: int, steps: int, ours: Ours, side: OfficialRun, losses: list[float], trace: list):
        self.steps = range(number * ours.per_epoch, min(steps, (number + 1) * ours.per_epoch))
        self.ours, self.side, self.losses, self.trace = ours, side, losses, trace

    def __len__(self) -> int:
        return self.ours.per_epoch

    def __iter__(self) -> Iterator[object]:
        for step in self.steps:
            yield self.side.form(self.ours.batch(step))
            self.trace.append(self._state(step))  # the official code asks for the next batch after its step

    def _state(self, step: int) -> dict[str, dict[str, Tensor]]:
        side = self.side
        side.finish_step()
        found = {"loss": {"": torch.tensor(self.losses[-1] + side.loss_offset, dtype=torch.float64)}}
        found |= _halves("online", side.tensors(side.names))
        if side.slow:
            found |= _halves("target", side.tensors(side.slow))
        if side.bank is not None:
            rows, pointer = side.bank()
            found |= {"bank": {"": rows}, "pointer": {"": torch.tensor(pointer)}}
        found |= {kind: {"": tensor} for kind, tensor in side.extra(step).items()}
        return {kind: {n: t.detach().clone() for n, t in tensors.items()} for kind, tensors in found.items()}


def max_differences(ours: dict[str, dict[str, Tensor]], theirs: dict[str, dict[str, Tensor]]) -> dict[str, float]:
    """Return the largest difference of each kind that they have. A tensor of ours that they lack is an error."""
    found = {}
    for kind, tensors in theirs.items():
        missing = ours[kind].keys() - tensors.keys()
        if missing:
            raise DataError(
                f"{kind} of the official run",
                got=f"no {sorted(missing)[0]}",
                expected="a tensor for each of ours",
                fix="use the commit that the results name",
            )
        found[kind] = max(
            float((t - tensors[name]).detach().abs().nan_to_num(torch.inf).max()) for name, t in ours[kind].items()
        )
    return found


def compare(case: Case, clone: Clone, ours: Ours, steps: int) -> list[dict[str, float]]:
    """Return the differences after each step."""
    losses, trace = [], []
    torch.manual_seed(0)  # official code draws from the global generator
    with official_code.single_process(losses, ties=TIES in case.notes):
        with official_code.default_dtype(ours.training.dtype):
            side = case.build(clone, ours.training, torch.from_numpy(ours.order))
        side.take_weights(ours.training)
        for number in range(-(-steps // ours.per_epoch)):
            side.epoch(number, Epoch(number, steps, ours, side, losses, trace))
    loss_range = max(s["loss"][""] for s in trace) - min(s["loss"][""] for s in trace)
    if steps > 1 and not loss_range > 1e-3:
        raise DataError(
            "the official run",
            got=f"a loss that changes by {float(loss_range):.1e} in {steps} steps",
            expected="a loss that changes",
            fix="check its learning rate: runs that do not learn prove nothing",
        )
    after = side.average_after_step
    return [
        max_differences(ours.step(ours.batch(step), average_after_step=after), found)
        for step, found in enumerate(trace)
    ]


def summary(found: dict[str, list[dict[str, float]]]) -> dict[str, float]:
    """Return the largest difference of each kind: in float64 over all steps, in float32 after the first."""
    kinds = dict.fromkeys((precision, kind) for precision, steps in found.items() for step in steps for kind in step)
    return {
        f"{precision} {kind}": max(step[kind] for step in found[precision] if kind in step) for precision, kind in kinds
    }


def verdict(rows: dict[str, float]) -> str:
    wrong = [name for name, gap in rows.items() if not gap <= GOALS[name.split()[0]]]
    return "differs: " + ", ".join(wrong) if wrong else "agrees"


def make_small(name: str, overrides: list[str], *, precision: str, steps: int) -> Ours:
    """Return our run of a digits recipe with small networks, whose schedule ends with the comparison."""
    epochs = -(-steps // PER_EPOCH)
    return Ours(name, [*COMMON, f"schedule.epochs={epochs}", *overrides], precision, PER_EPOCH)


def measure(name: str, repos: Path, steps: int) -> tuple[dict[str, list[dict[str, float]]], dict]:
    """Return the differences by precision and step, and the official files and changes."""
    found, about = {}, {}
    for precision in GOALS:
        count = steps if precision == "fp64" else 1
        make = partial(make_small, precision=precision, steps=count)
        if name in LITERAL:
            found[precision] = [max_differences(*pair) for pair in LITERAL[name](make, count)]
        else:
            case = CASES[name]
            clone = Clone(repos.resolve() / case.clone)
            found[precision] = compare(case, clone, make(case.recipe, list(case.overrides)), count)
            about = {"clone": case.clone, "files": clone.digests, "notes": list(case.notes)}
    return found, about


def measure_recipe(name: str, repos: Path, steps: int) -> dict:
    """Run a packaged recipe as shipped, with small networks, next to its original; returns a verdict and the files."""
    case = RECIPES[name]
    clone = Clone(repos.resolve() / case.clone)
    ours = Ours(name, [*shrink(name), *case.overrides], "fp64", RECIPE_STEPS_PER_EPOCH)
    differences = compare(case, clone, ours, steps)
    verdict = f"exact: the largest difference of {steps} steps is {max(max(d.values()) for d in differences):.1e}"
    for step, kinds in enumerate(differences):
        wrong = {kind: gap for kind, gap in kinds.items() if not gap <= GOALS["fp64"]}
        if wrong:
            kind = max(wrong, key=wrong.get)
            verdict = f"differs first at step {step + 1}: {kind} by {wrong[kind]:.1e}"
            break
    return {"verdict": verdict, "clone": case.clone, "files": clone.digests, "notes": list(case.notes)}


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.official", description=__doc__.splitlines()[0])
    parser.add_argument("--repos", type=Path, required=True, help="folder of clones, each named OWNER-NAME")
    parser.add_argument("--recipes", action="store_true", help="compare packaged recipes as shipped, in float64")
    parser.add_argument("--steps", type=int, default=None, help="steps in float64 (50; with --recipes 30)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only these methods or recipes")
    parser.add_argument("--out", type=Path, default=None, help="write the figures here as JSON")
    options = parser.parse_args()
    steps = options.steps or (30 if options.recipes else 50)
    if steps < 1:
        parser.error(f"--steps {steps}: expected 1 or more")
    cases = dict(RECIPES) if options.recipes else CASES | dict.fromkeys(LITERAL)
    unknown = sorted(set(options.only or []) - cases.keys())
    if unknown:
        parser.error(f"--only {unknown[0]}: expected some of {', '.join(cases)}")
    torch.set_num_threads(1)
    if not options.repos.is_dir():
        raise DataError(
            f"--repos {options.repos}",
            got="no such folder",
            expected="a folder of clones",
            fix="clone " + ", ".join(sorted({case.clone for case in cases.values() if case})) + " into it",
        )
    body = {}
    for name in options.only or cases:
        case = cases[name]
        missing = [c for c in (case.clone, *case.more_clones) if not (options.repos / c).is_dir()] if case else []
        if missing:
            print(f"{name}: skipped, there is no folder {missing[0]} in {options.repos}", file=sys.stderr)
        elif options.recipes:
            body[name] = measure_recipe(name, options.repos, steps)
        else:
            found, about = measure(name, options.repos, steps)
            rows = summary(found)
            body[name] = {"verdict": verdict(rows)} | {key: float(f"{gap:.2g}") for key, gap in rows.items()} | about
    if not body:
        raise DataError(
            f"--repos {options.repos}",
            got="none of the required clones",
            expected="folders named OWNER-NAME",
            fix="clone " + next(case.clone for case in cases.values() if case) + " into it",
        )
    title = f"largest differences over {steps} steps in float64 (goal 1e-8)"
    if options.recipes:
        title = f"packaged recipes next to their originals, {steps} steps in float64 (goal 1e-8)"
    else:
        title += " and after the first in float32 (goal 1e-5)"
    common.report("official recipes" if options.recipes else "official", title, body, options.out)
    return int(any(not rows["verdict"].startswith(("agrees", "exact")) for rows in body.values()))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except HpcsslError as error:
        sys.exit(f"benchmarks.official: {error}")
