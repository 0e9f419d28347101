"""Each method learns from real scans, and the criterion rejects models that do not learn.

The measure is taken on scans that training never saw, before and after training, on the same augmented views: one view
of each scan goes through the online network, the other through the target network. The *rank* of a scan is the share of
the other scans' targets that are less similar to its prediction than its own target is. A model that cannot tell scans
apart has a mean rank of 0.5, whether its embeddings are collapsed or its predictions carry no information.

The k nearest neighbors of the backbone's features are not a measure of learning here: the running statistics of the
batch norms alone raise their accuracy from 0.74 to 0.80 with unchanged weights, which is more than most methods add
to it within these few steps.
"""

import math
from typing import NamedTuple

import numpy as np
import pytest
import torch

from data_prep.sources import digits
from hpcssl.data.loader import Loader
from hpcssl.data.order import Order, SequentialOrder
from hpcssl.data.reader import Reader
from hpcssl.distributed.world import World
from hpcssl.methods import equations
from hpcssl.methods.simsiam import SimSiam
from hpcssl.nets import norm
from hpcssl.train import recipe
from hpcssl.train.step import train_step
from hpcssl.train.train_state import TrainState
from hpcssl.views.augment import AUGMENTATIONS, ViewSpec, augment_batch

BATCH, BANK, TRAIN = 64, 128, 480
LAST = 4  # final values are means over the last steps
AUGMENT = AUGMENTATIONS["digits"]


class Measured(NamedTuple):
    """One method's values over the runs of the table below: (mean, standard deviation, lowest).

    Attributes:
        steps: Number of training steps of each run.
        gain: Rise of the mean rank.
        fall: Fall of the loss from the first steps to the last.
        spread: The spread of the embeddings that the last steps report.
        information: How far the loss ends below that of predictions without information. None for distances, which
            predicting the mean direction already lowers.
    """

    steps: int
    gain: tuple[float, float, float]
    fall: tuple[float, float, float]
    spread: tuple[float, float, float]
    information: tuple[float, float, float] | None = None


# Each row: steps, then (mean, standard deviation, lowest) of each column over n runs. n = 3: seeds 0, 1 and 2 for SwAV,
# NNCLR and NNSiam, otherwise seeds 0 and 1, all under AVX-512, and seed 0 under AVX2 (ATEN_CPU_CAPABILITY=avx2
# ONEDNN_MAX_CPU_ISA=AVX2 MKL_CBWR=AVX2). n = 4: seeds 0, 1 and 2 under AVX-512, and seed 0 under AVX2.
MEASURED = {
    "msf": Measured(160, (0.211, 0.0367, 0.179), (1.289, 0.1330, 1.116), (0.803, 0.0643, 0.749)),  # n = 4
    "byol": Measured(160, (0.313, 0.0048, 0.309), (2.838, 0.0337, 2.799), (0.872, 0.0056, 0.866)),  # n = 3
    "nnclr": Measured(
        160, (0.381, 0.0263, 0.354), (1.302, 0.1948, 1.100), (1.000, 0.0010, 0.999), (1.179, 0.2122, 0.969)
    ),  # n = 3
    "swav": Measured(
        80, (0.246, 0.0180, 0.225), (0.344, 0.0137, 0.332), (0.899, 0.0075, 0.894), (0.287, 0.0070, 0.279)
    ),  # n = 3
    "nnsiam": Measured(80, (0.246, 0.0404, 0.211), (0.541, 0.0593, 0.488), (0.992, 0.0158, 0.974)),  # n = 3
    "cmsf_2q": Measured(160, (0.186, 0.0332, 0.155), (1.203, 0.1554, 0.977), (0.802, 0.0587, 0.752)),  # n = 4
    "cmsf_km": Measured(160, (0.198, 0.0360, 0.168), (1.280, 0.1473, 1.068), (0.796, 0.0564, 0.747)),  # n = 4
    "cmsf_sup": Measured(160, (0.209, 0.0492, 0.158), (1.339, 0.0704, 1.238), (0.840, 0.0230, 0.819)),  # n = 4
    "cmsf_semi": Measured(160, (0.250, 0.0250, 0.228), (1.192, 0.0927, 1.096), (0.857, 0.0142, 0.844)),  # n = 4
    "cmsf_cross": Measured(160, (0.254, 0.1074, 0.130), (2.566, 0.0924, 2.461), (0.855, 0.0425, 0.806)),  # n = 3
    "simsiam": Measured(40, (0.231, 0.0238, 0.200), (0.393, 0.0203, 0.371), (0.996, 0.0083, 0.985)),  # n = 4
    "moco_v2": Measured(
        40, (0.170, 0.0082, 0.161), (0.531, 0.0985, 0.401), (0.590, 0.0536, 0.545), (0.586, 0.1136, 0.454)
    ),  # n = 4
    "simclr": Measured(
        40, (0.283, 0.0108, 0.271), (1.359, 0.1173, 1.272), (0.856, 0.0771, 0.790), (1.361, 0.1612, 1.217)
    ),  # n = 4
}
# A method has to reach its mean less K standard deviations, and never less than chance gives (below). The standard
# deviation is that of its row or that of all rows pooled, whichever is larger: three or four runs can underestimate it.
#
# False alarms, if values are normal. (1) Unchanged code has other values only where a CPU rounds differently. Between
# AVX-512 and AVX2, with the same seed, the gain has a standard deviation of 0.016 (pooled over 13 methods; 0.004 at 160
# steps, 0.012 at 40), and the gains of seed 0 are at least 5 of these above what is expected: a probability of 1e-3
# for the closest row by Student's t with 13 degrees of freedom, for a mean of two runs. (2) A change of the code that
# draws other random numbers is like another seed. With the pooled standard deviation (24 degrees of freedom, by seeds)
# and n = 3, one is below mean - 3 sd with the probability 0.008 that Student's t exceeds 3 / sqrt(1 + 1 / 3). Where
# chance is above that (CMSF except semi, MoCo), it is higher, and highest for cmsf_cross: 0.2. Measure again after such
# a change.
K = 3

