"""The comparison in words: one or two sentences of verdict, and what to keep in mind when reading them."""

import math
from collections.abc import Sequence

from moa_eval.page import formatting
from moa_eval.page.formatting import enumerate_words, show, spell
from moa_eval.training.comparison import Comparison, Contender, Contrast
from moa_eval.training.configuration import config_difference, role
from moa_eval.training.probes import probe_rows, unequal_probes
from moa_eval.training.seeds import CONFIDENCE, mean, quotient
from moa_eval.training.tables import cost_rows, edge, parameter_rows

_METHODS = {"knn": "k-nearest-neighbour", "linear": "linear-probe", "finetune": "fine-tuned"}
_UNFINISHED = ("stopped", "failed", "unfinished")
_NAMED = 4  # runs or contenders listed in a sentence
_NO_EVIDENCE = "The runs are not comparable as they stand: this is no evidence about the FFN."


def verdict(comparison: Comparison) -> list[str]:
    """One or two sentences: the best alternative's difference to the baseline in final loss, and how sure it is.

    Every contender speaks by its best arm. With several alternatives the interval is widened for all of them. Over
    several sizes it is the FFN with the lowest mean difference, size by size.
    """
    contrasts = _shared(comparison)
    if not contrasts:
        return [_no_difference(comparison)]
    if len({contrast.reference for contrast in contrasts}) > 1:
        return _over_sizes(comparison, contrasts)
    best = _leading(contrasts)
    return [_difference(comparison, best, len(contrasts)), _certainty(comparison, best, len(contrasts))]


def caveats(comparison: Comparison) -> list[str]:
    """What limits the verdict, and what else it should be read with, one sentence each; empty if nothing does."""
    return [
        *_choice_caveats(comparison),
        *_rate_caveats(comparison),
        *_equal_rate_caveats(comparison),
        *_run_caveats(comparison),
        *_cause_caveats(comparison),
        *_space_caveats(comparison),
        *_parameter_notes(comparison),
        *_probe_notes(comparison),
        *_cost_caveats(comparison),
    ]


def _shared(comparison: Comparison) -> list[Contrast]:
    return [contrast for contrast in comparison.contrasts(comparison.metric) if contrast.seen is not None]


def _leading(contrasts: Sequence[Contrast]) -> Contrast:
    """The one with the lowest loss; of several sizes, with the lowest difference."""
    if len({contrast.reference for contrast in contrasts}) > 1:
        return min(contrasts, key=lambda contrast: contrast.interval.mean)
    return min(contrasts, key=lambda contrast: mean(contrast.values.values()))


def _contender(comparison: Comparison, arm: int) -> Contender:
    return comparison.contenders[comparison.contender_of(comparison.arms[arm].runs[0])]


def _at_rate(comparison: Comparison, arm: int) -> str:
    """The contender, with the rate of the arm where there was a choice."""
    contender = _contender(comparison, arm)
    rate = f" at its best rate ({formatting.rate(comparison.arms[arm].rate)})" if contender.chosen else ""
    return contender.label + rate


def _difference(comparison: Comparison, contrast: Contrast, alternatives: int) -> str:
    arm, reference = (_at_rate(comparison, side) for side in (contrast.arm, contrast.reference))
    value, baseline = mean(contrast.values.values()), mean(contrast.baseline.values())
    centre = contrast.interval.mean
    if alternatives > 1 and centre < 0:
        arm = f"{arm}, the lowest of {alternatives} alternatives,"
    elif alternatives > 1:
        arm = f"{arm}, the nearest of {alternatives} alternatives,"
    average = "on average " if max(len(contrast.values), len(contrast.baseline)) > 1 else ""
    gap = formatting.signed(abs(centre)).lstrip("+")
    size = f"{gap} ({formatting.share(contrast.relative)}) {_direction(centre)} {reference}"
    return (
        f"{arm} is {average}{size} in validation {comparison.kind.objective}: "
        f"{formatting.loss(value)} against {formatting.loss(baseline)} "
        f"after {formatting.grouped(contrast.seen or 0)} {comparison.kind.unit}s "
        f"({comparison.kind.losses[comparison.metric]})."
    )


