"""Numbers and values as text: fixed digits, a true minus sign, SI prefixes, a dash for unknown values."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

UNKNOWN = "–"
_PREFIXES = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def loss(value: float) -> str:
    """Format a loss with four decimals, or four significant digits below 0.1; NaN is "NaN"."""
    if math.isnan(value):
        return "NaN"
    return _fixed(value, 4 if abs(value) >= 0.1 or value == 0 else 3 - math.floor(math.log10(abs(value))))


def signed(value: float) -> str:
    """Format a difference of losses with four decimals and a sign, unless it is 0."""
    return UNKNOWN if not math.isfinite(value) else f"{_sign(value)}{_fixed(abs(value), 4)}"


def percent(value: float) -> str:
    """Format a relative difference: -0.0123 is "−1.23 %"."""
    if not math.isfinite(value):
        return UNKNOWN
    return f"{_sign(value)}{_fixed(abs(value) * 100, 1 if abs(value) >= 0.1 else 2)} %"


def change(difference: float, relative: float) -> str:
    """Format a difference with its relative size: "−0.0123 · −1.98 %"."""
    return UNKNOWN if not math.isfinite(difference) else f"{signed(difference)} · {percent(relative)}"


def deviation(value: float) -> str:
    """Format a standard deviation of losses with four decimals."""
    return UNKNOWN if not math.isfinite(value) else _fixed(value, 4)


def accuracy(value: float) -> str:
    """Format an accuracy or its standard error in percent with two decimals: 0.36519 is "36.52"."""
    return UNKNOWN if not math.isfinite(value) else _fixed(value * 100, 2)


def points(value: float) -> str:
    """Format a difference of accuracies in percentage points: 0.0076 is "+0.76", 1e-17 is "0.00"."""
    return UNKNOWN if not math.isfinite(value) else f"{_sign(round(value, 4))}{_fixed(abs(value) * 100, 2)}"


def probability(value: float) -> str:
    """Format a p-value to two significant digits; values below that are "< 0.0001"."""
    if not math.isfinite(value):
        return UNKNOWN
    if value < 1e-4:
        return "< 0.0001"
    return _fixed(value, 2 if value >= 0.1 else 1 - math.floor(math.log10(value)))


def share(value: float) -> str:
    """Format a fraction without its sign, to two significant digits or more: 0.000305 is "0.031 %"."""
    if not math.isfinite(value):
        return UNKNOWN
    percentage = abs(value) * 100
    return f"{_fixed(percentage, 2 if percentage >= 0.1 or not value else 1 - math.floor(math.log10(percentage)))} %"


def ratio(value: float) -> str:
    """Format a ratio such as "1.03×"."""
    return UNKNOWN if not math.isfinite(value) else f"{_fixed(value, 3 if abs(value - 1) < 0.01 else 2)}×"


def count(value: float, digits: int = 3) -> str:
    """Format a number to `digits` significant digits with an SI prefix: 86567656 is "86.6 M", 512 is "512"."""
    if not math.isfinite(value):
        return UNKNOWN
    value = float(f"{value:.{digits}g}")  # rounded first: 999,999 becomes 1.00 M, not 1000 k
    for scale, prefix in _PREFIXES:
        if abs(value) >= scale:
            scaled = value / scale
            return f"{_fixed(scaled, max(0, digits - 1 - math.floor(math.log10(abs(scaled)))))} {prefix}"
    return f"{value:.{digits}g}"


def grouped(value: float) -> str:
    """Format a whole number with narrow no-break spaces between thousands."""
    return UNKNOWN if not math.isfinite(value) else f"{round(value):,}".replace(",", "\u202f")


def memory(mebibytes: float) -> str:
    """Format memory in whole MiB."""
    return UNKNOWN if not math.isfinite(mebibytes) else f"{grouped(mebibytes)} MiB"


def duration(seconds: float) -> str:
    """Format seconds in the two largest useful units: "42 s", "4 min 10 s", "3 h 05 min", "2 d 7 h"."""
    if not math.isfinite(seconds):
        return UNKNOWN
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.3g} s" if whole < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def rate(value: float, digits: int = 7) -> str:
    """Format a learning rate to `digits` significant digits: 0.0012 is "1.2e-3"; 0.1 and above without an exponent."""
    if not math.isfinite(value):
        return f"{value:g}"
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}" if 0 < value < 0.1 else f"{value:.{digits}g}"


def show(value: Any) -> str:
    """Format a config value; null is "none", floats below 0.01 are formatted as `rate`."""
    if value is None:
        return "none"
    if isinstance(value, float):
        return rate(value) if value < 0.01 else f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value, default=str)


def spell(labels: Sequence[str], values: Sequence[str]) -> str:
    """List values with the labels that have them: "10 (SwiGLU), 20 (qd-MoA)"."""
    owners: dict[str, list[str]] = {}
    for label, value in zip(labels, values, strict=True):
        owners.setdefault(value, []).append(label)
    return ", ".join(f"{value} ({first_of(own)})" for value, own in owners.items())


def first_of(words: Sequence[str], limit: int = 4) -> str:
    """Join the first words of a long list: "a, b, c, d and 3 more"."""
    more = len(words) - limit
    return ", ".join(words) if more <= 1 else f"{', '.join(words[:limit])} and {more} more"


def _fixed(value: float, digits: int) -> str:
    return f"{value:.{digits}f}".replace("-", "−")


def _sign(value: float) -> str:
    return "−" if value < 0 else "+" if value > 0 else ""
