"""k-nearest-neighbour classification on frozen features, without training."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moa_train.errors import require
from moa_train.progress import CountBar
from moa_vision.data import DataConfig, ImageBatch, normalize
from moa_vision.probe.encoders import Pool

SIMILARITIES = 2**27
"""Maximum number of similarities computed at a time; 512 MiB in float32."""


@dataclass(frozen=True, kw_only=True)
class KNNConfig:
    """The weighted nearest-neighbour classifier of Wu et al. (arXiv:1805.01978), as in DINO (arXiv:2104.14294).

    Args:
        k: Number of voting neighbours. With several numbers the first gives the result; the others are recorded too.
        temperature: A neighbour's vote is exp(cosine similarity / temperature).
        pool: Features: mean of the patch tokens (avg) or class token (cls), after the final norm.
    """

    k: tuple[int, ...] = (20,)
    temperature: float = 0.07
    pool: Pool = "avg"

    def __post_init__(self) -> None:
        """Check the ranges."""
        require("knn.k", self.k, bool(self.k) and min(self.k) >= 1, "one or more numbers, 1 or above")
        require("knn.temperature", self.temperature, self.temperature > 0, "above 0")


class Features(NamedTuple):
    """Features (N, D) float32 of length 1 and labels (N,) int64, on one device."""

    values: Tensor
    labels: Tensor


@torch.no_grad()
def extract_features(
    model: nn.Module, batches: Iterable[ImageBatch], data: DataConfig, *, total: int, bf16: bool = False
) -> Features:
    """Return the features of all labelled, not yet normalized images in order, on the model's device."""
    device = next(model.parameters()).device
    values, labels = [], []
    with CountBar(total=total, title="features", unit="img") as bar:
        for batch in batches:
            images = normalize(batch.images.to(device, non_blocking=True), data.mean, data.std)
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                features = model(images)
            values.append(F.normalize(features.float(), dim=1))
            labels.append(batch.labels.to(device))
            bar.update(len(images))
    return Features(torch.cat(values), torch.cat(labels))


def knn_accuracies(
    train: Features, val: Features, num_classes: int, config: KNNConfig
) -> dict[int, tuple[float, float]]:
    """Return {k: (top-1 accuracy, top-5 accuracy)} of `val` as fractions, by exact search in `train`."""
    correct = {k: torch.zeros(2, dtype=torch.int64) for k in config.k}
    chunk = max(1, SIMILARITIES // len(train.labels))
    with CountBar(total=len(val.labels), title="neighbours", unit="img") as bar:
        for queries, labels in zip(val.values.split(chunk), val.labels.split(chunk), strict=True):
            similarity, index = (queries @ train.values.T).topk(max(config.k), dim=1)
            neighbours = train.labels[index]
            for k in config.k:
                weights = (similarity[:, :k] / config.temperature).exp()
                votes = weights.new_zeros(len(labels), num_classes).scatter_add(1, neighbours[:, :k], weights)
                best = votes.topk(min(5, num_classes), dim=1)
                hits = (best.indices == labels[:, None]) & (best.values > 0)  # a class without votes is no prediction
                correct[k] += torch.stack([hits[:, 0].sum(), hits.sum()]).cpu()
            bar.update(len(labels))
    return {k: (int(top1) / len(val.labels), int(top5) / len(val.labels)) for k, (top1, top5) in correct.items()}
