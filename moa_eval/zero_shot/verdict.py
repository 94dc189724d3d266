"""Zero-shot results in words: one or two sentences of verdict, and what to keep in mind when reading them."""

import math
from collections.abc import Iterator

from moa_eval.page import formatting
from moa_eval.page.formatting import enumerate_words, show, spell
from moa_eval.zero_shot.contrasts import AVERAGE, HEADLINE, ZERO_SHOT, Contrast, ZeroShot, label_of
from moa_eval.zero_shot.paired import CONFIDENCE, POWER

ALPHA = round(1 - CONFIDENCE, 10)
_FEW = 10  # discordant items below which the bootstrap's percentiles are coarse
_TYPICAL = f"{POWER * 5:.0f} of 5 such evaluations"


def verdict(comparison: ZeroShot) -> list[str]:
    """One or two sentences: the difference to the baseline, and whether these items can tell it from none."""
    if len(comparison.labels) == 1:
        return [_alone(comparison)]
    contrasts = [found for model in range(1, len(comparison.labels)) if (found := _primary(comparison, model))]
    if not contrasts:
        return [_by_task(comparison)]
    best = max(contrasts, key=lambda contrast: contrast.score)
    return [_difference(comparison, best), _certainty(comparison, best)]


def caveats(comparison: ZeroShot) -> list[str]:
    """What limits the verdict, one sentence each."""
    return [
        *_test_caveats(comparison),
        *_task_caveats(comparison),
        *_setting_caveats(comparison),
        *_reading_caveats(comparison),
    ]


def averaged(comparison: ZeroShot) -> str:
    """What the average is over, in words: "the four tasks"."""
    names = [label_of(task) for task in comparison.averaged]
    return "the four tasks" if len(names) == len(ZERO_SHOT) else enumerate_words(names)


def _primary(comparison: ZeroShot, model: int) -> Contrast | None:
    """The one comparison that the verdict is about: the average, or the only task."""
    if comparison.averages():
        return comparison.find(AVERAGE, HEADLINE, model)
    only = comparison.averaged or comparison.tasks
    return comparison.find(only[0], comparison.headline(only[0]), model) if len(only) == 1 else None


def _where(comparison: ZeroShot, contrast: Contrast) -> str:
    if contrast.task == AVERAGE:
        return f"the average of {averaged(comparison)}"
    return f"{label_of(contrast.task)} ({contrast.metric})"


def _difference(comparison: ZeroShot, contrast: Contrast) -> str:
    label, baseline = comparison.labels[contrast.model], comparison.labels[0]
    values = f"{formatting.accuracy(contrast.score)} against {formatting.accuracy(contrast.baseline)} %"
    shown = formatting.points(abs(contrast.difference)).lstrip("+")
    if abs(contrast.difference) < 1e-12:
        return f"{label} and {baseline} are equal on {_where(comparison, contrast)}: {values}."
    direction = "above" if contrast.difference > 0 else "below"
    return f"{label} is {shown} points {direction} {baseline} on {_where(comparison, contrast)}: {values}."


def _certainty(comparison: ZeroShot, contrast: Contrast) -> str:
    items = f"{formatting.grouped(contrast.items)} items"
    if contrast.discordant == 0:
        return f"The two are right and wrong on the same of {items}: nothing tells them apart here."
    limits = " to ".join(map(formatting.points, contrast.interval))
    p_value = contrast.p_holm if math.isfinite(contrast.p_holm) else contrast.p_value
    test = f" and the exact paired test gives {_p(p_value)}" if math.isfinite(p_value) else ""
    if test and len(comparison.labels) > 2:
        test += f" after Holm's correction for {len(comparison.labels) - 1} models"
    low, high = contrast.interval
    seen = p_value < ALPHA if test else low > 0 or high < 0
    reading = (
        "more than the luck of which items were asked"
        if seen
        else f"no difference of this size can be seen with {items}; the smallest that would be seen in {_TYPICAL} "
        f"is about {formatting.accuracy(contrast.detectable)} points"
    )
    alone = ", as for one model alone," if len(comparison.labels) > 2 else ""
    return f"The {CONFIDENCE * 100:.0f} % interval over {items}{alone} is {limits} points{test}: {reading}."


def _alone(comparison: ZeroShot) -> str:
    averages = comparison.averages()
    if averages:
        score = comparison.score(AVERAGE, averages[0], 0)
        where = f"the average of {averaged(comparison)}"
    else:
        task = comparison.tasks[0]
        score, where = comparison.score(task, comparison.headline(task), 0), label_of(task)
    shown = f"{formatting.accuracy(score.value)} % ± {formatting.accuracy(score.stderr)}"
    return f"{comparison.labels[0]} reaches {shown} on {where}; there is nothing to compare it with."


