"""The comparison in words: one or two sentences of verdict, and what to keep in mind when reading them."""

import math
from collections.abc import Sequence

from moa_eval.page import formatting
from moa_eval.training.comparison import CONFIDENCE, Comparison, Contrast, mean, quotient, show, spell

SPACES = {"loss_norm": "normalized space", "loss_pixel": "pixel space"}


def verdict(comparison: Comparison) -> list[str]:
    """One or two sentences: the difference to the baseline in final reconstruction loss, and how sure it is."""
    contrasts = [contrast for contrast in comparison.contrasts(comparison.metric) if contrast.samples is not None]
    if not contrasts:
        return [_no_difference(comparison)]
    best = min(contrasts, key=lambda contrast: mean(contrast.values.values()))
    return [_difference(comparison, best), _certainty(comparison, best)]


def caveats(comparison: Comparison) -> list[str]:
    """What limits the verdict, one sentence each; empty if nothing does."""
    return [
        *_choice_caveats(comparison),
        *_run_caveats(comparison),
        *_cause_caveats(comparison),
        *_space_caveats(comparison),
        *_cost_caveats(comparison),
    ]


def _difference(comparison: Comparison, contrast: Contrast) -> str:
    arm, baseline = comparison.arms[contrast.arm].label, comparison.arms[0].label
    value, reference = mean(contrast.values.values()), mean(contrast.baseline.values())
    centre = contrast.interval.mean
    direction = "below" if centre < 0 else "above" if centre > 0 else "from"
    average = "on average " if max(len(contrast.values), len(contrast.baseline)) > 1 else ""
    size = f"{formatting.signed(centre)[1:]} ({formatting.share(contrast.relative)}) {direction} {baseline}"
    return (
        f"{arm} is {average}{size} in validation reconstruction loss: "
        f"{formatting.loss(value)} against {formatting.loss(reference)} "
        f"after {formatting.grouped(contrast.samples or 0)} images ({SPACES[comparison.metric]})."
    )


def _certainty(comparison: Comparison, contrast: Contrast) -> str:
    sides = [(comparison.arms[contrast.arm].label, contrast.values), (comparison.arms[0].label, contrast.baseline)]
    if comparison.incomparable:
        return "The runs are not comparable as they stand: this is no evidence about the FFN."
    single = [label for label, values in sides if len(values) < 2]
    if single:
        return f"One seed{f' of {single[0]}' if len(single) == 1 else ''}: not evidence of a general difference."
    centre, low, high, paired = contrast.interval
    seeds = f"{len(contrast.values)} paired" if paired else f"{len(contrast.values)} and {len(contrast.baseline)}"
    reading = (
        "includes zero: these seeds do not settle which is better"
        if low <= 0 <= high
        else f"excludes zero: in this setting the {'lower' if centre < 0 else 'higher'} loss is more than seed noise"
    )
    limits = f"{formatting.signed(low)} to {formatting.signed(high)}"
    return f"The {CONFIDENCE * 100:.0f} % interval over {seeds} seeds, {limits}, {reading}."


def _no_difference(comparison: Comparison) -> str:
    baseline = comparison.arms[0].label
    if len(comparison.arms) > 1:
        return f"No other FFN shares a validation of finite loss with {baseline}: there is no difference to report."
    runs = [run for run in comparison.runs if run.diverged_at is None and len(run.validation["step"])]
    if not runs:
        return f"{baseline} has no validation of finite loss, and there is nothing to compare it with."
    finals = [float(run.validation[comparison.metric][-1]) for run in runs]
    average = f"on average over {len(finals)} runs " if len(finals) > 1 else ""
    return (
        f"{baseline} has {average}a validation reconstruction loss of {formatting.loss(mean(finals))} "
        f"({SPACES[comparison.metric]}); there is nothing to compare it with."
    )


def _choice_caveats(comparison: Comparison) -> list[str]:
    others = len(comparison.arms) - 1
    return [f"The verdict takes the best of {others} alternatives, which flatters it."] if others > 1 else []


def _run_caveats(comparison: Comparison) -> list[str]:
    notes = []
    for run, label in zip(comparison.runs, comparison.labels, strict=True):
        if run.diverged_at is not None:
            step = formatting.grouped(run.diverged_at)
            notes.append(
                f"{label} diverged: its loss or gradient is not finite at step {step}; the verdict leaves it out."
            )
        elif run.status != "finished":
            notes.append(f"{label} is {run.status}: it has seen {formatting.grouped(run.samples)} images.")
        recorded = run.figure("final", "loss_norm")
        if len(run.validation["step"]) and math.isfinite(recorded) and recorded != run.validation["loss_norm"][-1]:
            notes.append(f"{label}: summary.json has another final loss than metrics.jsonl, which is what is shown.")
    for arm in comparison.arms:
        seeds = [comparison.runs[run].seed for run in arm.runs]
        if len(set(seeds)) < len(seeds):
            notes.append(f"{arm.label} has runs of the same seed; they count as one observation.")
    return notes


def _cause_caveats(comparison: Comparison) -> list[str]:
    notes = []
    if len({run.peak_lr for run in comparison.runs}) > 1:
        rates = [formatting.rate(comparison.runs[arm.runs[0]].peak_lr) for arm in comparison.arms]
        notes.append(f"Peak learning rates differ: {spell([arm.label for arm in comparison.arms], rates)}.")
    if settings := comparison.keys("setting"):
        notes.append(f"More than FFN and peak rate differs ({_and(settings)}): a difference is not the FFN's alone.")
    seeds = [{comparison.runs[run].seed for run in arm.runs} for arm in comparison.arms]
    if any(own.isdisjoint(seeds[0]) for own in seeds[1:]):
        shown = [_and([str(seed) for seed in sorted(own)]) for own in seeds]
        notes.append(f"Seeds differ: {spell([arm.label for arm in comparison.arms], shown)}.")
    return notes


def _space_caveats(comparison: Comparison) -> list[str]:
    """The other loss may point the other way."""
    other = next(loss for loss in SPACES if loss != comparison.metric)
    notes = []
    for one, two in zip(comparison.contrasts(comparison.metric), comparison.contrasts(other), strict=True):
        if one.interval.mean * two.interval.mean < 0:
            shown = formatting.signed(two.interval.mean)
            notes.append(f"In {SPACES[other]} {comparison.arms[one.arm].label} has the other sign: {shown}.")
    return notes


def _cost_caveats(comparison: Comparison) -> list[str]:
    notes = []
    totals = [comparison.runs[arm.runs[0]].figure("parameters", "total") for arm in comparison.arms]
    for arm, total in zip(comparison.arms[1:], totals[1:], strict=True):
        share = quotient(total, totals[0])
        if abs(share - 1) > 0.01:
            notes.append(f"{arm.label} has {formatting.ratio(share)} the parameters of {comparison.arms[0].label}.")
    devices = [show(run.device) for run in comparison.runs]
    if len(set(devices)) > 1:
        notes.append(f"Devices differ, so speed and memory do not compare: {spell(comparison.labels, devices)}.")
    return notes


def _and(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
