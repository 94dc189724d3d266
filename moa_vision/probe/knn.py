"""k-nearest-neighbour classification by frozen features: no training, one number that says how good they are."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moa_train.errors import require
from moa_train.progress import CountBar
from moa_vision.data import DataConfig, normalize
from moa_vision.probe.encoders import Pool
from moa_vision.probe.labelled import LabelledImages


@dataclass(frozen=True, kw_only=True)
class KNNConfig:
    """The nearest-neighbour classifier of Wu et al. (arXiv:1805.01978) as DINO uses it (arXiv:2104.14294).

    Args:
        k: Neighbours that vote; of several numbers the first one's accuracy is the result, the
            others' stand beside it.
        temperature: A neighbour's vote is exp(cosine similarity / temperature).
        pool: Features: the mean of the patch tokens (avg) or the class token (cls), after the last norm.
    """

    k: tuple[int, ...] = (20,)
    temperature: float = 0.07
    pool: Pool = "avg"

    def __post_init__(self) -> None:
        """Check the ranges; ValueError names the key."""
        require("knn.k", self.k, bool(self.k) and min(self.k) >= 1, "one or more numbers, 1 or above")
        require("knn.temperature", self.temperature, self.temperature > 0, "above 0")


class Features(NamedTuple):
    """Features (N, D) float32 of length 1 and labels (N,) int64, on one device."""

    values: Tensor
    labels: Tensor


@torch.no_grad()
def extract(
    model: nn.Module, batches: Iterable[LabelledImages], data: DataConfig, *, total: int, bf16: bool = False
) -> Features:
    """Return the features of all images, in order, on the model's device.

    Args:
        model: Images (B, C, H, W) to features (B, D).
        batches: Images as they are read.
        data: Their normalization.
        total: How many images there are, for the progress bar.
        bf16: Compute under bf16 autocast.
    """
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


def neighbours(queries: Tensor, bank: Tensor, k: int, chunk: int = 4096) -> tuple[Tensor, Tensor]:
    """Return the cosine similarities (Q, k), falling, and the numbers (Q, k) of each query's nearest in the bank.

    Exact: all pairs are compared, a chunk of the bank at a time, so that at most Q * (chunk + k) are held.

    Args:
        queries: (Q, D) of length 1.
        bank: (N, D) of length 1, N >= k.
        k: Neighbours.
        chunk: Rows of the bank that are compared at a time.
    """
    similarity, number = queries.new_empty(len(queries), 0), queries.new_empty(len(queries), 0, dtype=torch.int64)
    for start in range(0, len(bank), chunk):
        part = queries @ bank[start : start + chunk].T
        numbers = torch.arange(start, start + part.shape[1], device=bank.device).expand_as(part)
        candidates = torch.cat([similarity, part], dim=1)
        similarity, kept = candidates.topk(min(k, candidates.shape[1]), dim=1)
        number = torch.cat([number, numbers], dim=1).gather(1, kept)
    return similarity, number


def votes(similarity: Tensor, labels: Tensor, num_classes: int, temperature: float) -> Tensor:
    """Return each class's votes (Q, num_classes): the sum of exp(similarity / temperature) over its neighbours.

    Args:
        similarity: (Q, k) cosine similarities.
        labels: (Q, k) int64, the neighbours' labels.
        num_classes: Columns of the result.
        temperature: See `KNNConfig`.
    """
    weights = (similarity / temperature).exp()
    return torch.zeros(len(weights), num_classes, device=weights.device).scatter_add(1, labels, weights)


def knn_accuracies(
    train: Features, val: Features, num_classes: int, config: KNNConfig, chunk: int = 1024
) -> dict[int, tuple[float, float]]:
    """Return {k: (accuracy, accuracy of the five classes with the most votes)}, fractions, for every k.

    Args:
        train: The neighbours, as many as the largest k or more.
        val: What is classified, `chunk` at a time.
        num_classes: Labels are 0 ... num_classes - 1.
        config: The classifier.
        chunk: Queries at a time.
    """
    most = max(config.k)
    right = dict.fromkeys(config.k, torch.zeros(2, dtype=torch.int64))
    with CountBar(total=len(val.labels), title="neighbours", unit="img") as bar:
        for start in range(0, len(val.labels), chunk):
            queries, truth = val.values[start : start + chunk], val.labels[start : start + chunk]
            similarity, number = neighbours(queries, train.values, most)
            for k in config.k:
                ballot = votes(similarity[:, :k], train.labels[number[:, :k]], num_classes, config.temperature)
                best = ballot.topk(min(5, num_classes), dim=1)
                top = (best.indices == truth[:, None]) & (best.values > 0)  # a class without a vote is no answer
                right[k] = right[k] + torch.stack([top[:, 0].sum(), top.sum()]).cpu()
            bar.update(len(truth))
    return {k: (int(one) / len(val.labels), int(five) / len(val.labels)) for k, (one, five) in right.items()}