def _by_task(comparison: ZeroShot) -> str:
    tests = _tests(comparison)
    seen = [_named(comparison, contrast) for contrast in tests if contrast.p_holm < ALPHA]
    absent = "None of the paper's four tasks is here, so there is no average"
    if not tests:
        return f"{absent}, and no task has a right or wrong answer per item to be tested."
    tested = f"after Holm's correction for {len(tests)} test{'s' if len(tests) > 1 else ''}"
    return f"{absent}; {tested} {enumerate_words(seen) if seen else 'no task'} differs from {comparison.labels[0]}."


def _tests(comparison: ZeroShot) -> list[Contrast]:
    return [c for c in comparison.contrasts if c.headline and c.task != AVERAGE and math.isfinite(c.p_holm)]


def _named(comparison: ZeroShot, contrast: Contrast) -> str:
    whose = f"{comparison.labels[contrast.model]}'s " if len(comparison.labels) > 2 else ""
    return f"{whose}{label_of(contrast.task)} ({formatting.points(contrast.difference)}, {_p(contrast.p_holm)})"


def _test_caveats(comparison: ZeroShot) -> Iterator[str]:
    baseline, *others = comparison.labels
    if not others:
        return
    tests = _tests(comparison)
    if len(tests) > 1 and comparison.averages():
        seen = [_named(comparison, contrast) for contrast in tests if contrast.p_holm < ALPHA]
        found = f"{enumerate_words(seen)} differ{'s' if len(seen) == 1 else ''}" if seen else "no single task differs"
        yield f"Task by task, after Holm's correction for {len(tests)} tests, {found}."
    if len(others) > 1:
        yield f"The verdict takes the best of {len(others)} alternatives, which flatters it."
    for model, label in enumerate(others, start=1):
        contrast = _primary(comparison, model)
        if contrast and contrast.discordant is not None and 0 < contrast.discordant < _FEW:
            items = f"{contrast.discordant} item{'s' if contrast.discordant > 1 else ''}"
            tells = "tells" if contrast.discordant == 1 else "tell"
            yield (
                f"Only {items} {tells} {label} from {baseline}: trust the exact test "
                "more than the interval and the smallest difference, which rest on the normal law."
            )
        plain = comparison.find(AVERAGE, "acc", model)
        if contrast and plain and round(contrast.difference, 4) * round(plain.difference, 4) < 0:
            shown = formatting.points(plain.difference)
            yield f"In plain acc on all tasks {label} has the other sign: {shown} points."
    yield "Only the choice of items is weighed: each side is one trained model; another training seed moves it too."


def _task_caveats(comparison: ZeroShot) -> Iterator[str]:
    missing = [task.label for name, task in ZERO_SHOT.items() if name not in comparison.averaged]
    if missing and comparison.averages():
        are = "is" if len(missing) == 1 else "are"
        yield f"{enumerate_words(missing)} {are} missing, so the average is not the paper's."
    first = comparison.evaluations[0]
    if first.limit is not None:
        yield f"Run with --limit {first.limit:g}: these are not the whole tasks."
    shots = {label_of(task): first.tasks[task].shots for task in comparison.tasks if first.tasks[task].shots}
    if shots:
        yield f"Not zero-shot: {', '.join(f'{task} with {number} shots' for task, number in shots.items())}."


def _setting_caveats(comparison: ZeroShot) -> Iterator[str]:
    named = {
        "Model types": [run.config.get("model") for run in comparison.evaluations],
        "Number formats": [run.config.get("model_dtype") for run in comparison.evaluations],
        "Context lengths": [run.content.get("max_length") for run in comparison.evaluations],
        "Harness versions": [run.content.get("lm_eval_version") for run in comparison.evaluations],
    }
    for name, values in named.items():
        shown = [show(value) for value in values]
        if len(set(shown)) > 1:
            yield f"{name} differ: {spell(comparison.labels, shown)}."


def _reading_caveats(comparison: ZeroShot) -> Iterator[str]:
    for label, evaluation in zip(comparison.labels, comparison.evaluations, strict=True):
        yield from evaluation.notes
        for task in evaluation.tasks.values():
            if task.not_finite:
                part = f"{formatting.grouped(task.not_finite)} of {formatting.grouped(len(task.items))} items"
                yield f"{label}, {label_of(task.name)}: {part} have a log-likelihood that is not finite."


def _p(value: float) -> str:
    shown = formatting.probability(value)
    return (f"p {shown}" if shown.startswith("<") else f"p = {shown}").replace(" ", "\u00a0")
