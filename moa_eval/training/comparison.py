"""What a set of runs says: arms (runs that differ in seed only), differences with their uncertainty, and the verdict.

The first run's arm is the baseline. All losses are reconstruction losses on the masked patches of held-out images.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from scipy.special import stdtrit

from moa_eval.page import formatting
from moa_eval.training.runs import Run, split_encoder

CONFIDENCE = 0.95
ABSENT = "absent"  # stands for the value of a key that a configuration lacks

# A name that ends in a dot stands for all keys below it. Keys in none of the lists are settings of the method.
_IDENTITY = ("name", "seed", "out", "resume")
_BOOKKEEPING = (
    "data.workers", "data.cache_dir", "data.max_bad_samples", "optim.fused", "loop.micro_batch_size", "loop.compile",
    "loop.log_every", "loop.val_every", "loop.visualize", "loop.save_every", "loop.keep", "loop.trackers",
)  # fmt: skip
_MUST_MATCH = (
    "data.", "loop.val_samples", "model.img_size", "model.mask_ratio", "model.norm_pix_loss",
    "model.encoder_args.patch_size", "schedule.batch_size", "schedule.epochs",
)  # fmt: skip

FFN_NAMES = {
    "relu2": "ReLU²", "gelu": "GELU", "la": "LA", "moa": "MoA", "swiglu": "SwiGLU", "onela": "one-LA",
    "bila": "bi-LA", "qdla": "qd-LA", "onemoa": "one-MoA", "bimoa": "bi-MoA", "qdmoa": "qd-MoA",
}  # fmt: skip


class NotComparableError(ValueError):
    """The runs cannot be compared: one is given twice, or they differ in what must be the same."""


class Interval(NamedTuple):
    """A mean difference over seeds and its two-sided confidence interval (NaN limits for fewer than two seeds)."""

    mean: float
    low: float
    high: float
    paired: bool


@dataclass(frozen=True)
class Arm:
    """Runs that differ in their seed only.

    Attributes:
        label: How the page calls them, such as "qd-MoA" or "qd-MoA, lr 1.2e-3".
        runs: Their positions in the list of runs.
    """

    label: str
    runs: tuple[int, ...]


@dataclass(frozen=True)
class Contrast:
    """One arm against the baseline in one loss, after the same number of images.

    Attributes:
        arm: The arm's position in the list of arms.
        samples: Images seen where the two are compared; None if no validation is common to them.
        values, baseline: The loss by seed, diverged runs left out.
        interval: The difference, arm minus baseline.
    """

    arm: int
    samples: int | None
    values: dict[int, float]
    baseline: dict[int, float]
    interval: Interval

    @property
    def relative(self) -> float:
        """The mean difference as a fraction of the baseline's mean."""
        return quotient(self.interval.mean, mean(self.baseline.values()))


def mean(values: Any) -> float:
    """The mean of some numbers, NaN for none."""
    values = list(values)
    return math.fsum(values) / len(values) if values else math.nan


def quotient(value: float, baseline: float) -> float:
    """Their quotient, NaN for a baseline of zero."""
    return value / baseline if baseline else math.nan


def difference(values: Mapping[int, float], baseline: Mapping[int, float]) -> Interval:
    """The mean difference of two arms' losses by seed, with Student's interval at `CONFIDENCE`.

    Equal sets of seeds are paired (they share the order of the data, the crops and the masks): the t interval of the
    differences. Other sets: Welch's t interval (Welch 1947, "The generalization of Student's problem").
    """
    a, b = np.array([*values.values()]), np.array([*baseline.values()])
    paired = values.keys() == baseline.keys()
    centre = mean(a) - mean(b)
    if min(len(a), len(b)) < 2:
        return Interval(centre, math.nan, math.nan, paired)
    if paired:
        squares = [np.var([values[seed] - baseline[seed] for seed in values], ddof=1) / len(a)]
        freedom = len(a) - 1.0
    else:
        squares = [np.var(a, ddof=1) / len(a), np.var(b, ddof=1) / len(b)]
        spread = squares[0] ** 2 / (len(a) - 1) + squares[1] ** 2 / (len(b) - 1)
        freedom = sum(squares) ** 2 / spread if spread > 0 else len(a) + len(b) - 2.0
    half = float(stdtrit(freedom, 0.5 + CONFIDENCE / 2)) * math.sqrt(sum(squares))
    return Interval(centre, centre - half, centre + half, paired)


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, with dotted keys; an empty dictionary stays a value."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def config_difference(configs: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The dotted keys whose values are not all equal, with one value per configuration (or `ABSENT`)."""
    flats = [flatten(config) for config in configs]
    keys = dict.fromkeys(key for flat in flats for key in flat)  # the order of first appearance
    found = {}
    for key in keys:
        texts = {_canonical(flat[key]) if key in flat else None for flat in flats}
        if len(texts) > 1:
            found[key] = [flat.get(key, ABSENT) for flat in flats]
    return found


