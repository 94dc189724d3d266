"""Trainable activations of the table: Swish with a learned slope, xIELU, PolyNorm and the Padé activation unit."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from moa_ffn.activations import Activation, register_activation

XIELU_BETA = 0.5
"""Slope of xIELU at 0 (arXiv:2411.13010)."""

POLYNORM_EPS = 1e-6
"""Added to the mean squares of PolyNorm, as in its authors' code."""

_SWISH = "sigmoid(p0 * x)"


def _swish_sigmoid(x: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    """Return sigmoid(slope x) and its derivative by slope x."""
    sigmoid = torch.sigmoid(slope * x)
    return sigmoid, sigmoid * (1 - sigmoid)


def _swish_derivative(x: Tensor, slope: Tensor) -> Tensor:
    sigmoid, derivative = _swish_sigmoid(x, slope)
    return sigmoid + slope * x * derivative


def _xielu(x: Tensor, p: Tensor, n: Tensor) -> Tensor:
    negative = x.clamp(max=0)
    right, left = F.softplus(p) * x * x, (XIELU_BETA + F.softplus(n)) * (torch.expm1(negative) - negative)
    return XIELU_BETA * x + torch.where(x > 0, right, left)


def _xielu_derivative(x: Tensor, p: Tensor, n: Tensor) -> Tensor:
    right, left = 2 * F.softplus(p) * x, (XIELU_BETA + F.softplus(n)) * torch.expm1(x.clamp(max=0))
    return XIELU_BETA + torch.where(x > 0, right, left)


def _xielu_slopes(x: Tensor, p: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
    negative = x.clamp(max=0)
    return p.sigmoid() * F.relu(x).square(), n.sigmoid() * (torch.expm1(negative) - negative)


def _row_normalized(x: Tensor, *_: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Return x, x^2 and x^3, and their reciprocal RMS (..., 1) over the row."""
    powers = [x, x.square(), x * x.square()]
    return powers, [torch.rsqrt(power.square().mean(-1, keepdim=True) + POLYNORM_EPS) for power in powers]


def _polynorm(x: Tensor, *parameters: Tensor) -> Tensor:
    *weights, bias = parameters
    powers, scales = _row_normalized(x)
    return bias + sum(w * power * scale for w, power, scale in zip(weights, powers, scales, strict=True))


def _polynorm_backward(grad: Tensor, x: Tensor, *parameters: Tensor) -> Tensor:
    """Return the product with the Jacobian of sum_i w_i n_i, n_i = x^i / RMS(x^i)."""
    powers, scales = _row_normalized(x)
    inner = [torch.ones_like(x), 2 * x, 3 * x.square()]  # derivatives of the powers
    total = torch.zeros_like(x)
    for weight, power, scale, slope in zip(parameters[:3], powers, scales, inner, strict=True):
        mean = (grad * power * scale).mean(-1, keepdim=True)
        total = total + weight * scale * (grad - power * scale * mean) * slope
    return total


def _polynorm_slopes(x: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
    powers, scales = _row_normalized(x)
    return *(power * scale for power, scale in zip(powers, scales, strict=True)), torch.ones_like(x)


def _polynomial(x: Tensor, coefficients: Sequence[Tensor]) -> Tensor:
    """Return sum_j c_j x^j by Horner's rule."""
    *lower, total = coefficients
    total = total.expand_as(x)
    for coefficient in reversed(lower):
        total = total * x + coefficient
    return total


def _pau_parts(x: Tensor, parameters: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Return P, A and Q = 1 + |A| of the Padé activation unit P / Q, A = b_1 x + ... + b_4 x^4."""
    numerator = _polynomial(x, parameters[:6])
    inner = x * _polynomial(x, parameters[6:])
    return numerator, inner, 1 + inner.abs()


def _pau(x: Tensor, *parameters: Tensor) -> Tensor:
    numerator, _, denominator = _pau_parts(x, parameters)
    return numerator / denominator


def _pau_derivative(x: Tensor, *parameters: Tensor) -> Tensor:
    numerator, inner, denominator = _pau_parts(x, parameters)
    d_numerator = _polynomial(x, [j * c for j, c in enumerate(parameters[:6])][1:])
    d_inner = _polynomial(x, [j * c for j, c in enumerate(parameters[6:], 1)])
    return (d_numerator - numerator * inner.sign() * d_inner / denominator) / denominator


def _pau_slopes(x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
    numerator, inner, denominator = _pau_parts(x, parameters)
    powers = [torch.ones_like(x)]
    for _ in range(5):
        powers.append(powers[-1] * x)
    by_inner = -numerator * inner.sign() / denominator.square()
    return *(power / denominator for power in powers), *(by_inner * power for power in powers[1:5])


def _kernel_polynomial(indices: Iterable[int]) -> str:
    """Write sum_j p_j x^j over consecutive parameters, by Horner's rule."""
    *lower, last = [f"p{index}" for index in indices]
    text = last
    for name in reversed(lower):
        text = f"({text} * x + {name})"
    return text


def _pau_kernel() -> tuple[str, ...]:
    numerator, inner = _kernel_polynomial(range(6)), f"(x * {_kernel_polynomial(range(6, 10))})"
    denominator, sign = f"(1.0 + abs({inner}))", f"(where({inner} > 0.0, 1.0, 0.0) - where({inner} < 0.0, 1.0, 0.0))"
    d_numerator = "p1 + x * (2.0 * p2 + x * (3.0 * p3 + x * (4.0 * p4 + x * 5.0 * p5)))"
    d_inner = "(p6 + x * (2.0 * p7 + x * (3.0 * p8 + x * 4.0 * p9)))"
    by_inner = f"(0.0 - {numerator} * {sign} / ({denominator} * {denominator}))"
    powers = ["1.0", "x", "x * x", "x * x * x", "x * x * x * x", "x * x * x * x * x"]
    return (
        f"{numerator} / {denominator}",
        f"({d_numerator}) / {denominator} + {by_inner} * {d_inner}",
        *(f"{power} / {denominator}" for power in powers),
        *(f"{by_inner} * {power}" for power in powers[1:5]),
    )


def _xielu_kernel() -> tuple[str, ...]:
    negative, softplus = "minimum(x, 0.0)", "log(1.0 + exp({}))"
    # (exp(x) - 1 - x) / x^2 near 0, where the difference would cancel
    series = _horner(negative, (1 / math.factorial(j) for j in range(8, 1, -1)))
    left = f"where(x > -0.5, {negative} * {negative} * {series}, exp({negative}) - 1.0 - {negative})"
    scale = f"({XIELU_BETA} + {softplus.format('p1')})"
    return (
        f"{XIELU_BETA} * x + where(x > 0.0, {softplus.format('p0')} * x * x, {scale} * {left})",
        f"{XIELU_BETA} + where(x > 0.0, 2.0 * {softplus.format('p0')} * x, {scale} * (exp({negative}) - 1.0))",
        "where(x > 0.0, sigmoid(p0) * x * x, 0.0)",
        f"sigmoid(p1) * {left}",
    )


def _horner(variable: str, coefficients: Iterable[float]) -> str:
    """Write a polynomial, the coefficient of the highest power first."""
    text = ""
    for value in coefficients:
        text = f"({text} * {variable} + {value})" if text else f"{value}"
    return text


for _activation in (
    Activation(  # Ramachandran et al., arXiv:1710.05941
        "swish",
        "sw",
        lambda x, slope: x * torch.sigmoid(slope * x),
        _swish_derivative,
        kernel=(
            f"x * {_SWISH}",
            f"{_SWISH} * (1.0 + p0 * x * (1.0 - {_SWISH}))",
            f"x * x * {_SWISH} * (1.0 - {_SWISH})",
        ),
        parameters=(1.0,),
        slopes=lambda x, slope: (x * x * _swish_sigmoid(x, slope)[1],),
    ),
    Activation(  # Huang and Schlag, arXiv:2411.13010; parameters before softplus, initially alpha_p = alpha_n = 0.8
        "xielu",
        "xi",
        _xielu,
        _xielu_derivative,
        kernel=_xielu_kernel(),
        parameters=(math.log(math.expm1(0.8)), math.log(math.expm1(0.8 - XIELU_BETA))),
        slopes=_xielu_slopes,
    ),
    Activation(  # Zhuo et al., arXiv:2411.03884, order 3: weights of x, x^2 and x^3, and the bias
        "polynorm",
        "pn",
        _polynorm,
        None,
        _polynorm_backward,
        parameters=(1 / 3, 1 / 3, 1 / 3, 0.0),
        slopes=_polynorm_slopes,
    ),
    Activation(  # Molina et al., arXiv:1907.06732: a_0 ... a_5, b_1 ... b_4 of their fit to leaky ReLU
        "pau",
        "pau",
        _pau,
        _pau_derivative,
        kernel=_pau_kernel(),
        parameters=(
            *(0.02979246, 0.61837738, 2.32335207, 3.05202660, 1.48548002, 0.25103717),
            *(1.14201226, 4.39322834, 0.87154450, 0.34720652),
        ),
        slopes=_pau_slopes,
    ),
):
    register_activation(_activation)