def _over_sizes(comparison: Comparison, contrasts: Sequence[Contrast]) -> list[str]:
    by_ffn: dict[str, list[Contrast]] = {}
    for contrast in contrasts:
        by_ffn.setdefault(_contender(comparison, contrast.arm).ffn, []).append(contrast)
    leader = min(by_ffn, key=lambda ffn: mean(contrast.interval.mean for contrast in by_ffn[ffn]))
    own, baseline = by_ffn[leader], comparison.contenders[0].ffn
    below = sum(contrast.interval.mean < 0 for contrast in own)
    gaps = [
        f"{formatting.signed(contrast.interval.mean)} ({_contender(comparison, contrast.arm).size})" for contrast in own
    ]
    among = f", the lowest of {len(by_ffn)} alternatives on average," if len(by_ffn) > 1 else ""
    size = "size" if len(own) == 1 else "sizes"
    first = (
        f"{leader}{among} is below {baseline} at {below} of {len(own)} {size} in validation "
        f"{comparison.kind.objective}: {enumerate_words(gaps)}."
    )
    return [first, _certainty_over_sizes(comparison, own, len(contrasts))]


def _certainty_over_sizes(comparison: Comparison, own: Sequence[Contrast], comparisons: int) -> str:
    if comparison.incomparable:
        return _NO_EVIDENCE
    single = sum(min(len(contrast.values), len(contrast.baseline)) < 2 for contrast in own)
    if single:
        where = "" if single == len(own) else f" at {single} of {len(own)} sizes"
        return f"{_provisional(comparison)}One seed{where}: not evidence of a general difference."
    sure = sum(not low <= 0 <= high for _, low, high, _ in (contrast.adjusted(comparisons) for contrast in own))
    return (
        f"{_provisional(comparison)}The {CONFIDENCE * 100:.0f} % interval over seeds, widened for {comparisons} "
        f"comparisons, excludes zero at {sure} of {len(own)} sizes."
    )


def _direction(difference: float) -> str:
    return "below" if difference < 0 else "above" if difference > 0 else "from"


def _certainty(comparison: Comparison, contrast: Contrast, alternatives: int) -> str:
    sides = [(contrast.arm, contrast.values), (contrast.reference, contrast.baseline)]
    if comparison.incomparable:
        return _NO_EVIDENCE
    early = _provisional(comparison)
    single = [_contender(comparison, arm).label for arm, values in sides if len(values) < 2]
    if single:
        whose = f" of {single[0]}" if len(single) == 1 else ""
        return f"{early}One seed{whose}: not evidence of a general difference."
    centre, low, high, paired = contrast.adjusted(alternatives)
    seeds = f"{len(contrast.values)} paired" if paired else f"{len(contrast.values)} and {len(contrast.baseline)}"
    widened = f", widened for {alternatives} alternatives" if alternatives > 1 else ""
    reading = (
        "includes zero: these seeds do not settle which is better"
        if low <= 0 <= high
        else f"excludes zero: in this setting the {'lower' if centre < 0 else 'higher'} loss is more than seed noise"
    )
    limits = f"{formatting.signed(low)} to {formatting.signed(high)}"
    return f"{early}The {CONFIDENCE * 100:.0f} % interval over {seeds} seeds{widened}, {limits}, {reading}."


def _provisional(comparison: Comparison) -> str:
    unfinished = sum(run.status in _UNFINISHED for run in comparison.runs)
    return f"Provisional: {unfinished} of {len(comparison.runs)} runs are unfinished. " if unfinished else ""


