"""Each method learns on real scans: within some tens of steps its loss falls, its embeddings stay spread, and the
nearest neighbours of other scans are better than those of the untrained encoder."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data_prep import digits
from hpcssl.data.loader import Loader
from hpcssl.data.order import Order, Sequential
from hpcssl.data.reader import Reader
from hpcssl.train import recipe
from hpcssl.train.state import Training
from hpcssl.train.step import train_step
from hpcssl.views.augment import NAMED, ViewSpec, apply
from hpcssl.world import World

BATCH, BANK, WHOLE = 64, 128, NAMED["eval_whole"]
STEPS = {"nnclr": 60}  # its first neighbours are of other digits; the others need no more than 40
METHODS = ["msf", "byol", "simsiam", "moco_v2", "simclr", "swav", "nnclr", "nnsiam", "cmsf_2q", "cmsf_km", "cmsf_sup",
           "cmsf_semi", "cmsf_cross"]


@pytest.fixture(scope="module")
def scans(make_shards, tmp_path_factory):
    """480 scanned digits to learn from and 480 others, in shards, with their gradients as a second modality."""
    from sklearn.datasets import load_digits

    loaded, folder = load_digits(), tmp_path_factory.mktemp("scans")

    def sample(i):
        gradient = np.abs(np.gradient(loaded.images[i])).sum(0)
        return f"{i:03d}", digits.png(loaded.images[i]), int(loaded.target[i]), digits.png(gradient)

    return [make_shards(folder / name, [sample(i) for i in part], per_shard=120, classes=10)
            for name, part in (("train", range(480)), ("others", range(480, 960)))]


def neighbours(backbone, train, others):
    """Share of the other scans whose nearest training scan shows the same digit."""
    def features(data):
        with Loader(Reader(data), Sequential(len(data), 120), [ViewSpec(name="whole", augment=WHOLE, size=16)],
                    seed=0) as loader:
            images = [apply(b.images[0], b.params[0], WHOLE, mean=[0.5] * 3, std=[0.5] * 3) for b in loader.run(0, 4)]
        with torch.no_grad():
            return F.normalize(torch.cat([backbone(image) for image in images]), dim=1)

    backbone.eval()
    nearest = (features(others) @ features(train).T).argmax(1).numpy()
    backbone.train()
    return (train.labels[nearest] == others.labels).mean()


@pytest.mark.parametrize("method", METHODS)
def test_the_loss_falls_nothing_collapses_and_neighbours_are_better(method, scans):
    torch.set_num_threads(1)
    train, others = scans
    steps = STEPS.get(method, 40)
    made = recipe.compose(f"digits_{method}", [f"data.train={train.root}", f"schedule.steps={steps}",
                                               f"optim.batch={BATCH}", f"bank.size={BANK}"])
    order = Order([s.samples for s in train.shards], seed=0, global_batch=BATCH, window="all")
    training = Training(made, World.alone(), steps_per_epoch=order.steps_per_epoch, labels=train.labels,
                        data_digest=train.digest)
    untrained = neighbours(training.pair.online.backbone, train, others)
    with Loader(Reader(train), order, training.view_specs, seed=0) as loader:
        seen = [train_step(training, batch).scalars for batch in loader.run(0, steps)]
    loss, spread = (np.array([float(s[key]) for s in seen]) for key in ("loss", "spread"))
    full = BANK // BATCH  # while an empty bank fills, the loss of MoCo rises: each step has more negatives
    assert np.isfinite(loss).all() and loss[-4:].mean() < max(loss[0], loss[full:full + 4].mean()) - 0.05
    # the head of MoCo has no norms and starts at 0.31, before any step; SwAV's crops gather around prototypes
    assert spread.min() > 0.25 and spread[-4:].mean() > 0.3
    assert neighbours(training.pair.online.backbone, train, others) > untrained + 0.01
