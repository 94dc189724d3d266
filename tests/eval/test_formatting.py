import math

import pytest

from moa_eval.page import formatting


@pytest.mark.parametrize(
    ("text", "value", "expected"),
    [
        (formatting.loss, 0.51239, "0.5124"),
        (formatting.loss, 0.0123456, "0.01235"),
        (formatting.loss, math.nan, "NaN"),
        (formatting.signed, -0.01234, "−0.0123"),
        (formatting.signed, math.nan, "–"),
        (formatting.percent, -0.01234, "−1.23 %"),
        (formatting.share, 0.000306, "0.031 %"),
        (formatting.ratio, 1.0031, "1.003×"),
        (formatting.count, 86_567_656, "86.6 M"),
        (formatting.count, 999_999, "1.00 M"),
        (formatting.grouped, 128_000, "128\u202f000"),
        (formatting.duration, 4.25, "4.25 s"),
        (formatting.duration, 200_000, "2 d 7 h"),
        (formatting.rate, 0.0012, "1.2e-3"),
        (formatting.rate, 0.014, "1.4e-2"),
        (formatting.rate, 0.1, "0.1"),
        (lambda value: formatting.rate(value, 2), 0.0123456, "1.2e-2"),
        (formatting.show, 0.05, "0.05"),
        (formatting.show, None, "none"),
        (formatting.accuracy, 0.36519, "36.52"),
        (formatting.points, -1e-18, "0.00"),
        (formatting.probability, 0.01849, "0.018"),
        (formatting.probability, 0.00001, "< 0.0001"),
        (formatting.show, [1, "a"], '[1, "a"]'),
    ],
)
def test_values_as_text(text, value, expected):
    assert text(value) == expected


def test_equal_values_are_listed_with_their_first_owners():
    labels = [f"r{index}" for index in range(9)]
    assert formatting.spell(labels, ["10"] * 5 + ["20"] * 4) == "10 (r0, r1, r2, r3, r4), 20 (r5, r6, r7, r8)"
    assert formatting.spell(labels, ["10"] * 9) == "10 (r0, r1, r2, r3 and 5 more)"
