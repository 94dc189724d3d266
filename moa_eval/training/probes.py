"""What the encoders of training runs are worth in classification: tables of what scripts/probe.py measured."""

import math

from moa_eval.page.formatting import show
from moa_eval.page.writing import Row
from moa_eval.training.comparison import Comparison, Contender
from moa_eval.training.runs import Probe, Run
from moa_eval.training.seeds import by_seed, deviation, difference, mean


def probe_rows(comparison: Comparison) -> list[Row]:
    """What the encoders of every contender's best arm are worth: a row a contender and measurement, over seeds."""
    rows = []
    for name in _probe_names(comparison):
        measured = [_measured(comparison, contender, name) for contender in comparison.contenders]
        accuracies = [by_seed([run for run, _ in own], [probe.accuracy for _, probe in own]) for own in measured]
        for contender, found, values in zip(comparison.contenders, measured, accuracies, strict=True):
            if not found:
                continue
            baseline = {} if contender.baseline is None else accuracies[contender.baseline]
            gap = difference(values, baseline) if baseline else None
            rows.append(
                {
                    "probe": name,
                    "method": found[0][1].method,
                    "contender": contender.label,
                    "rate": math.nan if contender.best is None else comparison.arms[contender.best].rate,
                    "seeds": len(values),
                    "accuracy": mean(values.values()),
                    "accuracy_sd": deviation(values.values()),
                    "top5": mean(probe.top5 for _, probe in found),
                    "difference": gap.mean if gap else math.nan,
                    "low_95": gap.low if gap else math.nan,
                    "high_95": gap.high if gap else math.nan,
                    "val_samples": min(probe.val_samples for _, probe in found),
                }
            )
    return rows


def probe_run_rows(comparison: Comparison) -> list[Row]:
    """A row a run and measurement of its encoder, of all runs."""
    return [
        {
            "run": label,
            "probe": probe.name,
            "method": probe.method,
            "accuracy": probe.accuracy,
            "top5": probe.top5,
            "step": "" if probe.step is None else probe.step,
            "train": probe.train,
            "train_samples": probe.train_samples,
            "val": probe.val,
            "val_samples": probe.val_samples,
            "settings": show(probe.settings),
        }
        for label, run in zip(comparison.labels, comparison.runs, strict=True)
        for probe in run.probes
    ]


def unequal_probes(comparison: Comparison) -> dict[str, list[str]]:
    """Measurements that were not taken in the same way for all runs: name -> what differs."""
    unequal = {}
    for name in _probe_names(comparison):
        probes = [probe for run in comparison.runs for probe in run.probes if probe.name == name]
        keys = [key for key in ("train", "val", "settings") if len({show(getattr(probe, key)) for probe in probes}) > 1]
        if keys:
            unequal[name] = keys
    return unequal


def _measured(comparison: Comparison, contender: Contender, name: str) -> list[tuple[Run, Probe]]:
    """The runs of a contender's best arm that have a measurement, with it."""
    runs = [] if contender.best is None else [comparison.runs[run] for run in comparison.arms[contender.best].runs]
    return [(run, probe) for run in runs for probe in run.probes if probe.name == name]


def _probe_names(comparison: Comparison) -> list[str]:
    order = ("knn", "linear", "finetune")
    names = {probe.name: probe.method for run in comparison.runs for probe in run.probes}
    return sorted(names, key=lambda name: (order.index(names[name]) if names[name] in order else len(order), name))
