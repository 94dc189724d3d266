"""The three probes of an encoder and their result files.

RUN/probe/knn.json  linear.json  finetune.json    results: accuracy, data, settings
RUN/probe/linear/   finetune/                     run folders of the trained probes
"""

from __future__ import annotations

import os
import time
from dataclasses import asdict, replace
from typing import Any, Literal, get_type_hints

import torch

from moa_train.atomic_io import write_json
from moa_train.config import RESUME_MUTABLE_KEYS, EpochSchedule, OptimConfig
from moa_train.errors import ConfigError, DataError, require
from moa_train.run_folder import RunFolder
from moa_train.trainer import run
from moa_vision.bad_samples import BadSamples
from moa_vision.data import BatchSpec, DataConfig, val_loader
from moa_vision.image_task import DATA_RESUME_MUTABLE_KEYS
from moa_vision.images import MODES
from moa_vision.index import ShardIndex
from moa_vision.probe.classify import Classifier, ClassifierRun, FinetuneTask, LinearTask, open_labelled
from moa_vision.probe.config import FinetuneConfig, Method, ProbeConfig
from moa_vision.probe.encoders import TrainedEncoder
from moa_vision.probe.knn import Features, extract_features, knn_accuracies

TASKS: dict[str, type[LinearTask | FinetuneTask]] = {"linear": LinearTask, "finetune": FinetuneTask}


class Probe:
    """One method on one encoder."""

    def __init__(self, method: Method, config: ProbeConfig, encoder: TrainedEncoder) -> None:
        self.method, self.config, self.encoder = method, config, encoder
        self.data = data_config(config, encoder)
        self.name = f"{method}-{config.name}" if config.name else method
        self.path = encoder.folder / "probe" / f"{self.name}.json"

    def run(self) -> int:
        """Compute and write the result; return the exit code."""
        raise NotImplementedError

    def write_result(self, *, accuracy: float, top5: float, num_classes: int, **fields: Any) -> None:
        """Write the result file and print the accuracy (a fraction); `top5` is recorded above five classes."""
        loop = self.config.loop
        result = {
            "method": self.method,
            "name": self.name,
            "accuracy": accuracy,
            "top5": top5 if num_classes > 5 else None,
            "seed": self.config.seed,
            "step": self.encoder.step,
            "train": self.data.train,
            "val": self.data.val,
            "encoder": self.encoder.identity(),
            "reading": {
                "val_crop_pct": self.data.val_crop_pct,
                "val_samples": loop.val_samples,
                "precision": loop.precision,
            },
            **fields,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, result)
        shown = "" if result["top5"] is None else f" (top 5: {top5:.2%})"
        print(f"{self.name:<11} {accuracy:.2%}{shown} of {fields['val_samples']:,} held-out images: {self.path}")


class KNNProbe(Probe):
    """k nearest neighbours."""

    def __init__(self, config: ProbeConfig, encoder: TrainedEncoder) -> None:
        super().__init__("knn", config, encoder)
        self.shards = open_labelled(self.data)
        self.model = encoder.features(config.knn.pool)
        samples = len(self.shards.train)
        require("knn.k", config.knn.k, max(config.knn.k) <= samples, f"at most the {samples} training samples")

    def run(self) -> int:
        """Classify the held-out images."""
        begin, config, shards = time.perf_counter(), self.config.knn, self.shards
        self.model.to("cuda" if torch.cuda.is_available() else "cpu")
        bad_samples = BadSamples(self.path.with_suffix(".bad_samples.jsonl"), self.data.max_bad_samples)
        train = self.features(shards.train, bad_samples)
        val = self.features(shards.val, bad_samples, self.config.loop.val_samples)
        accuracies = knn_accuracies(train, val, shards.num_classes, config)
        accuracy, top5 = accuracies[config.k[0]]
        self.write_result(
            accuracy=accuracy,
            top5=top5,
            num_classes=shards.num_classes,
            train_samples=len(train.labels),
            val_samples=len(val.labels),
            settings=asdict(config),
            accuracy_by_k={str(k): top1 for k, (top1, _) in accuracies.items()},
            wall_s=time.perf_counter() - begin,
        )
        return 0

    def features(self, index: ShardIndex, bad_samples: BadSamples, limit: int | None = None) -> Features:
        """Return the features of the samples of an index, or of `limit` of them."""
        loop, encoder = self.config.loop, self.encoder
        spec = BatchSpec(encoder.image_size, 1, encoder.channels)
        loader = val_loader(index, self.data, spec, batch_size=loop.micro_batch_size, limit=limit)
        bad_samples.note(index.without_image())  # samples that no batch reports
        batches, total = bad_samples.good(loader), len(index) if limit is None else min(limit, len(index))
        return extract_features(self.model, batches, self.data, total=total, bf16=loop.precision == "bf16")