def _no_difference(comparison: Comparison) -> str:
    baseline = comparison.contenders[0]
    if len(comparison.contenders) > 1 and baseline.best is None:
        missing = f"{baseline.label} has no rate at which every run came to the end with a finite loss"
        return f"{missing}: there is nothing to compare with."
    if len(comparison.contenders) > 1:
        shares = "No other FFN shares a validation of finite loss with"
        return f"{shares} {baseline.label}: there is no difference to report."
    if baseline.best is None:
        return f"{baseline.label} has no validation of finite loss, and there is nothing to compare it with."
    runs = [comparison.runs[run] for run in comparison.arms[baseline.best].runs]
    finals = [
        float(run.validation[comparison.metric][-1])
        for run in runs
        if run.diverged_at is None and len(run.validation["step"])
    ]
    average = f"on average over {len(finals)} runs " if len(finals) > 1 else ""
    return (
        f"{_at_rate(comparison, baseline.best)} has {average}a validation {comparison.kind.objective} of "
        f"{formatting.loss(mean(finals))} ({comparison.kind.losses[comparison.metric]}); "
        "there is nothing to compare it with."
    )


def _choice_caveats(comparison: Comparison) -> list[str]:
    others = len({_contender(comparison, contrast.arm).family for contrast in _shared(comparison)})
    if others < 2:
        return []
    return [
        f"The verdict takes the best of {others} alternatives, which flatters it; intervals in tables are as for one."
    ]


def _rate_caveats(comparison: Comparison) -> list[str]:
    """How the rates were picked."""
    notes = []
    chosen = [contender for contender in comparison.contenders if contender.chosen]
    labels = [contender.label for contender in comparison.contenders]
    if chosen:
        tried = [len(contender.arms) for contender in comparison.contenders]
        words = "The best rate is picked by the validation loss that is reported"
        if len(set(tried)) == 1:
            notes.append(f"{words}, of {tried[0]} each; intervals take the pick as given.")
        else:
            counts = spell(labels, [*map(str, tried)])
            notes.append(f"{words}, of {counts} rates: more rates flatter, and intervals take the pick as given.")
    notes += _edge_caveats(comparison, chosen)
    for contender in chosen:
        complete = [
            {comparison.runs[run].seed for run in comparison.arms[arm].runs if not comparison.falls_short(run)}
            for arm in contender.arms
        ]
        seeds = {len(own) for own in complete if own}
        if len(seeds) > 1:
            notes.append(f"The rates of {contender.label} were tried with {min(seeds)} to {max(seeds)} seeds.")
    for contender in comparison.contenders:
        if contender.chosen and contender.best is None:
            notes.append(f"{contender.label} has no rate at which every run came to the end with a finite loss.")
    rates = {arm.rate for arm in comparison.arms}
    if not chosen and len(rates) > 1:
        shown = [formatting.rate(comparison.arms[contender.arms[0]].rate) for contender in comparison.contenders]
        notes.append(f"Peak learning rates differ: {spell(labels, shown)}.")
    return notes


def _edge_caveats(comparison: Comparison, chosen: Sequence[Contender]) -> list[str]:
    """Best rates at an edge of those tried: one by one, or counted where they are many."""
    edges = {
        contender.label: (comparison.arms[contender.best].rate, edge(comparison, contender))
        for contender in chosen
        if contender.best is not None and edge(comparison, contender)
    }
    if len(edges) > _NAMED:
        sides = [side for _, side in edges.values()]
        counts = [f"the {side} for {sides.count(side)}" for side in ("lowest", "highest") if side in sides]
        words = f"The best rate is at the edge of those tried for {len(edges)} of {len(chosen)}"
        return [f"{words} ({enumerate_words(counts)}): a better one may lie beyond."]
    further = {"lowest": "lower", "highest": "higher"}
    return [
        f"The best rate of {label}, {formatting.rate(rate)}, is the {at} tried: a {further[at]} one may be better."
        for label, (rate, at) in edges.items()
    ]


