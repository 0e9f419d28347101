"""Checks that the shard sets of an evaluation can be scored."""

from __future__ import annotations

from hpcssl.data.shards import ShardSet
from hpcssl.errors import EvalError


def check_labels(train: ShardSet, val: ShardSet, *, multi_label: bool = False) -> None:
    """Raise ``EvalError`` unless both sets are labeled with the same classes.

    Args:
        train: The training set.
        val: The set that is scored.
        multi_label: Whether images may show several classes at once.
    """
    for data in (train, val):
        _check_images(data, multi_label)
    if train.classes != val.classes:
        differing = sorted(set(train.classes) ^ set(val.classes))[:3]
        raise EvalError(
            f"classes of {val.root}",
            got=f"{len(val.classes)} classes that differ from those of the training set (such as {differing})",
            expected=f"the {len(train.classes)} classes of {train.root}",
            fix="name the training and validation shards of the same data set",
        )


def check_multi_labels(train: ShardSet, val: ShardSet) -> None:
    """``check_labels`` for evaluations that take images of several classes at once."""
    check_labels(train, val, multi_label=True)


def _check_images(data: ShardSet, multi_label: bool) -> None:
    what = f"shard folder {data.root}"
    if len(data) == 0:
        raise EvalError(
            what, got="no samples", expected="at least one", fix="name another folder, or write the shards again"
        )
    if data.targets is not None and not multi_label:
        raise EvalError(
            what,
            got="images with several classes at once",
            expected="one class per image",
            fix="use svm, lowshot or transfer, which take such a set",
        )
    if data.targets is None and (data.labels < 0).any():
        raise EvalError(
            what,
            got=f"{int((data.labels < 0).sum())} images without a label",
            expected="a label for each image",
            fix="write the shards again from class folders",
        )