class TrainedProbe(Probe):
    """Linear probe or fine-tuning, trained in RUN/probe/METHOD."""

    method: Literal["linear", "finetune"]

    def __init__(self, method: Literal["linear", "finetune"], config: ProbeConfig, encoder: TrainedEncoder) -> None:
        super().__init__(method, config, encoder)
        self.training = self.classifier_run()

    def classifier_run(self) -> ClassifierRun:
        """Return the configuration of the training run."""
        config = self.config
        recipe = config.linear if self.method == "linear" else config.finetune
        optim = OptimConfig(lr=recipe.lr, weight_decay=recipe.weight_decay)
        if isinstance(recipe, FinetuneConfig):
            optim = replace(optim, betas=recipe.betas, max_grad_norm=recipe.max_grad_norm)
            channels = self.encoder.channels
            supported = channels in MODES or recipe.rand_augment is None
            wanted = f"null for images with {channels} channels; timm's RandAugment supports grey and RGB"
            require("finetune.rand_augment", recipe.rand_augment, supported, wanted)
        return ClassifierRun(
            name=self.name,
            seed=config.seed,
            out=str(self.encoder.folder / "probe"),
            resume=config.resume,
            optim=optim,
            schedule=EpochSchedule(
                epochs=recipe.epochs,
                warmup_epochs=recipe.warmup_epochs,
                min_lr=recipe.min_lr,
                batch_size=recipe.batch_size,
            ),
            loop=replace(config.loop, num_diagnostic_samples=0),
            checkpoint=config.checkpoint,
            method=self.method,
            recipe=recipe,
            data=replace(self.data, crop_scale=recipe.crop_scale, hflip=recipe.hflip),
            encoder=self.encoder.identity(),
        )

    def run(self) -> int:
        """Train or resume the classifier; write the result once it is finished."""
        tasks: list[Classifier] = []

        def build_task() -> LinearTask | FinetuneTask:
            task = TASKS[self.method](self.training, self.encoder)
            tasks.append(task)
            return task

        code = run(self.training, build_task, mutable_keys=RESUME_MUTABLE_KEYS | DATA_RESUME_MUTABLE_KEYS)
        if code or int(os.environ.get("RANK", "0")):
            return code
        summary, task = RunFolder(self.training.folder).summary(), tasks[-1]
        self.write_result(
            accuracy=round(1 - summary["final"]["error"], 9),
            top5=round(1 - summary["final"]["error_top5"], 9),
            num_classes=task.num_classes,
            train_samples=task.samples_per_epoch,
            val_samples=task.val_samples,
            settings=asdict(self.training.recipe) | {"lr": self.training.optim.lr},
            wall_s=summary["wall_s"],
        )
        return 0


def data_config(config: ProbeConfig, encoder: TrainedEncoder) -> DataConfig:
    """Return the data configuration: values of the command line, else of the run, with the run's normalization."""
    from webdataset.shardlists import expand_urls  # late: training steps need no webdataset

    given = {"train": config.train, "val": config.val, **asdict(config.data)}
    values: dict[str, Any] = {key: encoder.data.get(key) if value is None else value for key, value in given.items()}
    for key in ("train", "val"):
        require(key, values[key], bool(values[key]), "labelled shards: give --train SHARDS and --val SHARDS")
    chosen = {key: value for key, value in values.items() if value is not None}
    types = get_type_hints(DataConfig)
    for key, value in chosen.items():
        if not isinstance(value, types[key] | int if key in ("val_crop_pct", "cache_gib") else types[key]):
            raise DataError(f"data.{key} is {value!r} in {encoder.folder}/config.yaml, expected {types[key]}")
    shards = [name for key in ("train", "val") for name in expand_urls(chosen[key])]
    if config.train is None and any(name.startswith("pipe:") for name in shards):
        raise ConfigError(
            f"data.train or data.val in {encoder.folder}/config.yaml runs a command (pipe:), and a run folder may come "
            "from someone else; to allow it, give it with --train and --val"
        )
    return DataConfig(**chosen, mean=encoder.mean, std=encoder.std)
