"""What an encoder is worth: k nearest neighbours, a linear probe, fine-tuning; configuration, results and the main.

RUN/probe/knn.json                      the result of a method: accuracy, data, settings
RUN/probe/linear.json  finetune.json
RUN/probe/linear/      finetune/        run folders, as those of pre-training
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from webdataset.shardlists import expand_urls

from moa_train.atomic_io import write_json
from moa_train.config import RESUME_MUTABLE_KEYS, CheckpointConfig, EpochSchedule, LoopConfig, OptimConfig, parse_config
from moa_train.data_order import worker_died
from moa_train.errors import DataError, message, require
from moa_train.reading import read_json
from moa_train.run_folder import RunFolder
from moa_train.task import DataParallelRank
from moa_train.torch_internals import WorkerError
from moa_train.trainer import run
from moa_vision.data import DataConfig
from moa_vision.images import MODES
from moa_vision.pretrain import DATA_RESUME_MUTABLE_KEYS
from moa_vision.probe.classify import ClassifierRun, FinetuneConfig, FinetuneTask, LinearConfig, LinearTask
from moa_vision.probe.encoders import TrainedEncoder, find_encoders
from moa_vision.probe.knn import KNNConfig, extract, knn_accuracies
from moa_vision.probe.labelled import LabelledData

Method = Literal["knn", "linear", "finetune"]


@dataclass(frozen=True, kw_only=True)
class ProbeData:
    """How labelled images are read; null is what the run was trained with, or else the usual value.

    Args:
        image_key: The image among a sample's members, e.g. input.jpg.
        val_crop_pct: Side of the central crop of held-out images, as a fraction of the image's.
        workers: Processes that decode images, per device.
        cache_dir: For indices and for remote or compressed shards; default ~/.cache/moa_vision.
        cache_gib: Limit of the remote or compressed shards kept there, in GiB.
        max_bad_samples: Different unusable samples after which a method stops.
    """

    image_key: str | None = None
    val_crop_pct: float | None = None
    workers: int | None = None
    cache_dir: str | None = None
    cache_gib: float | None = None
    max_bad_samples: int | None = None


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """What to find out about which encoder, on which data.

    Args:
        runs: Finished runs' folders, export folders, or sweeps' folders (all their finished runs).
        method: Any of knn, linear, finetune.
        train: Labelled training shards; null: the run's own.
        val: Labelled held-out shards; null: the run's own.
        name: Tells results on other data apart: those of knn go into probe/knn-NAME.json; "" is none.
        seed: Seed of new weights, the order of the data and every augmentation.
        resume: auto continues a method that has begun; never refuses to; force continues even though keys differ,
            and does knn again though its result is there.
        data: How labelled images are read.
        knn: Nearest neighbours.
        linear: The linear probe.
        finetune: Fine-tuning.
        loop: How the training loop runs; micro_batch_size, precision and val_samples are those of knn, too.
        checkpoint: Checkpoints of the trained methods.
    """

    runs: Sequence[str]
    method: Sequence[Method] = ("knn",)
    train: str | None = None
    val: str | None = None
    name: str = ""
    seed: int = 0
    resume: Literal["auto", "never", "force"] = "auto"
    data: ProbeData = field(default_factory=ProbeData)
    knn: KNNConfig = field(default_factory=KNNConfig)
    linear: LinearConfig = field(default_factory=LinearConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self) -> None:
        """Check what belongs together; ValueError names the key."""
        require("name", self.name, bool(re.fullmatch(r"[\w.+-]*", self.name)), "letters, digits and . _ + -")
        together = (self.train is None) == (self.val is None)
        require("val", self.val, together, "given with train, or both left out: labels must mean the same")
        micro, pairs = self.loop.micro_batch_size, "finetune" in self.method and self.finetune.mixes
        require("loop.micro_batch_size", micro, not (pairs and micro % 2), "even, since mixup and cutmix make pairs")


WORDS: dict[str, dict[str, Any]] = {
    "runs": {
        "nargs": "+",
        "type": str,
        "metavar": "RUN",
        "help": "a finished run's folder, an export folder, or a sweep's folder: all its finished runs",
    },
    "--method": {
        "nargs": "+",
        "type": Method,
        "default": ["knn"],
        "help": "one or more: nearest neighbours, a linear probe, fine-tuning",
    },
}
"""Arguments that are no keys."""


def data_config(config: ProbeConfig, encoder: TrainedEncoder) -> DataConfig:
    """Return the data: what the command line says, else what the run was trained with, normalized as it was.

    Raises:
        ValueError: neither says where labelled shards are, or the run's folder names a command.
    """
    chosen = {"train": config.train, "val": config.val, **asdict(config.data)}
    values: dict[str, Any] = {key: encoder.data.get(key) if v is None else v for key, v in chosen.items()}
    for key in ("train", "val"):
        missing = "shards with labels, e.g. --train data/mine/train --val data/mine/val"
        require(key, values[key], bool(values[key]), missing)
        # A run folder may be somebody else's. "::" between braces would make fsspec chain file systems.
        if chosen[key] is None and any(re.search("pipe:|::", part) for part in expand_urls(values[key])):
            raise ValueError(
                f"data.{key} is {values[key]!r} in {encoder.folder}, which runs a command; if it shall, give it with "
                "--train and --val"
            )
    given = {key: value for key, value in values.items() if value is not None}
    return DataConfig(**given, mean=encoder.mean, std=encoder.std)


Job = Callable[[], int]
"""Does what was planned and returns an exit code."""


def plan_knn(config: ProbeConfig, encoder: TrainedEncoder) -> Job:
    """Return the job that classifies by nearest neighbours.

    Raises:
        ValueError, DataError: the data, the features or k cannot be what the configuration says.
    """
    data = data_config(config, encoder)
    bad_samples = encoder.folder / "probe" / f"{label(config, 'knn')}.bad_samples.jsonl"
    images, model = (
        LabelledData(data, encoder.image_size, encoder.channels, bad_samples),
        encoder.features(config.knn.pool),
    )
    neighbours = f"at most the {len(images.train)} training samples"
    require("knn.k", config.knn.k, max(config.knn.k) <= len(images.train), neighbours)
    known = {} if config.resume == "force" else known_result(config, encoder)
    if known:
        return partial(tell, known, result_path(config, encoder, "knn"), "found before")
    return partial(probe_knn, config, encoder, images, model)


def probe_knn(config: ProbeConfig, encoder: TrainedEncoder, images: LabelledData, model: nn.Module) -> int:
    """Classify the held-out images by their nearest neighbours, write the result, and return the exit code."""
    begin, loop = time.perf_counter(), config.loop
    model = model.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    features = []
    for index, limit in ((images.train, None), (images.val, loop.val_samples)):
        batches = images.read(images.centred(index, DataParallelRank(0, 1, loop.micro_batch_size), limit))
        total = len(index) if limit is None else min(limit, len(index))
        try:
            images.note_without_image()
            features.append(extract(model, batches, images.config, total=total, bf16=loop.precision == "bf16"))
        except RuntimeError as error:  # DataError among them
            reported = worker_died(error) or error
            if not isinstance(reported, (DataError, WorkerError)):
                raise
            print(f"error: {message(reported)}", file=sys.stderr)
            return 1
    train, val = features
    accuracies = knn_accuracies(train, val, images.num_classes, config.knn)
    accuracy, top5 = accuracies[config.knn.k[0]]
    write_result(
        config,
        encoder,
        "knn",
        accuracy=accuracy,
        top5=top5 if images.num_classes > 5 else None,
        train_samples=len(train.labels),
        val_samples=len(val.labels),
        settings=asdict(config.knn),
        accuracy_by_k={str(k): first for k, (first, _) in accuracies.items()},
        wall_s=time.perf_counter() - begin,
    )
    return 0


def known_result(config: ProbeConfig, encoder: TrainedEncoder) -> dict[str, Any]:
    """Return the result of nearest neighbours that is there for this encoder, these data and settings; else {}."""
    try:
        found = read_json(result_path(config, encoder, "knn"), "it is found anew")
    except ValueError:
        return {}
    data = data_config(config, encoder)
    wanted = {"encoder": encoder.identity(), "train": data.train, "val": data.val, "reading": reading(config, data)}
    wanted = json.loads(json.dumps(wanted | {"settings": asdict(config.knn)}))
    top5 = found.get("top5", "")
    numbers = (found.get("accuracy"), found.get("val_samples"), 0 if top5 is None else top5)
    whole = isinstance(found.get("name"), str)
    whole = whole and all(isinstance(number, int | float) and abs(number) < 2**63 for number in numbers)
    return found if whole and wanted == {key: found.get(key) for key in wanted} else {}


def reading(config: ProbeConfig, data: DataConfig) -> dict[str, Any]:
    """Return what else decides over a result of nearest neighbours: crops, numbers of samples, precision."""
    return {
        "val_crop_pct": data.val_crop_pct,
        "val_samples": config.loop.val_samples,
        "precision": config.loop.precision,
    }


def plan_training(method: Literal["linear", "finetune"], config: ProbeConfig, encoder: TrainedEncoder) -> Job:
    """Return the job that trains a classifier. Raises ValueError for what the configuration lacks."""
    return partial(probe_by_training, config, encoder, classifier_run(config, encoder, method))


def probe_by_training(config: ProbeConfig, encoder: TrainedEncoder, training: ClassifierRun) -> int:
    """Train a classifier in RUN/probe/METHOD, or go on with it; once finished, write the result. Return the exit
    code of `moa_train.trainer.run`.
    """
    sizes: dict[str, int] = {}

    def build_task() -> LinearTask | FinetuneTask:
        task = LinearTask(training, encoder) if training.method == "linear" else FinetuneTask(training, encoder)
        sizes.update(train=task.samples_per_epoch, val=task.val_samples, classes=task.num_classes)
        return task

    code = run(training, build_task, mutable_keys=RESUME_MUTABLE_KEYS | DATA_RESUME_MUTABLE_KEYS)
    if code or int(os.environ.get("RANK", "0")):
        return code
    summary = RunFolder(training.folder).summary()
    accuracy, top5 = (round(1 - summary["final"][error], 9) for error in ("error", "error_top5"))
    write_result(
        config,
        encoder,
        training.method,
        accuracy=accuracy,
        top5=top5 if sizes["classes"] > 5 else None,
        train_samples=sizes["train"],
        val_samples=sizes["val"],
        settings=asdict(training.recipe) | {"lr": training.optim.lr},
        wall_s=summary["wall_s"],
    )
    return 0


def classifier_run(
    config: ProbeConfig, encoder: TrainedEncoder, method: Literal["linear", "finetune"]
) -> ClassifierRun:
    """Return the configuration of a method's training run."""
    recipe = config.linear if method == "linear" else config.finetune
    data = replace(data_config(config, encoder), crop_scale=recipe.crop_scale, hflip=recipe.hflip)
    optim = OptimConfig(lr=recipe.blr * recipe.batch_size / 256, weight_decay=recipe.weight_decay)
    if isinstance(recipe, FinetuneConfig):
        optim = replace(optim, betas=recipe.betas, max_grad_norm=recipe.max_grad_norm)
        fits = encoder.channels in MODES or recipe.rand_augment is None
        allowed = f"null for images of {encoder.channels} channels, as timm transforms grey and RGB only"
        require("finetune.rand_augment", recipe.rand_augment, fits, allowed)
    return ClassifierRun(
        name=label(config, method),
        seed=config.seed,
        out=str(encoder.folder / "probe"),
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
        method=method,
        recipe=recipe,
        data=data,
        encoder=encoder.identity(),
    )


