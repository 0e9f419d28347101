"""Each method learns on real scans: within half a minute of steps its loss falls and its embeddings stay spread."""

import numpy as np
import pytest
import torch

from data_prep import digits
from hpcssl.data.loader import Loader
from hpcssl.data.order import Order
from hpcssl.data.reader import Reader
from hpcssl.train import recipe
from hpcssl.train.state import Training
from hpcssl.train.step import train_step
from hpcssl.world import World

STEPS, BATCH, BANK = 28, 64, 128


@pytest.fixture(scope="module")
def scans(make_shards, tmp_path_factory):
    """480 scanned digits in 4 shards."""
    from sklearn.datasets import load_digits

    loaded = load_digits()
    samples = [(f"{i:03d}", digits.png(loaded.images[i]), int(loaded.target[i])) for i in range(480)]
    return make_shards(tmp_path_factory.mktemp("scans"), samples, per_shard=120, classes=10)


def play(name, scans, *overrides):
    torch.set_num_threads(1)
    made = recipe.compose(name, [f"data.train={scans.root}", f"schedule.steps={STEPS}", f"optim.batch={BATCH}",
                                 f"bank.size={BANK}", *overrides])
    order = Order([s.samples for s in scans.shards], seed=0, global_batch=BATCH, window="all")
    training = Training(made, World.alone(), steps_per_epoch=order.steps_per_epoch, labels=scans.labels,
                        data_digest=scans.digest)
    loader = Loader(Reader(scans), order, training.view_specs, seed=0)
    try:
        return [train_step(training, batch).scalars for batch in loader.run(0, STEPS)]
    finally:
        loader.close()


@pytest.mark.parametrize("method", ["simsiam", "moco_v2", "simclr", "nnclr", "nnsiam"])
def test_the_loss_falls_and_nothing_collapses(method, scans):
    seen = play(f"digits_{method}", scans)
    loss, spread = (np.array([float(s[key]) for s in seen]) for key in ("loss", "spread"))
    full = BANK // BATCH  # while an empty bank fills, the loss of MoCo rises: each step has more negatives
    assert loss[-4:].mean() < loss[full:full + 4].mean() - 0.05
    # the head of MoCo has no norms and starts at 0.31, before any step
    assert np.isfinite(loss).all() and spread.min() > 0.28 and spread[-4:].mean() > 0.4
