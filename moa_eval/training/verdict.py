"""Facts behind the verdict and its caveats; the templates training_verdict.txt and training_caveats.txt word them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from moa_eval.page.formatting import rate as show_rate
from moa_eval.page.formatting import show, spell
from moa_eval.page.writing import Row, sentences
from moa_eval.training.comparison import Comparison, Contrast, Method
from moa_eval.training.configuration import config_difference, role
from moa_eval.training.intervals import CONFIDENCE, mean, quotient
from moa_eval.training.probes import probe_rows, unequal_probes
from moa_eval.training.runs import Run
from moa_eval.training.tables import cost_rows, edge, parameter_rows

_PARAMETERS_DIFFER = 0.01
_SPEED_DIFFERS = 0.05


def verdict(comparison: Comparison) -> list[str]:
    """Return one or two sentences: the best alternative's difference to the baseline, and its uncertainty.

    Every method is represented by its best group. With several alternatives, the interval is widened for their
    number. Over several sizes, the verdict is on the FFN with the lowest mean difference.
    """
    contrasts = shared_contrasts(comparison)
    facts: dict[str, Any] = {
        "comparison": comparison,
        "kind": comparison.kind,
        "space": comparison.kind.losses[comparison.metric],
        "alternatives": len(contrasts),
        "confidence": f"{CONFIDENCE:.0%}".replace("%", " %"),
        "unfinished": sum(run.status in ("stopped", "failed", "unfinished") for run in comparison.runs),
    }
    if not contrasts:
        return sentences("training_verdict.txt", case="none", finals=_finals(comparison.baseline, comparison), **facts)
    if len({contrast.method.reference for contrast in contrasts}) > 1:
        return sentences("training_verdict.txt", case="sizes", **facts, **_over_sizes(contrasts))
    best = leading(contrasts)
    interval = best.adjusted(len(contrasts))
    return sentences("training_verdict.txt", case="best", best=best, interval=interval, **facts)


def caveats(comparison: Comparison) -> list[str]:
    """Return the limits of the verdict and what to read with it, one sentence each."""
    contrasts = shared_contrasts(comparison)
    best = leading(contrasts) if contrasts else None
    return sentences(
        "training_caveats.txt",
        comparison=comparison,
        kind=comparison.kind,
        best=best,
        families=len({contrast.method.family for contrast in contrasts}),
        tried={len(method.groups) for method in comparison.methods},
        edges=[(method, edge(method)) for method in comparison.tuned if edge(method)],
        unequal_seeds=_unequal_seeds(comparison),
        rates=_single_rates(comparison),
        equal_rates=_equal_rates(comparison, best),
        by_status={
            status: [run for run in comparison.runs if run.status == status]
            for status in ("diverged", "stopped", "failed", "unfinished")
        },
        started=[run.label for run in comparison.runs if run.settings.get("start_from")],
        repeated=[
            group.label for group in comparison.groups if len({run.seed for run in group.runs}) < len(group.runs)
        ],
        causes=_causes(comparison),
        seeds=_seeds(comparison),
        other_signs=_other_signs(comparison),
        controls=_controls(comparison),
        probes=_probes(comparison, best),
        unequal_probes=unequal_probes(comparison),
        parameters=_parameters(comparison),
        speed=_speed(comparison, best),
        devices=_labelled(comparison.runs, [show(run.device) for run in comparison.runs]),
    )


def shared_contrasts(comparison: Comparison) -> list[Contrast]:
    """Return the contrasts of the verdict's loss that have a common validation."""
    return [contrast for contrast in comparison.contrasts(comparison.metric) if contrast.seen is not None]


def leading(contrasts: Sequence[Contrast]) -> Contrast:
    """Return the contrast with the lowest loss; over several sizes, with the lowest difference."""
    if len({contrast.method.reference for contrast in contrasts}) > 1:
        return min(contrasts, key=lambda contrast: contrast.interval.mean)
    return min(contrasts, key=lambda contrast: contrast.mean)


def _finals(method: Method, comparison: Comparison) -> list[float]:
    """Return the final losses of a method that has nothing to be compared with."""
    return [run.final(comparison.metric) for run in (method.best.runs if method.best else ()) if run.is_usable]


def _over_sizes(contrasts: Sequence[Contrast]) -> dict[str, Any]:
    by_ffn: dict[str, list[Contrast]] = {}
    for contrast in contrasts:
        by_ffn.setdefault(contrast.method.name, []).append(contrast)
    leader = min(by_ffn, key=lambda ffn: mean(contrast.interval.mean for contrast in by_ffn[ffn]))
    own = by_ffn[leader]
    return {
        "leader": leader,
        "ffns": len(by_ffn),
        "own": own,
        "below": sum(contrast.interval.mean < 0 for contrast in own),
        "single": sum(min(len(contrast.losses), len(contrast.baseline_losses)) < 2 for contrast in own),
        "sure": sum(contrast.adjusted(len(contrasts)).excludes_zero for contrast in own),
    }


