"""Evaluator of masked autoencoders in training: k-nearest-neighbour accuracy of the encoder's features."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor, nn

from moa_train.errors import require
from moa_train.evaluators import Evaluate
from moa_vision.bad_samples import BadSamples
from moa_vision.data import BatchSpec, val_loader
from moa_vision.index import ShardIndex
from moa_vision.mae import MAE
from moa_vision.pretrain import MAETask
from moa_vision.probe.classify import open_labelled
from moa_vision.probe.knn import Features, KNNConfig, extract_features, knn_accuracies


class PooledEncoder(nn.Module):
    """Mean of the patch tokens after the final norm, (B, D), as the kNN probe's default."""

    def __init__(self, mae: MAE) -> None:
        super().__init__()
        self.encoder = mae.encoder

    def forward(self, images: Tensor) -> Tensor:
        """Return the features of normalized images (B, C, H, W)."""
        tokens = self.encoder.forward_features(images)
        return tokens[:, self.encoder.num_prefix_tokens :].mean(dim=1)


def knn_evaluator(
    task: MAETask, train: str, val: str, k: int = 20, temperature: float = 0.07, samples: int | None = None
) -> Evaluate:
    """Return an evaluator that yields ("accuracy", fraction), the top-1 accuracy on labelled shards.

    Args:
        task: The run; images are read and normalized as its held-out ones.
        train: Labelled shards with the neighbours.
        val: Labelled shards to classify.
        k, temperature: See `KNNConfig`.
        samples: Number of images of each set that are used, from the front; None uses all.
    """
    data = replace(task.data, train=train, val=val)
    shards, config = open_labelled(data), KNNConfig(k=(k,), temperature=temperature)
    require("evaluators.knn.k", k, k <= len(shards.train), f"at most the {len(shards.train)} training images")
    spec = BatchSpec(task.spec.image_size, 1, task.spec.channels)
    bf16 = task.config.loop.precision == "bf16"

    def features(model: nn.Module, index: ShardIndex) -> Features:
        bad_samples = BadSamples(task.config.folder / "knn_bad_samples.jsonl", data.max_bad_samples)
        loader = val_loader(index, data, spec, batch_size=task.config.loop.micro_batch_size, limit=samples)
        total = len(index) if samples is None else min(samples, len(index))
        return extract_features(model, bad_samples.good(loader), data, total=total, bf16=bf16)

    def evaluate(model: nn.Module) -> Iterator[tuple[str, float]]:
        assert isinstance(model, MAE)
        pooled = PooledEncoder(model)
        found = knn_accuracies(features(pooled, shards.train), features(pooled, shards.val), shards.num_classes, config)
        yield "accuracy", found[k][0]

    return evaluate
