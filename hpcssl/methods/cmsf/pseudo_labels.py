"""Labels for images that have none: a small classifier of embeddings, trained on the images that have one.

n labeled images, W ranks, b rows per rank and step, D entries per embedding, C classes
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpcssl import rng
from hpcssl.checkpoint.shard import TensorShard
from hpcssl.distributed.world import World
from hpcssl.errors import ConfigError
from hpcssl.memory.checkpointed import RowReader
from hpcssl.memory.embedding_table import EmbeddingTable


@dataclass(frozen=True, kw_only=True)
class PseudoLabelOptions:
    """How semi-supervised CMSF predicts the classes of unlabeled images.

    The head is Linear to ``hidden``, batch norm, ReLU, Linear to the classes. Each fit uses a new SGD with momentum
    0.9 (the official pseudo_label_train.py and its run script).

    Attributes:
        labeled_fraction: fraction of the labels that may be used, above 0 and up to 1, drawn per class with the
            recipe's seed. 1 means all labels of the data set.
        threshold: a prediction counts from this probability on, 0 to 1.
        hidden: width of the head's hidden layer, 1 or more.
        fits_per_epoch: how often the head is trained per epoch, at equal distances; 1 or more.
        epochs: length of each fit, in epochs over the labeled images; 1 or more.
        batch: images per SGD step, 2 or more, since batch norm needs two.
        lr: learning rate of the head, above 0.
        weight_decay: weight decay of the head, 0 or more.
    """

    labeled_fraction: float = 1.0
    threshold: float = 0.85
    hidden: int = 1024
    fits_per_epoch: int = 2
    epochs: int = 10
    batch: int = 256
    lr: float = 0.01
    weight_decay: float = 1e-4

    def __post_init__(self) -> None:
        for key, valid, expected in (
            ("labeled_fraction", 0 < self.labeled_fraction <= 1, "a fraction above 0, up to 1"),
            ("threshold", 0 <= self.threshold <= 1, "a probability from 0 to 1"),
            ("hidden", self.hidden >= 1, "1 or more"),
            ("fits_per_epoch", self.fits_per_epoch >= 1, "1 or more"),
            ("epochs", self.epochs >= 1, "1 or more"),
            ("batch", self.batch >= 2, "2 or more"),
            ("lr", self.lr > 0, "a number above 0"),
            ("weight_decay", self.weight_decay >= 0, "0 or more"),
        ):
            if not valid:
                raise ConfigError(
                    f"method.pseudo_labels.{key}",
                    got=getattr(self, key),
                    expected=expected,
                    fix=f"set method.pseudo_labels.{key} to such a value",
                )


def choose_visible_labels(labels: npt.NDArray[np.int64], fraction: float, seed: int) -> npt.NDArray[np.bool_]:
    """Choose the images whose labels may be used: this fraction of each class, at least one image.

    Args:
        labels: [images] int64, -1 for no label.
        fraction: above 0, up to 1.
        seed: the recipe's seed.

    Returns:
        [images] bool.
    """
    visible = np.zeros(len(labels), bool)
    for label in np.unique(labels[labels >= 0]):
        images = np.flatnonzero(labels == label)
        order = rng.permutation(rng.key(seed, "labelled", int(label)), len(images))
        visible[images[order[: max(1, round(fraction * len(images)))]]] = True
    return visible


class LabeledEmbeddings:
    """The last embedding of each of the n images whose labels are visible.

    Methods are collectives unless they say otherwise.

    Args:
        labels: [images] int64, classes of the data set.
        visible: [images] bool, whose labels may be used.
        new_table: creates an embedding table for a number of images.
        device: device of the lookups.
    """

    def __init__(
        self,
        labels: npt.NDArray[np.int64],
        visible: npt.NDArray[np.bool_],
        new_table: Callable[[int], EmbeddingTable],
        device: torch.device,
    ):
        place = np.where(visible, np.cumsum(visible) - 1, -1)
        self._place = torch.from_numpy(place).to(device)
        self._label = torch.from_numpy(labels[visible]).to(device)
        self._table = new_table(int(visible.sum()))

    def is_visible(self, index_B: Tensor) -> Tensor:
        """Return whether the labels of these images may be used, bool [b]. Not a collective."""
        return self._place[index_B] >= 0

    def write(self, index_B: Tensor, z_BD: Tensor, taken: Tensor | None = None) -> None:
        """Replace the embeddings of every rank's images, as ``EmbeddingTable.write`` does.

        Those without a visible label are ignored.
        """
        self._table.write(self._place[index_B], z_BD, taken)

    def known_rows(self) -> tuple[Tensor, Tensor]:
        """Return (embeddings [m, D], classes [m]) of the labeled images that were written so far, on every rank."""
        rows, known = self._table.all_rows()
        return rows[known], self._label[known]

    def state(self) -> tuple[dict[str, TensorShard], dict[str, int]]:
        """See ``CheckpointedMemory.state``."""
        return self._table.state()

    def replicas(self) -> dict[str, Tensor]:
        """See ``CheckpointedMemory.replicas``."""
        return self._table.replicas()

    def load(self, numbers: Mapping[str, int], read: RowReader) -> None:
        """See ``CheckpointedMemory.load``."""
        self._table.load(numbers, read)


class PseudoLabelHead:
    """The classifier ``net`` of embeddings [b, D], with the same bits on every rank.

    It is trained on rank 0 only, since other machines could round differently, and sent to the others.

    Args:
        net: the classifier.
        options: how it is trained.
        seed: the recipe's seed.
        world: the ranks that train together.
    """

    def __init__(self, net: nn.Module, options: PseudoLabelOptions, *, seed: int, world: World):
        self.net, self.options, self.world, self.seed = net.eval(), options, world, seed
        self._last_fit = -1  # the step before which it was trained last

    @torch.no_grad()
    def predict(self, z_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Return (the most likely class [b] int64, its probability [b]) of unit rows. Not a collective."""
        with torch.autocast(z_BD.device.type, enabled=False):
            probability, label = self.net(z_BD).softmax(1).max(1)
        return label, probability

    def fit(self, z_ND: Tensor, label_N: Tensor, step: int) -> None:
        """Continue training on these rows, in orders drawn for the step. A collective.

        A second call for the same step does nothing: a step that was abandoned is started again. Fewer than two rows
        cannot be trained on.
        """
        if step == self._last_fit:
            return
        self._last_fit = step
        if self.world.is_main and len(z_ND) > 1:
            self._fit_on_main(z_ND, label_N, step)
        for tensor in self._tensors().values():
            tensor.copy_(self.world.all_reduce_sum(tensor if self.world.is_main else torch.zeros_like(tensor)))

    @torch.enable_grad()
    def _fit_on_main(self, z_ND: Tensor, label_N: Tensor, step: int) -> None:
        options, rows = self.options, len(z_ND)
        sgd = torch.optim.SGD(self.net.parameters(), lr=options.lr, momentum=0.9, weight_decay=options.weight_decay)
        self.net.train()
        with torch.autocast(z_ND.device.type, enabled=False):
            for epoch in range(options.epochs):
                self.world.set_phase("pseudo-labels")
                order = rng.permutation(rng.key(self.seed, "pseudo", step, epoch), rows)
                for batch in torch.split(torch.from_numpy(order).to(z_ND.device), options.batch):
                    if len(batch) < 2:  # batch norm cannot normalize one row
                        continue
                    sgd.zero_grad()
                    torch.autograd.backward(F.cross_entropy(self.net(z_ND[batch]), label_N[batch]))
                    sgd.step()
        self.net.eval()

    def _tensors(self) -> dict[str, Tensor]:
        return {name: tensor.detach() for name, tensor in self.net.state_dict().items() if tensor.is_floating_point()}

    def state(self) -> tuple[dict[str, TensorShard], dict[str, int]]:
        """See ``CheckpointedMemory.state``. Every rank holds the whole network."""
        shards = {name: TensorShard(tensor, 0, None) for name, tensor in self._tensors().items()}
        return shards, {"trained": self._last_fit}

    def replicas(self) -> dict[str, Tensor]:
        """Return nothing: ``state`` splits no tensor."""
        return {}

    def load(self, numbers: Mapping[str, int], read: RowReader) -> None:
        """See ``CheckpointedMemory.load``."""
        self._last_fit = numbers.get("trained", -1)
        for name, tensor in self._tensors().items():
            tensor.copy_(read(name, 0, len(tensor)))