def _unequal_seeds(comparison: Comparison) -> list[tuple[str, int, int]]:
    """Return the methods whose learning rates have different numbers of complete seeds, with the extremes."""
    found = []
    for method in comparison.tuned:
        counts = {len(group.final_losses(comparison.metric)) for group in method.groups} - {0}
        if len(counts) > 1:
            found.append((method.label, min(counts), max(counts)))
    return found


def _single_rates(comparison: Comparison) -> str:
    """Return the learning rates of methods that were trained at one each, empty if they are equal."""
    rates = [show_rate(method.groups[0].learning_rate) for method in comparison.methods]
    return "" if comparison.tuned else _labelled(comparison.methods, rates)


def _equal_rates(comparison: Comparison, best: Contrast | None) -> dict[str, Any] | None:
    """Return the contrasts of the verdict's method at its baseline's learning rates, where rates were tuned."""
    if best is None or not comparison.tuned:
        return None
    common = [own for own in comparison.equal_rates(comparison.metric) if own.method is best.method]
    finished = [own for own in common if own.seen == best.seen]
    below = sum(own.interval.mean < 0 for own in finished)
    return {"finished": finished, "below": below, "is_partial": len(finished) < len(common)}


def _causes(comparison: Comparison) -> list[tuple[list[str], list[str]]]:
    """Return the settings other than FFN and learning rate that differ from the baseline, with the methods' labels."""
    found: dict[tuple[str, ...], list[str]] = {}
    for method in comparison.alternatives:
        differing = config_difference([method.runs[0].config, method.reference.runs[0].config])
        keys = tuple(key for key, values in differing.items() if role(key, values) in ("setting", "size"))
        if keys:
            found.setdefault(keys, []).append(method.label)
    return [([*keys], labels) for keys, labels in found.items()]


def _seeds(comparison: Comparison) -> str:
    """Return the seeds by method if a method shares none with the baseline."""
    methods = [method for method in comparison.methods if method.best]
    seeds = [sorted({run.seed for run in method.best_runs}) for method in methods]
    if not any(set(own).isdisjoint(seeds[0]) for own in seeds[1:]):
        return ""
    return spell([method.label for method in methods], [", ".join(map(str, own)) for own in seeds])


def _other_signs(comparison: Comparison) -> list[tuple[str, Contrast]]:
    """Return the contrasts in other losses whose sign differs from that in the verdict's loss."""
    return [
        (space, other)
        for loss, space in comparison.kind.losses.items()
        for one, other in zip(comparison.contrasts(comparison.metric), comparison.contrasts(loss), strict=True)
        if one.interval.mean * other.interval.mean < 0
    ]


def _controls(comparison: Comparison) -> dict[str, list[Row]]:
    """Return the rows of parameters and differences by baseline that has a control, the control first."""
    rows = [row for row in parameter_rows(comparison) if not math.isnan(row["difference"])]
    baselines = dict.fromkeys(row["baseline"] for row in rows if row["is_control"])
    return {
        baseline: sorted((row for row in rows if row["baseline"] == baseline), key=lambda row: not row["is_control"])
        for baseline in baselines
    }


def _probes(comparison: Comparison, best: Contrast | None) -> list[Row]:
    rows = [row for row in probe_rows(comparison) if best and row["contender"] == best.method.label]
    return [row for row in rows if not math.isnan(row["difference"])]


def _parameters(comparison: Comparison) -> list[tuple[Method, float]]:
    """Return the methods whose number of parameters differs from the baseline's, with the ratio."""
    ratios = [
        (method, quotient(*(own.runs[0].number("parameters", "total") for own in (method, method.reference))))
        for method in comparison.alternatives
    ]
    return [(method, ratio) for method, ratio in ratios if abs(ratio - 1) > _PARAMETERS_DIFFER]


def _speed(comparison: Comparison, best: Contrast | None) -> float | None:
    """Return the throughput of the verdict's method relative to its baseline, None if it is about equal."""
    if best is None:
        return None
    ratio = cost_rows(comparison)[best.method.index]["units_per_s_ratio"]
    return ratio if abs(ratio - 1) > _SPEED_DIFFERS else None


def _labelled(owners: Sequence[Run] | Sequence[Method], values: Sequence[str]) -> str:
    """Return the values with their owners' labels, empty if all values are equal."""
    return spell([owner.label for owner in owners], values) if len(set(values)) > 1 else ""