def role(key: str, values: Sequence[Any]) -> str:
    """What a difference in a key means: "identity", "FFN", "peak rate", "bookkeeping", "must match" or "setting"."""
    if key == "model.encoder":
        names = [split_encoder(str(value)) for value in values]
        if len({name.patch for name in names}) > 1:
            return "must match"
        return "FFN" if len({name.size for name in names}) == 1 else "setting"
    if key == "optim.lr":
        return "peak rate"
    for name, keys in (("identity", _IDENTITY), ("bookkeeping", _BOOKKEEPING), ("must match", _MUST_MATCH)):
        if any(key == entry or (entry.endswith(".") and key.startswith(entry)) for entry in keys):
            return name
    return "FFN" if key.split(".")[-1].startswith("ffn_") or key == "model.decoder_ffn" else "setting"


@dataclass(frozen=True)
class Comparison:
    """Runs side by side.

    Attributes:
        runs, labels: The runs as given and what the page calls them; the first belongs to the baseline.
        arms: Runs that differ in seed only, together; the baseline's arm first.
        differing: `config_difference` of the runs.
        incomparable: Why the losses cannot be compared as they stand, one line per reason.
        metric: The loss of the verdict: the baseline's training objective, "loss_norm" or "loss_pixel".
    """

    runs: tuple[Run, ...]
    labels: tuple[str, ...]
    arms: tuple[Arm, ...]
    differing: dict[str, list[Any]]
    incomparable: tuple[str, ...]
    metric: str

    def arm_of(self, run: int) -> int:
        """The position of the arm that a run belongs to."""
        return next(index for index, arm in enumerate(self.arms) if run in arm.runs)

    def keys(self, *roles: str) -> list[str]:
        """The differing keys of some roles."""
        return [key for key, values in self.differing.items() if role(key, values) in roles]

    def contrasts(self, loss: str) -> list[Contrast]:
        """Every other arm against the baseline in "loss_norm" or "loss_pixel", at the last validation they share."""
        return [self._contrast(arm, loss) for arm in range(1, len(self.arms))]

    def _contrast(self, arm: int, loss: str) -> Contrast:
        pair = [[self.runs[run] for run in self.arms[side].runs] for side in (arm, 0)]
        usable = [[run for run in side if run.diverged_at is None and len(run.validation["step"])] for side in pair]
        seen = [set(run.validation["samples"]) for side in usable for run in side]
        common = set.intersection(*seen) if all(usable) else set()
        if not common:
            return Contrast(arm, None, {}, {}, Interval(math.nan, math.nan, math.nan, False))
        samples = max(common)
        values, baseline = (_by_seed(side, loss, samples) for side in usable)
        return Contrast(arm, int(samples), values, baseline, difference(values, baseline))


def compare(runs: Sequence[Run], *, strict: bool = False) -> Comparison:
    """Put runs side by side; the first is the baseline.

    Raises:
        NotComparableError: A folder is given twice; or `strict`, and the runs differ in data, masks, batch, budget or
            image size.
        ValueError: There is no run.
    """
    if not runs:
        raise ValueError("runs is empty; give at least one run")
    folders = [run.folder.resolve() for run in runs]
    for folder in folders:
        if folders.count(folder) > 1:
            raise NotComparableError(f"{folder}: given {folders.count(folder)} times; give every run once")
    arms = _arms(runs)
    labels = _labels(runs, arms)
    differing = config_difference([run.config for run in runs])
    incomparable = (*_unequal_keys(differing, labels), *_unequal_budget(runs, labels), *_unequal_tiles(runs, labels))
    if strict and incomparable:
        raise NotComparableError(f"not comparable: {'; '.join(incomparable)}; without --strict this is a warning")
    metric = "loss_norm" if flatten(runs[0].config).get("model.norm_pix_loss", True) else "loss_pixel"
    return Comparison(tuple(runs), labels, arms, differing, incomparable, metric)