# The most that a model reaches without information about the scans.
#
# gain: for 1,317 independent scans a mean rank has a standard deviation of sqrt(1 / 12 / 1317) = 0.008, and the
# difference of two 0.011. Scans are not independent: 14 of the runs rejected below (6 of SwAV with seeds 0-2, 8 of
# SimSiam with seeds 0-4) have gains from -0.035 to 0.037, with a root mean square of 0.019. Chance is four times that:
# a probability of 7e-4 by Student's t with 14 degrees of freedom.
# fall: with unchanged weights the loss falls by up to 0.042 (NNCLR), with uniform codes by up to 0.071.
# spread: the 8 collapsed runs of SimSiam end at 0.080 to 0.114. Chance is twice the highest.
# information: 0, as with equal embeddings. The loss of SwAV varies by 0.012 between steps without information, and the
# mean of four steps by 0.006. Chance is more than four times that.
CHANCE = {"gain": 0.076, "fall": 0.1, "spread": 0.23, "information": 0.03}


def least_values(method: str) -> dict[str, float]:
    """Return the least value that a method has to reach in each column of the table."""
    least = {}
    for name, chance in CHANCE.items():
        rows = {key: getattr(row, name) for key, row in MEASURED.items() if getattr(row, name)}
        if method in rows:
            mean, sd, _ = rows[method]
            pooled = math.sqrt(np.mean([other[1] ** 2 for other in rows.values()]))
            least[name] = max(chance, mean - K * max(sd, pooled))
    return least


