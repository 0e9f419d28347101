"""Labels for images that have none: a small classifier of embeddings, learned from the images that have one.

    n labelled images, W ranks, b rows per rank and step, D entries per embedding, C classes
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpcssl import rng
from hpcssl.errors import ConfigError
from hpcssl.memory.ledger import Ledger
from hpcssl.memory.rows import Part
from hpcssl.world import World


@dataclass(frozen=True, kw_only=True)
class PseudoOptions:
    """Of CMSF's semi-supervised form. ``labelled``: the share of the labels that may be seen, drawn per class at the
    recipe's seed; 1 for all that the data set has. ``threshold``: the probability from which a prediction counts.

    The head is Linear to ``hidden`` - BN - ReLU - Linear to the classes; it is trained ``per_epoch`` times in an epoch,
    at equal distances, each time ``epochs`` long by a new SGD with momentum 0.9 (pseudo_label_train.py, run script).
    """

    labelled: float = 1.0
    threshold: float = 0.85
    hidden: int = 1024
    per_epoch: int = 2
    epochs: int = 10
    batch: int = 256
    lr: float = 0.01
    weight_decay: float = 1e-4

    def __post_init__(self):
        for key, holds, expected in (
                ("labelled", 0 < self.labelled <= 1, "a share above 0, up to 1"),
                ("threshold", 0 <= self.threshold <= 1, "a probability from 0 to 1"),
                ("hidden", self.hidden >= 1, "1 or more"), ("per_epoch", self.per_epoch >= 1, "1 or more"),
                ("epochs", self.epochs >= 1, "1 or more"), ("batch", self.batch >= 2, "2 or more"),
                ("lr", self.lr > 0, "above 0"), ("weight_decay", self.weight_decay >= 0, "0 or more")):
            if not holds:
                raise ConfigError(f"method.pseudo.{key}", got=getattr(self, key), expected=expected,
                                  mend=f"set method.pseudo.{key} to a value that is {expected}")


def visible(labels: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Which images' labels may be seen, bool [images]: of each class this share, at least one, drawn by address."""
    seen = np.zeros(len(labels), bool)
    for name in np.unique(labels[labels >= 0]):
        of_class = np.flatnonzero(labels == name)
        drawn = rng.permutation(rng.key(seed, "labelled", int(name)), len(of_class))
        seen[of_class[drawn[:max(1, round(share * len(of_class)))]]] = True
    return seen


class Labelled:
    """The last embedding of each of the n images whose labels may be ``seen``; a ledger of these alone.

    Methods are collectives unless they say otherwise.
    """

    def __init__(self, labels: np.ndarray, seen: np.ndarray, ledger: Callable[[int], Ledger], device: torch.device):
        place = np.where(seen, np.cumsum(seen) - 1, -1)
        self._place = torch.from_numpy(place).to(device)
        self._label = torch.from_numpy(labels[seen]).to(device)
        self._rows = ledger(int(seen.sum()))

    def seen(self, index_B: Tensor) -> Tensor:
        """Whether these images' labels may be seen, bool [b]. No collective."""
        return self._place[index_B] >= 0

    def write(self, index_B: Tensor, z_BD: Tensor) -> None:
        """Every rank's embeddings [b, D] of these images; those without a label are left out."""
        self._rows.write(self._place[index_B], z_BD)

    def known(self) -> tuple[Tensor, Tensor]:
        """(embeddings [m, D], classes [m]) of the labelled images that were met so far, on every rank."""
        rows, known = self._rows.everything()
        return rows[known], self._label[known]

    def state(self) -> tuple[dict[str, Part], dict[str, int]]:
        return self._rows.state()

    def replicas(self) -> dict[str, Tensor]:
        return self._rows.replicas()

    def load(self, numbers: Mapping[str, int], read: Callable[[str, int, int], Tensor]) -> None:
        self._rows.load(numbers, read)


class PseudoHead:
    """The classifier ``net`` of rows [b, D], the same bits on every rank: it is trained on rank 0, whose arithmetic is
    the only one that counts."""

    def __init__(self, net: nn.Module, options: PseudoOptions, *, seed: int, world: World):
        self.net, self.options, self.world, self.seed = net.eval(), options, world, seed
        self._trained = -1  # the step before which it was trained last

    @torch.no_grad()
    def label(self, z_BD: Tensor) -> tuple[Tensor, Tensor]:
        """(the likeliest class [b] int64, its probability [b]) of unit rows. No collective."""
        with torch.autocast(z_BD.device.type, enabled=False):
            probability, label = self.net(z_BD).softmax(1).max(1)
        return label, probability

    def train(self, z_ND: Tensor, label_N: Tensor, step: int) -> None:
        """Go on learning from these rows, in orders drawn at the step, once: a step that the world gave up before its
        end begins anew. Fewer rows than two teach nothing."""
        if step == self._trained:
            return
        self._trained = step
        if self.world.main and len(z_ND) > 1:
            self._train(z_ND, label_N, step)
        for tensor in self._tensors().values():
            tensor.copy_(self.world.sum(tensor if self.world.main else torch.zeros_like(tensor)))

    @torch.enable_grad()
    def _train(self, z_ND: Tensor, label_N: Tensor, step: int) -> None:
        options, rows = self.options, len(z_ND)
        sgd = torch.optim.SGD(self.net.parameters(), lr=options.lr, momentum=0.9, weight_decay=options.weight_decay)
        self.net.train()
        with torch.autocast(z_ND.device.type, enabled=False):
            for epoch in range(options.epochs):
                self.world.mark("pseudo-labels")
                order = rng.permutation(rng.key(self.seed, "pseudo", step, epoch), rows)
                for some in torch.from_numpy(order).to(z_ND.device).split(options.batch):
                    if len(some) < 2:  # batch norm has nothing to say of one row
                        continue
                    sgd.zero_grad()
                    F.cross_entropy(self.net(z_ND[some]), label_N[some]).backward()
                    sgd.step()
        self.net.eval()

    def _tensors(self) -> dict[str, Tensor]:
        return {name: tensor.detach() for name, tensor in self.net.state_dict().items() if tensor.is_floating_point()}

    def state(self) -> tuple[dict[str, Part], dict[str, int]]:
        parts = {name: Part(tensor, 0, None) for name, tensor in self._tensors().items()}
        return parts, {"trained": self._trained}

    def replicas(self) -> dict[str, Tensor]:
        return {}

    def load(self, numbers: Mapping[str, int], read: Callable[[str, int, int], Tensor]) -> None:
        self._trained = numbers.get("trained", -1)
        for name, tensor in self._tensors().items():
            tensor.copy_(read(name, 0, len(tensor)))