def _equal_rate_caveats(comparison: Comparison) -> list[str]:
    """The verdict's contender at the baseline's rates, where rates were picked."""
    if not _shared(comparison) or not any(contender.chosen for contender in comparison.contenders):
        return []
    leading = _leading(_shared(comparison))
    leader, baseline = (_contender(comparison, arm) for arm in (leading.arm, leading.reference))
    common = [own for own in comparison.equal_rates(comparison.metric) if own.arm in leader.arms]
    equal = [own for own in common if own.seen == leading.seen]  # not where one is still being trained
    if not equal:
        return [f"{leader.label} and {baseline.label} have no rate in common at which both came to the end."]
    below = sum(contrast.interval.mean < 0 for contrast in equal)
    which = " that are finished" if len(equal) < len(common) else ""
    listed = enumerate_words(
        [
            f"{formatting.signed(contrast.interval.mean)} at {formatting.rate(comparison.arms[contrast.arm].rate)}"
            for contrast in equal
        ]
    )
    return [f"At equal rates {leader.label} is below {baseline.label} at {below} of {len(equal)}{which}: {listed}."]


def _run_caveats(comparison: Comparison) -> list[str]:
    notes = []
    labelled = list(zip(comparison.runs, comparison.labels, strict=True))
    diverged = [
        f"{label} (step {formatting.grouped(run.diverged_at)})"
        for run, label in labelled
        if run.diverged_at is not None
    ]
    if diverged:
        notes.append(
            f"Diverged, with a loss or gradient that is not finite, and left out: {enumerate_words(diverged)}."
        )
    for status in _UNFINISHED:
        own = [
            f"{label} ({formatting.grouped(run.seen)} {run.unit}s)" for run, label in labelled if run.status == status
        ]
        if own:
            notes.append(f"{status.capitalize()}: {enumerate_words(own)}.")
    for run, label in labelled:
        recorded = run.figure("final", comparison.metric)
        last = run.validation[comparison.metric][-1:]
        if len(last) and math.isfinite(recorded) and recorded != last[0]:
            notes.append(f"{label}: summary.json has another final loss than metrics.jsonl, which is what is shown.")
    begun = [label for run, label in labelled if run.config.get("start_from")]
    if begun:
        who = enumerate_words(begun) if len(begun) <= _NAMED else f"{len(begun)} of {len(labelled)} runs"
        counted = "its rows begin there, tokens, FLOPs and time count from the start of that run"
        notes.append(f"Begun with a checkpoint of another run: {who}; {counted}.")
    for arm in comparison.arms:
        seeds = [comparison.runs[run].seed for run in arm.runs]
        if len(set(seeds)) < len(seeds):
            notes.append(f"{arm.label} has runs of the same seed; they count as one observation.")
    return notes


def _cause_caveats(comparison: Comparison) -> list[str]:
    notes = []
    others: dict[tuple[str, ...], list[str]] = {}
    for index in comparison.alternatives:
        sides = (comparison.contenders[index], comparison.baseline_of(index))
        configs = [comparison.runs[comparison.arms[side.arms[0]].runs[0]].config for side in sides]
        differing = config_difference(configs).items()
        keys = tuple(key for key, values in differing if role(key, values) in ("setting", "size"))
        others.setdefault(keys, []).append(sides[0].label)
    for keys, labels in others.items():
        if keys:
            whose = f" for {enumerate_words(labels)}" if len(others) > 1 else ""
            listed = f"{whose} ({enumerate_words(keys)})"
            notes.append(f"More than FFN and peak rate differs{listed}: a difference is not the FFN's alone.")
    best = [(own.label, own.best) for own in comparison.contenders if own.best is not None]
    seeds = [{comparison.runs[run].seed for run in comparison.arms[arm].runs} for _, arm in best]
    if any(own.isdisjoint(seeds[0]) for own in seeds[1:]):
        shown = [enumerate_words([str(seed) for seed in sorted(own)]) for own in seeds]
        notes.append(f"Seeds differ: {spell([label for label, _ in best], shown)}.")
    return notes


