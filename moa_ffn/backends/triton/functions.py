"""Device functions of the generated kernels, for what Triton's own functions do not offer.

Imported where kernels are built, since it needs Triton. The functions stand undecorated here; build.py decorates
them, compiled or interpreted, as the kernels that call them. They call Triton's builtins alone: a function of
Triton's standard library, such as `tl.sum`, stays compiled or interpreted as it was when Triton was first imported.

x is in float32 throughout; results have its accuracy. A mixture computes several of these for every element that it
reads, so instructions count: `exp2` and `rsqrt` are one instruction of the GPU each, where `exp` and a division are
five, for subnormal numbers that do not occur here. The reciprocal of y >= 1 is therefore rsqrt(y)^2.
"""

import triton.language as tl


def add(left: tl.tensor, right: tl.tensor) -> tl.tensor:
    """The sum, for `tl.reduce`."""
    return left + right


def sigmoid(x: tl.tensor) -> tl.tensor:
    """1 / (1 + exp(-x)); the exponential of |x| cannot overflow."""
    decay = tl.exp2(-1.4426950408889634 * tl.abs(x))
    root = tl.rsqrt(1.0 + decay)
    right = root * root
    return tl.where(x < 0.0, decay * right, right)


def tanh(x: tl.tensor) -> tl.tensor:
    """tanh(x) = sign(x) (1 - exp(-2|x|)) / (1 + exp(-2|x|)); near 0, where that cancels, an odd polynomial.

    The polynomial and its range are those of Cephes' tanhf (Moshier, single/tanhf.c). Triton's own tanh does not run
    in the interpreter.
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
    """Distribution function of the standard normal distribution, (1 + erf(x / sqrt(2))) / 2.

    Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26, which is within 1.5e-7 of erf. The lower tail
    is no difference of numbers near 1, and the exponential serves the density as well.
    """
    root = tl.rsqrt(1.0 + 0.23164189 * tl.abs(x))
    t = root * root
    series = 0.5307027145 * t - 0.7265760135
    series = series * t + 0.7107068705
    series = series * t - 0.142248368
    series = series * t + 0.127414796
    tail = series * t * tl.exp2(-0.7213475204444817 * x * x)
    return tl.where(x < 0.0, tail, 1.0 - tail)