def label(config: ProbeConfig, method: str) -> str:
    """Return the name of a method's result, e.g. "knn" or "knn-imagenet"."""
    return f"{method}-{config.name}" if config.name else method


def write_result(
    config: ProbeConfig,
    encoder: TrainedEncoder,
    method: Method,
    *,
    accuracy: float,
    top5: float | None,
    train_samples: int,
    val_samples: int,
    settings: dict[str, Any],
    wall_s: float,
    **more: Any,
) -> None:
    """Write RUN/probe/METHOD.json, with `more` as further keys, and tell the accuracy, a fraction of the samples."""
    data, path = data_config(config, encoder), result_path(config, encoder, method)
    path.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "method": method,
        "name": label(config, method),
        "accuracy": accuracy,
        "top5": top5,
        "train": data.train,
        "val": data.val,
        "train_samples": train_samples,
        "val_samples": val_samples,
        "settings": settings,
        "seed": config.seed,
        "wall_s": wall_s,
        "step": encoder.step,
        "encoder": encoder.identity(),
        "reading": reading(config, data),
        **more,
    }
    write_json(path, result)
    tell(result, path)


def result_path(config: ProbeConfig, encoder: TrainedEncoder, method: Method) -> Path:
    """Return the file of a method's result."""
    return encoder.folder / "probe" / f"{label(config, method)}.json"


