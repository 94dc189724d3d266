"""Shards in which every sample has a label."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moa_train.errors import DataError
from moa_vision.data import DataConfig
from moa_vision.index import ShardIndex, open_index


class LabelledShards(NamedTuple):
    """Training and held-out samples with labels 0 ... num_classes - 1."""

    train: ShardIndex
    val: ShardIndex
    num_classes: int


def open_labelled(data: DataConfig) -> LabelledShards:
    """Open the training and held-out shards of a probe; `data.val` must be set.

    Raises:
        DataError: A shard is missing or damaged, a sample has no label, or the classes of both sets differ.
    """
    assert data.val is not None
    train, val = (_open(pattern, data) for pattern in (data.train, data.val))
    if any(ours != theirs for ours, theirs in zip(train.label_names, val.label_names, strict=False)):
        raise DataError(
            f"labels stand for other classes in {data.val} ({', '.join(val.label_names[:3])}, ...) than in "
            f"{data.train} ({', '.join(train.label_names[:3])}, ...); give shards with the same classes"
        )
    num_classes = max(len(train.label_names), int(train.table.labels.max()) + 1)
    unknown = np.flatnonzero(val.table.labels >= num_classes)
    if len(unknown):
        sample = val.bad(int(unknown[0]), f"label {val.table.labels[unknown[0]]}")
        raise DataError(
            f"{sample.key} in {sample.shard} has {sample.reason}, but the largest label in {data.train} is "
            f"{num_classes - 1}; give shards with the same classes"
        )
    return LabelledShards(train, val, num_classes)


def _open(pattern: str, data: DataConfig) -> ShardIndex:
    index = open_index(pattern, data.cache_dir, data.cache_gib, data.image_key)
    unlabelled = np.flatnonzero(index.table.labels < 0)
    if len(unlabelled):
        sample = index.bad(int(unlabelled[0]), "no label")
        raise DataError(
            f"{sample.key} in {sample.shard} and {len(unlabelled) - 1:,} other samples of {pattern} have no label; "
            "a probe needs a KEY.cls for every image (scripts/make_shards.py writes it from folder names): give "
            "other shards with --train and --val"
        )
    return index
