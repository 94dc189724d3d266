"""Tables of probing accuracy, measured by scripts/probe.py."""

from __future__ import annotations

from dataclasses import asdict

from moa_eval.page.formatting import show
from moa_eval.page.writing import Row
from moa_eval.training.comparison import Comparison, Method
from moa_eval.training.intervals import UNKNOWN, by_seed, deviation, difference, mean
from moa_eval.training.runs import Probe, Run

_ORDER = ("knn", "linear", "finetune")


def probe_rows(comparison: Comparison) -> list[Row]:
    """Return a row per measurement and method: accuracy of the runs of its best group, over seeds."""
    rows = []
    for name in probe_names(comparison):
        measured = {method: _measured(method, name) for method in comparison.methods}
        accuracies = {
            method: by_seed([*own], [probe.accuracy for probe in own.values()]) for method, own in measured.items()
        }
        for method, probes in measured.items():
            values = accuracies[method]
            baseline = accuracies[method.baseline] if method.baseline else {}
            gap = difference(values, baseline) if baseline else UNKNOWN
            row: Row = {
                "probe": name,
                "probe_method": next((probe.method for probe in probes.values()), ""),
                "method": method.label,
                "rate": method.best_rate,
                "seeds": len(values),
                "accuracy": mean(values.values()),
                "accuracy_sd": deviation(values.values()),
                "top5": mean(probe.top5 for probe in probes.values()),
                "difference": gap.mean,
                "low_95": gap.low,
                "high_95": gap.high,
                "val_samples": min((probe.val_samples for probe in probes.values()), default=0),
            }
            rows += [row] if probes else []
    return rows


def probe_run_rows(comparison: Comparison) -> list[Row]:
    """Return a row per run and measurement."""
    rows = []
    for run in comparison.runs:
        for probe in run.probes:
            values = asdict(probe) | {
                "step": "" if probe.step is None else probe.step,
                "settings": show(probe.settings),
            }
            names = {"probe": values.pop("name"), "probe_method": values.pop("method")}
            rows.append({"run": run.label, **names, **values})
    return rows


def probe_names(comparison: Comparison) -> list[str]:
    """Return the names of all measurements: nearest neighbours, linear probes, fine-tuning, then others."""
    names = {probe.name: probe.method for run in comparison.runs for probe in run.probes}
    return sorted(names, key=lambda name: ([*_ORDER, names[name]].index(names[name]), name))


def _measured(method: Method, name: str) -> dict[Run, Probe]:
    runs = method.best.runs if method.best else ()
    return {run: probe for run in runs for probe in run.probes if probe.name == name}
