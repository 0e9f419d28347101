"""Where no official code exists: the papers' equations, as ``tests/equations`` writes them out, beside our steps.

NNCLR: Algorithm 1 as a script of its own, with its networks, bank and SGD, beside ours. BSIM: equations 1 and 2
(SimCLR), 3 (MoCo v2) and 4 (BYOL), whose loss is computed from our networks as they stand before each step.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch

from benchmarks.official_code import Clone
from hpcssl import rng
from hpcssl.nets import norm
from hpcssl.views import mix

TESTS = Clone(Path(__file__).resolve().parents[1] / "tests" / "equations")
Make = Callable[[str, list[str]], object]  # a run of ours, from a recipe's name and overrides
# each gives, after every step, what is compared: ours and the equation's, by kind and name


def nnclr(make: Make, steps: int) -> Iterator[tuple[dict, dict]]:
    ours, theirs = (make("digits_nnclr", []) for _ in range(2))
    script = TESTS.load("test_scripts.py").NnclrScript(theirs)
    for step in range(steps):
        batch = ours.batch(step)
        mine = ours.step(batch)
        loss = torch.tensor(script.step(batch), dtype=torch.float64)
        yield mine, {"loss": {"": loss}, "bank": {"": torch.stack(script.bank)},
                     "pointer": {"": torch.tensor(script.pointer)},
                     "online parameters": dict(script.f.named_parameters())}


def bsim_simclr(make: Make, steps: int) -> Iterator[tuple[dict, dict]]:
    tests = TESTS.load("test_mix.py")
    ours = make("digits_simclr", ["mix.kind=cutmix", "mix.pairing=flip", "method.reduction=mean", "method.tau=0.2"])
    return _losses(ours, steps, tests, partial(tests.test_simclr_against_equations_1_and_2, pairing="flip"))


def bsim_moco(make: Make, steps: int) -> Iterator[tuple[dict, dict]]:
    tests = TESTS.load("test_mix.py")
    return _losses(make("digits_moco_v2", ["mix.kind=cutmix", "method.tau=0.2", "bank.start=random"]), steps, tests,
                   tests.test_moco_against_equation_3)


def bsim_byol(make: Make, steps: int) -> Iterator[tuple[dict, dict]]:
    tests = TESTS.load("test_mix.py")

    def equation_4(small_training):
        made = small_training()
        options, size = made.training.recipe.mix, made.training.plan.views[0].size
        mixtures = [mix.draw(options, tests.rng.key(0, "mix", 0, view), size) for view in (0, 1)]
        wanted = tests.literal_byol(made, mixtures, plain=False)
        assert made.step(made.batch(0)).scalars["loss"] == tests.pytest.approx(wanted)

    return _losses(make("digits_byol", ["mix.kind=cutmix"]), steps, tests, equation_4)


class _Noted:
    """What a test expects, noted in the place of a judgement."""

    def __init__(self, wanted: float, **_):
        self.wanted = float(wanted)

    def __eq__(self, _) -> bool:
        _Noted.last = self.wanted
        return True


class _Now:
    """Our run as a test's ``made``, whose batch 0 is the present one."""

    def __init__(self, ours):
        self.ours, self.training, self.now = ours, ours.training, 0

    def batch(self, _):
        return self.ours.batch(self.now)

    def step(self, batch):
        norm.discard(self.training.norms)  # of the passes that the equation asked for
        self.found = self.ours.step(batch)
        return SimpleNamespace(scalars={"loss": float(self.found["loss"][""])})


def _losses(ours, steps: int, tests: types.ModuleType, test: Callable) -> Iterator[tuple[dict, dict]]:
    """Run a test of the first step at each step: its batch 0 is the present one, and its mixtures are those of now."""
    made = _Now(ours)
    tests.rng = SimpleNamespace(**vars(rng) | {
        "key": lambda seed, what, _step, *view: rng.key(seed, what, made.now, *view)})
    tests.pytest = SimpleNamespace(approx=_Noted)
    for made.now in range(steps):
        test(lambda *_: made)
        yield made.found, {"loss": {"": torch.tensor(_Noted.last, dtype=torch.float64)}}


LITERAL = {"nnclr, Algorithm 1": nnclr, "bsim over simclr, equations 1 and 2": bsim_simclr,
           "bsim over moco_v2, equation 3": bsim_moco, "bsim over byol, equation 4": bsim_byol}
