"""Reasons why runs are not comparable: differing data, masks, batch or budget."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from moa_eval.page.formatting import grouped, show, spell
from moa_eval.training.comparison import Method
from moa_eval.training.configuration import BUDGETS, config_difference, role
from moa_eval.training.runs import Run


def incomparable_reasons(methods: Sequence[Method]) -> list[str]:
    """Return the reasons why the losses of these methods are not comparable, one line each.

    The schedule must match among the methods with one baseline, everything else among all runs.
    """
    sets = [[method for method in methods if method.reference is first] for first in methods if not first.baseline]
    runs = [run for method in methods for run in method.runs]
    reasons = [words for key, words in _key_mismatches(runs) if not key.startswith("schedule.")]
    for own in sets:
        members = [run for method in own for run in method.runs]
        reasons += [words for key, words in _key_mismatches(members) if key.startswith("schedule.")]
    return [*reasons, *(reason for own in sets for reason in _budget_mismatch(own))]


def _key_mismatches(runs: Sequence[Run]) -> Iterator[tuple[str, str]]:
    for key, values in config_difference([run.config for run in runs]).items():
        # A budget may be given in different units; what the runs have seen is compared as well.
        given = [value for value in values if value is not None] if key in BUDGETS else values
        if role(key, values) == "must match" and any(value != given[0] for value in given):
            yield key, f"{key}: {spell([run.label for run in runs], [show(value) for value in values])}"


def _budget_mismatch(methods: Sequence[Method]) -> Iterator[str]:
    """Compare what the best groups have seen; runs at other rates and further seeds may be unfinished."""
    compared = []
    for method in methods:
        furthest = max(run.seen for run in method.best_runs)
        compared += [run for run in method.best_runs if run.seen == furthest or run.status == "finished"]
    seen = {run.label: run.seen for run in compared if run.diverged_at is None}
    if len(set(seen.values())) > 1:
        yield f"{compared[0].kind.unit}s seen: {spell([*seen], [grouped(value) for value in seen.values()])}"
