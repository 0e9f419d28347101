"""The table of the packaged recipes, stored: to build every network takes a quarter of a minute.

``python -m hpcssl.cli.recipe_table`` writes it. Tests compare it with the recipes and their networks. Nothing here
imports torch, which takes seconds by itself.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from importlib import resources
from typing import Any

FILE = "table.json"
IMAGES_PER_GPU, MAX_GPUS = 32, 32
"""The number of GPUs for which memory is shown by default: as many as hold 32 images each, at most 32."""


@dataclass(frozen=True)
class GpuMemory:
    """Bytes that one rank needs. The CUDA context and the workspaces of cuDNN are not included.

    Attributes:
        networks: Weights, gradients and momentum of the trained networks, and the target encoder.
        bank: Rows of the memory bank.
        embedding_table: Embeddings that some rules of CMSF keep of every image.
        activations: What the backward pass keeps of one micro-batch.
        views: The augmented images of the rank's batch.
    """

    networks: int
    bank: int
    embedding_table: int
    activations: int
    views: int

    @property
    def total(self) -> int:
        """Sum of all parts, in bytes."""
        return self.networks + self.bank + self.embedding_table + self.activations + self.views


@dataclass(frozen=True, kw_only=True)
class MemorySizes:
    """What the memory of a rank is computed from, for any number of ranks.

    Attributes:
        networks: Bytes of the networks, the same on every rank.
        bank_rows: Rows of the memory bank, 0 without one.
        bank_row_bytes: Bytes of one of them.
        table_rows: Embeddings that some rules of CMSF keep, one per image.
        table_row_bytes: Bytes of one of them.
        is_sharded: Whether each rank holds a part of the bank and of the table, instead of all rows.
        batch: Global batch.
        micro_batches: Parts that a rank's batch is cut into.
        view_bytes: Bytes of the augmented views of one image.
        activation_bytes: Bytes that the backward pass keeps of one image.
    """

    networks: int
    bank_rows: int
    bank_row_bytes: int
    table_rows: int
    table_row_bytes: int
    is_sharded: bool
    batch: int
    micro_batches: int
    view_bytes: int
    activation_bytes: int

    def of_rank(self, ranks: int) -> GpuMemory:
        """Memory of one of ``ranks`` ranks. Where they do not divide the batch, the larger part is counted."""
        shards = ranks if self.is_sharded else 1
        return GpuMemory(
            networks=self.networks,
            bank=-(-self.bank_rows // shards) * self.bank_row_bytes,
            embedding_table=-(-self.table_rows // shards) * self.table_row_bytes,
            activations=-(-self.batch // ranks // self.micro_batches) * self.activation_bytes,
            views=-(-self.batch // ranks) * self.view_bytes,
        )


@dataclass(frozen=True, kw_only=True)
class RecipeRow:
    """One packaged recipe in the table.

    Attributes:
        name: Its name.
        title: What it is.
        backbone: ``model.arch``.
        length: Epochs or steps, as text.
        published: Published scores, by metric.
        differs: What differs from the original, one sentence each.
        is_small: Whether its images are small, so that one GPU is enough.
        memory: What its memory is computed from.
    """

    name: str
    title: str
    backbone: str
    length: str
    published: dict[str, float]
    differs: list[str]
    is_small: bool
    memory: MemorySizes

    @property
    def usual_gpus(self) -> int:
        """The number of GPUs for which memory is shown by default."""
        return 1 if self.is_small else max(1, min(MAX_GPUS, self.memory.batch // IMAGES_PER_GPU))


def digest() -> str:
    """Digest of the packaged recipes' files."""
    folder = resources.files("hpcssl.recipes")
    files = sorted((f.name, f.read_bytes()) for f in folder.iterdir() if f.name.endswith(".yaml"))
    return hashlib.sha256(repr(files).encode()).hexdigest()


def read_rows() -> list[RecipeRow] | None:
    """The rows of the stored table, sorted by name; None if a recipe has changed since it was written."""
    file = resources.files("hpcssl.recipes") / FILE
    stored = json.loads(file.read_text()) if file.is_file() else {}
    if stored.get("digest") != digest():
        return None
    return [RecipeRow(**row | {"memory": MemorySizes(**row["memory"])}) for row in stored["recipes"]]


def to_json(rows: list[RecipeRow]) -> str:
    """The file's text: one line per recipe, so that changes can be read."""
    lines: list[dict[str, Any]] = [dataclasses.asdict(row) for row in rows]
    body = ",\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    return f'{{"digest": "{digest()}",\n"recipes": [\n{body}\n]}}\n'