def spell(labels: Sequence[str], values: Sequence[str]) -> str:
    """Values with the runs that have them: "10 (SwiGLU), 20 (qd-MoA)"."""
    return ", ".join(
        f"{value} ({', '.join(label for label, own in zip(labels, values, strict=True) if own == value)})"
        for value in dict.fromkeys(values)
    )


def _by_seed(runs: Sequence[Run], loss: str, samples: float) -> dict[int, float]:
    at = [float(run.validation[loss][run.validation["samples"] == samples][-1]) for run in runs]
    # A seed that was run twice is one observation, not two.
    return {
        seed: mean(value for run, value in zip(runs, at, strict=True) if run.seed == seed)
        for seed in sorted({run.seed for run in runs})
    }


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _arms(runs: Sequence[Run]) -> tuple[Arm, ...]:
    groups: dict[str, list[int]] = {}
    for index, run in enumerate(runs):
        method = {k: v for k, v in flatten(run.config).items() if role(k, [v]) not in ("identity", "bookkeeping")}
        groups.setdefault(_canonical(method), []).append(index)
    members = [tuple(group) for group in groups.values()]
    return tuple(Arm(_arm_label(runs, group, members), group) for group in members)


def _arm_label(runs: Sequence[Run], group: tuple[int, ...], groups: Sequence[tuple[int, ...]]) -> str:
    run = runs[group[0]]
    label = FFN_NAMES.get(run.ffn, run.ffn)
    rivals = [runs[other[0]].config for other in groups if runs[other[0]].ffn == run.ffn]
    differing = {k: v for k, v in config_difference(rivals).items() if role(k, v) not in ("identity", "bookkeeping")}
    own = flatten(run.config)
    if len(differing) > 2:
        return f"{label}, {run.name}"
    return ", ".join([label, *(f"{key.split('.')[-1]} {show(own[key])}" for key in differing if key in own)])


def _labels(runs: Sequence[Run], arms: Sequence[Arm]) -> tuple[str, ...]:
    by_run = {run: arm for arm in arms for run in arm.runs}
    labels = [
        by_run[index].label if len(by_run[index].runs) == 1 else f"{by_run[index].label}, seed {run.seed}"
        for index, run in enumerate(runs)
    ]
    for distinguish in (lambda run: run.name, lambda run: str(run.folder)):
        labels = [
            f"{label}, {distinguish(run)}" if labels.count(label) > 1 else label
            for label, run in zip(labels, runs, strict=True)
        ]
    return tuple(labels)


def show(value: Any) -> str:
    """A configuration value as text: small numbers in their short form, null as "none"."""
    if value is None:
        return "none"
    if isinstance(value, float):
        return formatting.rate(value)
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _unequal_keys(differing: Mapping[str, list[Any]], labels: Sequence[str]) -> list[str]:
    keys = [key for key, values in differing.items() if role(key, values) == "must match"]
    return [f"{key}: {spell(labels, [show(value) for value in differing[key]])}" for key in keys]


def _unequal_budget(runs: Sequence[Run], labels: Sequence[str]) -> list[str]:
    seen = {label: run.samples for label, run in zip(labels, runs, strict=True) if run.diverged_at is None}
    if len(set(seen.values())) < 2:
        return []
    return [f"images seen: {spell([*seen], [formatting.grouped(value) for value in seen.values()])}"]


def _unequal_tiles(runs: Sequence[Run], labels: Sequence[str]) -> list[str]:
    """The recorded pictures themselves: whether the same key shows the same photograph under the same mask."""
    shown = [
        (label, {image.key: image for image in run.reconstructions}) for label, run in zip(labels, runs, strict=True)
    ]
    shown = [(label, images) for label, images in shown if images]
    faults = []
    for label, images in shown[1:]:
        first_label, first = shown[0]
        for tile, what in (("original", "pixels"), ("masked", "mask")):
            unequal = [
                key
                for key in first
                if key in images and not _same(getattr(first[key], tile), getattr(images[key], tile))
            ]
            if unequal:
                which = f"{what} of {len(unequal)} held-out images, such as {unequal[0]}"
                faults.append(f"{which}: {label} differs from {first_label}")
                break  # other pixels make another masked picture: one reason is enough
    return faults


def _same(a: Path, b: Path) -> bool:
    with Image.open(a) as first, Image.open(b) as second:
        return first.size == second.size and np.array_equal(
            np.asarray(first.convert("RGB")), np.asarray(second.convert("RGB"))
        )