def tell(result: dict[str, Any], path: Path, remark: str = "") -> int:
    """Print a result, and return the exit code."""
    five = "" if result["top5"] is None else f" (top 5: {result['top5']:.2%})"
    accuracy = f"{result['accuracy']:.2%}{five} of {result['val_samples']:,} held-out images"
    print(f"{result['name']:<11} {accuracy}: {path}{remark and ', '}{remark}")
    return 0


def check(config: ProbeConfig, processes: int) -> None:
    """Raise ValueError for what several processes cannot do in one command."""
    if processes > 1 and (list(config.method) == ["knn"] or len(config.method) > 1):
        raise ValueError(
            f"method is {' '.join(config.method)}, in {processes} processes; with a launcher it must be one of "
            "linear and finetune (knn takes one device, without a launcher)"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line says, run after run, method after method; return the first exit code that is not 0.

    0: all done. 1: a loss was not finite, or the data failed. 2: what was asked for cannot be done. 75: stopped and
    saved; the same command continues. Failures are told in one message.
    """
    config = parse_config(
        ProbeConfig,
        sys.argv[1:] if arguments is None else arguments,
        program="probe.py",
        summary="Tell what a trained encoder is worth. The same command continues what was stopped.",
        plain=WORDS,
        check=check_all,
    )
    try:
        check(config, int(os.environ.get("WORLD_SIZE", "1")))
        chosen = encoders(config)
    except (ValueError, OSError) as error:
        return _refuse(error)
    for encoder in chosen:
        try:
            jobs = plan(config, encoder)
        except (ValueError, OSError, DataError) as error:
            return _refuse(error)
        for job in jobs:
            try:
                code = job()
            except KeyboardInterrupt:  # nearest neighbours: they keep nothing, and take no stop requests
                print("interrupted; the same command begins with this method again", file=sys.stderr)
                return 130
            if code:
                return code
    return 0


def _refuse(error: Exception) -> int:
    print(f"error: {error}", file=sys.stderr)
    return 2


def encoders(config: ProbeConfig) -> list[TrainedEncoder]:
    """Return all encoders that are asked for, and tell which of a sweep's runs have none. Raises ValueError."""
    found = [find_encoders(path) for path in config.runs]
    lacking = [str(run) for _, runs in found for run in runs]
    if lacking:
        print(f"passed over {', '.join(lacking)}: not finished, so without an encoder", file=sys.stderr)
    return list({encoder.folder.resolve(): encoder for some, _ in found for encoder in some}.values())


def plan(config: ProbeConfig, encoder: TrainedEncoder) -> list[Job]:
    """Return a job for each method, all checked before the first begins. Raises ValueError, DataError."""
    plans: dict[Method, Callable[[ProbeConfig, TrainedEncoder], Job]] = {
        "knn": plan_knn,
        "linear": partial(plan_training, "linear"),
        "finetune": partial(plan_training, "finetune"),
    }
    return [plans[method](config, encoder) for method in dict.fromkeys(config.method)]


def check_all(config: ProbeConfig) -> None:
    """Raise ValueError for what cannot be done with any of the encoders."""
    try:
        for encoder in encoders(config):
            plan(config, encoder)
    except (OSError, DataError) as error:
        raise ValueError(str(error)) from error