def _space_caveats(comparison: Comparison) -> list[str]:
    """Another loss may point the other way."""
    notes = []
    for loss, space in comparison.kind.losses.items():
        pairs = zip(comparison.contrasts(comparison.metric), comparison.contrasts(loss), strict=True)
        for one, two in pairs:
            if one.interval.mean * two.interval.mean < 0:
                label, shown = _contender(comparison, one.arm).label, formatting.signed(two.interval.mean)
                notes.append(f"In {space} {label} has the other sign: {shown}.")
    return notes


def _probe_notes(comparison: Comparison) -> list[str]:
    """What the encoders of the verdict's two sides are worth in classification, where both were measured."""
    notes = []
    leaders = [_contender(comparison, _leading(shared).arm).label] if (shared := _shared(comparison)) else []
    for row in probe_rows(comparison):
        if row["contender"] not in leaders or math.isnan(row["difference"]):
            continue
        gap, accuracy = row["difference"], row["accuracy"]
        baseline = _contender(comparison, _leading(shared).reference).label
        method = _METHODS.get(row["method"], row["method"])
        limits = f"95 % interval {formatting.points(row['low_95'])} to {formatting.points(row['high_95'])}"
        notes.append(
            f"{row['contender']}'s encoder is {formatting.points(abs(gap)).lstrip('+')} points {_direction(gap)} "
            f"{baseline}'s in {method} accuracy ({row['probe']}): "
            f"{formatting.accuracy(accuracy)} % against {formatting.accuracy(accuracy - gap)} % "
            f"({'one seed' if math.isnan(row['low_95']) else limits})."
        )
    for name, keys in unequal_probes(comparison).items():
        notes.append(f"The runs were not all measured in the same way in {name}: {enumerate_words(keys)} differ.")
    return notes


def _parameter_notes(comparison: Comparison) -> list[str]:
    """What parameters alone are worth, where a wider baseline says."""
    rows = parameter_rows(comparison)
    notes = []
    for baseline in dict.fromkeys(row["baseline"] for row in rows if row["is_control"]):
        own = [row for row in rows if row["baseline"] == baseline and not math.isnan(row["difference"])]
        words = [
            f"{row['contender']} {formatting.signed(row['difference'])} for "
            f"{formatting.percent(row['parameters_ratio'] - 1)} parameters"
            for row in sorted(own, key=lambda row: not row["is_control"])
        ]
        if words:
            notes.append(f"Parameters against gain over {baseline}: {enumerate_words(words)}.")
    return notes


def _cost_caveats(comparison: Comparison) -> list[str]:
    notes = []
    for index in comparison.alternatives:
        sides = (comparison.contenders[index], comparison.baseline_of(index))
        own, baseline = (comparison.runs[comparison.arms[side.arms[0]].runs[0]] for side in sides)
        share = quotient(own.figure("parameters", "total"), baseline.figure("parameters", "total"))
        if abs(share - 1) > 0.01:
            notes.append(f"{sides[0].label} has {formatting.ratio(share)} the parameters of {sides[1].label}.")
    notes += _speed_caveats(comparison)
    devices = [show(run.device) for run in comparison.runs]
    if len(set(devices)) > 1:
        notes.append(f"Devices differ, so speed and memory do not compare: {spell(comparison.labels, devices)}.")
    return notes


def _speed_caveats(comparison: Comparison) -> list[str]:
    """The verdict is after equal images or tokens: how far that is from equal time."""
    shared = _shared(comparison)
    if not shared:
        return []
    leading = _leading(shared)
    leader, baseline = (_contender(comparison, arm).label for arm in (leading.arm, leading.reference))
    speed = next(row["units_per_s_ratio"] for row in cost_rows(comparison) if row["contender"] == leader)
    if math.isnan(speed) or abs(speed - 1) <= 0.05:
        return []
    unit = comparison.kind.unit
    return [
        f"{leader} sees {formatting.ratio(speed)} as many {unit}s a second as {baseline}: "
        f"losses are compared after the same number of {unit}s, not after the same time."
    ]
