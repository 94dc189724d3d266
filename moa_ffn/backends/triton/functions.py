"""Device functions of the generated kernels that Triton lacks. Importing this imports Triton.

build.py decorates the functions, compiled or interpreted like the kernels that call them. They call Triton builtins
only: functions of its standard library, such as `tl.sum`, remain compiled or interpreted as of Triton's first import.

x and results are in float32. A mixture evaluates several of these per element, so instructions matter: `exp2` and
`rsqrt` are one GPU instruction each, `exp` and a division five (for subnormal numbers, which do not occur here). The
reciprocal of y >= 1 is therefore rsqrt(y)^2.
"""

from __future__ import annotations

import triton.language as tl


def add(left: tl.tensor, right: tl.tensor) -> tl.tensor:
    """Return the sum, for `tl.reduce`."""
    return left + right


def sigmoid(x: tl.tensor) -> tl.tensor:
    """Return 1 / (1 + exp(-x)) by way of exp(-|x|), which cannot overflow."""
    decay = tl.exp2(-1.4426950408889634 * tl.abs(x))
    root = tl.rsqrt(1.0 + decay)
    right = root * root
    return tl.where(x < 0.0, decay * right, right)


def tanh(x: tl.tensor) -> tl.tensor:
    """Return tanh(x) = sign(x) (1 - exp(-2|x|)) / (1 + exp(-2|x|)), or an odd polynomial near 0 to avoid cancellation.

    Polynomial and range: Cephes' tanhf (Moshier, single/tanhf.c). Triton's own tanh does not run in the interpreter.
    """
    size = tl.abs(x)
    decay = tl.exp2(-2.8853900817779268 * size)
    root = tl.rsqrt(1.0 + decay)
    far = (1.0 - decay) * root * root
    square = x * x
    series = -5.70498872745e-3 * square + 2.06390887954e-2
    series = series * square - 5.37397155531e-2
    series = series * square + 1.33314422036e-1
    series = series * square - 3.33332819422e-1
    near = x + x * square * series
    return tl.where(size < 0.625, near, tl.where(x < 0.0, -far, far))


def normal(x: tl.tensor) -> tl.tensor:
    """Return the standard normal distribution function (1 + erf(x / sqrt(2))) / 2.

    Source: Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26, within 1.5e-7 of erf. The lower tail
    avoids a difference of numbers near 1, and the compiler shares the exponential with the density.
    """
    root = tl.rsqrt(1.0 + 0.23164189 * tl.abs(x))
    t = root * root
    series = 0.5307027145 * t - 0.7265760135
    series = series * t + 0.7107068705
    series = series * t - 0.142248368
    series = series * t + 0.127414796
    tail = series * t * tl.exp2(-0.7213475204444817 * x * x)
    return tl.where(x < 0.0, tail, 1.0 - tail)
