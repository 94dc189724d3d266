"""Requirements of a masked autoencoder's run, for the estimate on target hardware."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from moa_ffn import FFN
from moa_train.config import parse_config
from moa_train.devices import trace_saved_bytes
from moa_train.errors import ConfigError
from moa_train.estimate import Workload, count_states
from moa_train.plan import TRAINING_FLOPS_PER_FORWARD
from moa_vision.cache import is_remote
from moa_vision.data import DataConfig
from moa_vision.index import open_index
from moa_vision.mae import MAE, forward_flops, parameter_counts
from moa_vision.pretrain import MAEConfig, build_mae

IMAGENET_IMAGES = 1_281_167
"""Training images of ImageNet-1k."""

DECODING_FRACTION = 318 / 414
"""Part of a core's time spent on decoding, which the crops of an image share: 318 images/s are decoded, cropped and
resized, 414 only decoded (benchmarks/loader.py)."""


def mae_workload(config: MAEConfig, *, images: int | None = None, decode_rate: float = 318.0) -> Workload:
    """Return the requirements of a masked autoencoder's run on `images` training images.

    None counts local shards, and assumes ImageNet-1k where there are none. One core prepares `decode_rate` images/s.
    """
    images = images or count_images(config.data)
    assumed = [f"{decode_rate:g} images/s per core (--decode-rate)"]
    if images is None:
        images = IMAGENET_IMAGES
        assumed.append(f"{images:,} training images (--images)")
    with torch.device("meta"):
        mae = build_mae(config.model)
    for module in mae.modules():
        if isinstance(module, FFN):
            module.backend = "eager"  # the tracing of saved tensors cannot follow the others
    muon = _muon_shapes(config, mae)
    repeats = config.data.repeated_augmentation

    def loader_core_s(micro_batch: int) -> float:
        decoded = (micro_batch + repeats - math.gcd(micro_batch, repeats)) / (repeats * micro_batch)
        return (decoded * DECODING_FRACTION + 1 - DECODING_FRACTION) / decode_rate

    size = [rows * mae.patch_size for rows in mae.grid_size]

    def loss(samples: int) -> torch.Tensor:
        return mae(torch.zeros(samples, mae.in_chans, *size), torch.zeros(samples, mae.num_patches)).loss

    return Workload(
        title=f"{config.model.encoder} at {' x '.join(map(str, size))}",
        parameters=parameter_counts(mae),
        unit="img",
        units_per_sample=1,
        samples_per_epoch=images // repeats * repeats,
        budget=config.schedule.budget,
        flops_per_sample=TRAINING_FLOPS_PER_FORWARD * forward_flops(mae),
        states=count_states(mae, [*muon]),
        saved=trace_saved_bytes(mae, loss, bf16=config.loop.precision == "bf16"),
        muon=tuple(muon.values()),
        loader_core_s=loader_core_s,
        assumed=tuple(assumed),
    )


def recorded_muon(run: Path) -> tuple[tuple[int, ...], ...]:
    """Return the shapes of the matrices that Muon updated in a recorded run, () without Muon."""
    config = parse_config(MAEConfig, [f"--config={run / 'config.yaml'}"], program="--measured", summary="")
    with torch.device("meta"):
        return tuple(_muon_shapes(config, build_mae(config.model)).values())


def _muon_shapes(config: MAEConfig, mae: MAE) -> dict[str, tuple[int, ...]]:
    names = mae.hidden_matrices() if config.optim.algorithm == "muon" else set()
    return {name: tuple(parameter.shape) for name, parameter in mae.named_parameters() if name in names}


def count_images(data: DataConfig) -> int | None:
    """Return the number of training images in local shards; None if the shards are remote or absent."""
    if any(is_remote(part) for part in data.train.split("::")):
        return None
    try:
        return len(open_index(data.train, data.cache_dir, image_key=data.image_key))
    except ConfigError:  # absent
        return None
