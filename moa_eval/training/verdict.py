"""Facts behind the verdict and its caveats; the templates training_verdict.txt and training_caveats.txt word them."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from moa_eval.page.formatting import rate, show, spell
from moa_eval.page.writing import sentences
from moa_eval.training.comparison import Comparison, Contrast, Method
from moa_eval.training.configuration import config_difference, role
from moa_eval.training.intervals import CONFIDENCE, mean, quotient
from moa_eval.training.runs import Run
from moa_eval.training.tables import cost_rows, probe_rows


def verdict(comparison: Comparison) -> list[str]:
    """Return one or two sentences: the best alternative's difference to the baseline, and its uncertainty.

    Every method is represented by its best group. With several alternatives, the interval is widened for their
    number. Over several sizes, the verdict is on the FFN with the lowest mean difference.
    """
    contrasts = shared_contrasts(comparison)
    finals = [run.final(comparison.metric) for run in comparison.baseline.best_runs if run.is_usable]
    facts: dict[str, Any] = {"case": "none", "finals": finals, "mean": mean(finals)}
    if len({contrast.method.reference for contrast in contrasts}) > 1:
        facts = {"case": "sizes"} | _over_sizes(contrasts)
    elif contrasts:
        best = leading(contrasts)
        facts = {"case": "best", "best": best, "interval": best.adjusted(len(contrasts))}
    return sentences(
        "training_verdict.txt",
        comparison=comparison,
        kind=comparison.kind,
        space=comparison.kind.losses[comparison.metric],
        alternatives=len(contrasts),
        confidence=f"{100 * CONFIDENCE:g} %",
        unfinished=[run for run in comparison.runs if run.status in ("stopped", "failed", "unfinished")],
        **facts,
    )


def caveats(comparison: Comparison) -> list[str]:
    """Return the limits of the verdict and what to read with it, one sentence each."""
    contrasts = shared_contrasts(comparison)
    best = leading(contrasts) if contrasts else None
    runs, methods = comparison.runs, comparison.methods
    rates = [rate(method.groups[0].learning_rate) for method in methods]
    return sentences(
        "training_caveats.txt",
        comparison=comparison,
        kind=comparison.kind,
        best=best,
        families={contrast.method.family for contrast in contrasts},
        tried=[len(method.groups) for method in methods],
        edges=[method for method in methods if method.edge],
        rates="" if comparison.tuned else _if_different(methods, rates),
        equal_rates=[own for own in comparison.equal_rates(comparison.metric) if best and own.method is best.method],
        causes=_causes(comparison),
        seeds=_seeds(comparison),
        other_signs=_other_signs(comparison),
        probes=[row for row in probe_rows(comparison) if best and row["method"] == best.method.label],
        parameters=[(method, _parameters_ratio(method)) for method in comparison.alternatives],
        speed=cost_rows(comparison)[best.method.index]["units_per_s_ratio"] if best else math.nan,
        devices=_if_different(runs, [show(run.device) for run in runs]),
        commits=_if_different(runs, [_short_commit(run) for run in runs]),
    )


def shared_contrasts(comparison: Comparison) -> list[Contrast]:
    """Return the contrasts of the verdict's loss that have a common validation."""
    return [contrast for contrast in comparison.contrasts(comparison.metric) if contrast.seen is not None]


def leading(contrasts: Sequence[Contrast]) -> Contrast:
    """Return the contrast with the lowest loss; over several sizes, with the lowest difference."""
    if len({contrast.method.reference for contrast in contrasts}) > 1:
        return min(contrasts, key=lambda contrast: contrast.interval.mean)
    return min(contrasts, key=lambda contrast: contrast.mean)


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


def _causes(comparison: Comparison) -> dict[tuple[str, ...], list[str]]:
    """Return the labels of the methods that differ from their baseline in other settings, by the config keys."""
    found: dict[tuple[str, ...], list[str]] = {}
    for method in comparison.alternatives:
        differing = config_difference([method.runs[0].config, method.reference.runs[0].config])
        keys = tuple(key for key, values in differing.items() if role(key, values) in ("setting", "size"))
        if keys:
            found.setdefault(keys, []).append(method.label)
    return found


def _seeds(comparison: Comparison) -> str:
    """Return the seeds by method if they differ."""
    methods = [method for method in comparison.methods if method.best]
    seeds = [sorted({run.seed for run in method.best_runs}) for method in methods]
    return _if_different(methods, [", ".join(map(str, own)) for own in seeds])


def _other_signs(comparison: Comparison) -> list[tuple[str, Contrast]]:
    """Return the contrasts in other losses whose sign differs from that in the verdict's loss."""
    return [
        (space, other)
        for loss, space in comparison.kind.losses.items()
        for one, other in zip(comparison.contrasts(comparison.metric), comparison.contrasts(loss), strict=True)
        if one.interval.mean * other.interval.mean < 0
    ]


def _parameters_ratio(method: Method) -> float:
    own, baseline = (side.runs[0].number("parameters", "total") for side in (method, method.reference))
    return quotient(own, baseline)


def _short_commit(run: Run) -> str:
    """Return nine digits of a run's commit, with "-dirty" after local changes."""
    return re.sub(r"^([0-9a-f]{9})[0-9a-f]{31}", r"\1", show(run.environment.get("git_commit")))


def _if_different(owners: Sequence[Any], values: Sequence[str]) -> str:
    """List the values with the labels of their owners; empty if all values are equal."""
    return spell([owner.label for owner in owners], values) if len(set(values)) > 1 else ""