@pytest.fixture(scope="module")
def scans(make_shards, tmp_path_factory):
    """480 scanned digits to learn from, and two augmented views of each of the other 1,317."""
    from sklearn.datasets import load_digits

    data, folder = load_digits(), tmp_path_factory.mktemp("scans")

    def sample(i):
        gradient = np.abs(np.gradient(data.images[i])).sum(0)
        return f"{i:04d}", digits.encode_scan(data.images[i]), int(data.target[i]), digits.encode_scan(gradient)

    train, others = (
        make_shards(folder / name, [sample(i) for i in part], per_shard=120, classes=10)
        for name, part in (("train", range(TRAIN)), ("others", range(TRAIN, len(data.images))))
    )
    specs = [ViewSpec(name=name, augment=AUGMENT, size=16) for name in ("first", "second")]
    with Loader(Reader(others), SequentialOrder(len(others), len(others) // 3), specs, seed=0) as loader:
        batches = list(loader.iterate(0, 3))
        views = [
            torch.cat(
                [augment_batch(b.images[v], b.params[v], AUGMENT, mean=[0.5] * 3, std=[0.5] * 3) for b in batches]
            )
            for v in (0, 1)
        ]
    return train, views


def rank_of_own(training: TrainState, views: list[torch.Tensor]) -> float:
    """Return the mean rank (see the module's docstring) of the scans of which ``views`` are two views.

    Both networks normalize by the statistics of the views themselves, so that statistics are no part of the gain.
    """
    online, target = training.pair.online, training.pair.target or training.pair.online
    with torch.no_grad():
        z, u = online.embed(views[0])
        own, _ = target.embed(views[1])
    norm.discard_pending(norm.find_norms([online, target]))
    predicts = u is not None and training.method.heads.predictor != "prototypes"
    similarity = (u if predicts else z) @ own.T
    others = similarity.shape[1] - 1
    less = (similarity < similarity.diagonal()[:, None]).sum(1)
    equal = (similarity == similarity.diagonal()[:, None]).sum(1) - 1  # without itself
    return float(((less + equal / 2) / others).mean())


def uninformed_loss(training: TrainState) -> float | None:
    """Return the loss of a model whose predictions carry no information about their targets.

    None if the loss measures distances: a prediction of the mean direction already lowers them.
    """
    options = training.recipe.method
    negatives = {"simclr": 2 * BATCH - 1, "moco": BANK + 1, "nnclr": BATCH}
    if options.name == "swav":
        return math.log(options.prototypes)
    return math.log(negatives[options.name]) if options.name in negatives else None


def train(method, scans, overrides=(), seed=0, steps=None, modify=lambda training: None) -> dict[str, float]:
    """Train on the scans.

    Args:
        method: A row of ``MEASURED``.
        scans: The fixture.
        overrides: Overrides of the recipe.
        seed: Seed of the weights, the order and the views.
        steps: Number of steps; by default those of the table.
        modify: Called with the training state before the last ``LAST`` steps.

    Returns:
        The run's value in each column of the table.
    """
    torch.set_num_threads(1)
    shards, views = scans
    steps = steps or MEASURED[method].steps
    values = recipe.compose(
        f"digits_{method}",
        [
            f"data.train={shards.root}",
            f"schedule.steps={steps}",
            f"optim.batch={BATCH}",
            f"bank.size={BANK}",
            f"seed={seed}",
            *overrides,
        ],
    )
    order = Order([s.samples for s in shards.shards], seed=seed, global_batch=BATCH, window="all")
    training = TrainState(
        values,
        World.single_process(),
        steps_per_epoch=order.steps_per_epoch,
        labels=shards.labels,
        data_digest=shards.digest,
    )
    before, scalars = rank_of_own(training, views), []
    with Loader(Reader(shards), order, training.view_specs, seed=seed) as loader:
        for batch in loader.iterate(0, steps):
            if len(scalars) == steps - LAST:
                modify(training)
            scalars.append(train_step(training, batch).scalars)
    loss, spread = (np.array([float(s[key]) for s in scalars]) for key in ("loss", "spread"))
    full = BANK // BATCH  # while an empty bank fills, the loss of MoCo rises: each step has more negatives
    start, end = max(loss[0], loss[full : full + LAST].mean()), loss[-LAST:].mean()
    outcome = {
        "gain": rank_of_own(training, views) - before,
        "fall": start - end if np.isfinite(loss).all() else math.nan,
        "spread": spread[-LAST:].mean(),
    }
    uninformed = uninformed_loss(training)
    return outcome if uninformed is None else outcome | {"information": uninformed - end}


def find_objections(method: str, outcome: dict[str, float]) -> dict[str, str]:
    """Return why a run has not learned, by column of the table; nothing if it has. A value may be NaN."""
    return {
        name: f"{outcome[name]:.3f}, expected at least {least:.3f}"
        for name, least in least_values(method).items()
        if not outcome[name] >= least
    }


SIMILAR = ("byol", "cmsf_km", "cmsf_sup", "cmsf_semi", "cmsf_cross", "nnsiam")
"""Methods of which the quick suite trains a sibling: MSF has BYOL's networks, CMSF 2Q the loss of
the others, SimSiam the gradients of NNSiam."""
RUNS = [
    pytest.param(method, seed, marks=pytest.mark.full if seed or method in SIMILAR else ())
    for method in MEASURED
    for seed in (0, 1)
]


@pytest.mark.parametrize(("method", "seed"), RUNS)
def test_each_method_learns(method, seed, scans):
    outcome = train(method, scans, seed=seed)
    assert find_objections(method, outcome) == {}, outcome


@pytest.mark.parametrize("method", MEASURED)
def test_the_criterion_accepts_every_measured_run_and_rejects_chance(method):
    """Each lowest value of a row is accepted. Each value at the level of chance is rejected on its own."""
    lowest = {name: getattr(MEASURED[method], name)[2] for name in least_values(method)}
    assert find_objections(method, lowest) == {}
    for name in lowest:
        assert list(find_objections(method, lowest | {name: CHANCE[name] - 0.001})) == [name]


def test_unchanged_weights_are_rejected(scans):
    """Only the running statistics of the norms change, which improves nearest neighbors without any learning."""
    objections = find_objections("msf", train("msf", scans, ["optim.lr=1e-9"], steps=40))
    assert {"gain", "fall"} <= objections.keys()


def test_uniform_codes_are_rejected(scans, monkeypatch):
    """Codes without information about their scans: the predictions follow them, down to a loss of log K."""
    monkeypatch.setattr(equations, "sinkhorn", lambda score, *_: torch.full_like(score, 1 / score.shape[1]))
    assert "information" in find_objections("swav", train("swav", scans, steps=40))


def test_a_temperature_at_which_codes_become_uniform_is_rejected(scans):
    """With tau = 0.1 the loss falls from 4.9 to log 64 = 4.16, and stays there."""
    assert "information" in find_objections("swav", train("swav", scans, ["method.temperature=0.1"], steps=40))


def test_a_collapsed_projection_is_rejected(scans):
    """A model that has learned, and whose projection then maps every scan to the same point in the last steps."""

    def collapse(training):
        last = [layer for layer in training.pair.online.projector.modules() if isinstance(layer, torch.nn.Linear)][-1]
        with torch.no_grad():
            last.weight.zero_()
            last.bias.fill_(1.0)
        last.requires_grad_(False)  # or the momentum of earlier steps would move the weights away from zero

    objections = find_objections("simclr", train("simclr", scans, modify=collapse))
    assert {"spread", "gain", "information"} <= objections.keys()


def test_collapse_by_gradients_through_the_targets_is_rejected(scans, monkeypatch):
    """SimSiam's first ablation: without the stopped gradient, all embeddings become equal and the loss perfect.

    The norm at the end of the projector is left out, because it keeps embeddings apart: with it, the spread only falls
    to 0.76. Without it, the spread ends at 0.080 to 0.114 over seeds 0-4 under AVX-512 and 0-2 under AVX2; with a
    stopped gradient it ends at 0.82 (seed 0).
    """
    monkeypatch.setattr(SimSiam, "target_encoder", "shared")
    overrides = [f"model.projector.last_{key}" for key in ("norm=false", "affine=true", "bias=true")]
    objections = find_objections("simsiam", train("simsiam", scans, overrides))
    assert {"spread", "gain"} <= objections.keys() and "fall" not in objections


def test_a_loss_that_is_not_finite_is_rejected(scans):
    """After the first update every step is skipped: its loss is NaN."""
    objections = find_objections("simsiam", train("simsiam", scans, ["optim.lr=1e30"], steps=2 * LAST))
    assert {"spread", "fall"} <= objections.keys()
