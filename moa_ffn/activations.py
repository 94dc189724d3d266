"""The table of activations: name, abbreviation, function, derivative and kernel expressions of each."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

LEAKY_SLOPE = 0.01
"""Slope of leaky ReLU below 0."""

QUICK_GELU_SLOPE = 1.702
"""Slope of x * sigmoid(1.702 x), CLIP's approximation of GELU."""

_GELU_SCALE, _GELU_CUBE = math.sqrt(8 / math.pi), 0.044715
"""Constants of x * sigmoid(scale * (x + cube * x^3)), which is the tanh approximation of GELU."""


@dataclass(frozen=True)
class Activation:
    """An elementwise activation.

    Args:
        name: Full name, such as `gelu`.
        abbreviation: Short name of the paper, such as `g`.
        function: x -> sigma(x), elementwise, any shape and floating dtype.
        derivative: x -> sigma'(x), same shape and dtype.
        backward: (grad, x) -> grad * sigma'(x), for activations with a fused kernel in torch. The default multiplies
            by `derivative`.
        kernel: Value and derivative for the GPU kernels: expressions in x of numbers, operators and the functions of
            `moa_ffn.backends.triton.source.VOCABULARY`, finite at 0. Without it the activation runs in plain torch.
    """

    name: str
    abbreviation: str
    function: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor] | None = None
    kernel: tuple[str, str] | None = None

    def vjp(self, grad: Tensor, x: Tensor) -> Tensor:
        """Return the vector-Jacobian product grad * sigma'(x), same shape as `x`."""
        if self.backward is None or torch.is_grad_enabled():  # torch's backward kernels are not differentiable
            return grad * self.derivative(x)
        return self.backward(grad, x)


def _gelu_derivative(x: Tensor) -> Tensor:
    density = torch.exp(-0.5 * x.square()) / math.sqrt(2 * math.pi)
    return torch.special.ndtr(x) + x * density


def _silu_derivative(x: Tensor) -> Tensor:
    sigmoid = x.sigmoid()
    return sigmoid * (1 + x * (1 - sigmoid))


ACTIVATIONS: dict[str, Activation] = {}
_BY_ABBREVIATION: dict[str, str] = {}


def register_activation(activation: Activation) -> Activation:
    """Add an activation to the table, so that every dictionary accepts its name or abbreviation.

    Raises:
        ValueError: The name or the abbreviation is taken.
    """
    taken = set(ACTIVATIONS) | set(_BY_ABBREVIATION)
    for label in (activation.name, activation.abbreviation):
        if label in taken:
            raise ValueError(f"activation {label!r} is already in the table; taken: {', '.join(sorted(taken))}")
    ACTIVATIONS[activation.name] = activation
    _BY_ABBREVIATION[activation.abbreviation] = activation.name
    return activation


def resolve_activations(labels: str | Iterable[str], field: str) -> tuple[str, ...]:
    """Return the full names of a dictionary given by names or abbreviations, as a sequence or text ("g,s,r2").

    Raises:
        ValueError: A label is unknown or repeated, or there is none. The message names the setting `field`.
    """
    given = labels.split(",") if isinstance(labels, str) else labels
    if not (isinstance(given, Iterable) and all(isinstance(label, str) for label in given)):
        raise ValueError(f"{field}={labels!r} must be names of activations")  # configuration files may have numbers
    given = [label.strip() for label in given]
    names = tuple(_BY_ABBREVIATION.get(label, label) for label in given)
    unknown = [label for label, name in zip(given, names, strict=True) if name not in ACTIVATIONS]
    if unknown:
        known = ", ".join(f"{a.name} ({a.abbreviation})" for a in ACTIVATIONS.values())
        raise ValueError(f"{field}: unknown activation {unknown[0]!r}; known: {known}")
    if not names or len(set(names)) != len(names):
        raise ValueError(f"{field}={tuple(given)!r} must name at least one activation, and none twice")
    return names


def _gelu_tanh_derivative(x: Tensor) -> Tensor:
    sigmoid = torch.sigmoid(_GELU_SCALE * (x + _GELU_CUBE * x**3))
    return sigmoid * (1 + x * (1 - sigmoid) * _GELU_SCALE * (1 + 3 * _GELU_CUBE * x * x))


def _quick_gelu_derivative(x: Tensor) -> Tensor:
    return _silu_derivative(QUICK_GELU_SLOPE * x)


_aten = torch.ops.aten
_TANH = f"sigmoid({_GELU_SCALE} * (x + {_GELU_CUBE} * x * x * x))"
_QUICK = f"sigmoid({QUICK_GELU_SLOPE} * x)"

for _activation in (
    Activation(
        "identity",
        "id",
        lambda x: x,
        torch.ones_like,
        lambda grad, x: grad,
        kernel=("x", "1.0"),
    ),
    Activation(
        "gelu",
        "g",
        F.gelu,
        _gelu_derivative,
        lambda grad, x: _aten.gelu_backward(grad, x),
        kernel=(
            "x * normal(x)",
            f"normal(x) + {1 / math.sqrt(2 * math.pi)} * x * exp2({-0.5 * math.log2(math.e)} * x * x)",
        ),
    ),
    Activation(
        "silu",
        "s",
        F.silu,
        _silu_derivative,
        lambda grad, x: _aten.silu_backward(grad, x),
        kernel=("x * sigmoid(x)", "sigmoid(x) * (1.0 + x * (1.0 - sigmoid(x)))"),
    ),
    Activation(  # where, because the kernels' maximum(0, NaN) is 0
        "relu",
        "r",
        F.relu,
        lambda x: (x > 0).to(x.dtype),
        lambda grad, x: _aten.threshold_backward(grad, x, 0),
        kernel=("where(x < 0.0, 0.0, x)", "where(x > 0.0, 1.0, 0.0)"),
    ),
    Activation(
        "relu2",
        "r2",
        lambda x: F.relu(x).square(),
        lambda x: 2 * F.relu(x),
        kernel=("where(x < 0.0, 0.0, x) * where(x < 0.0, 0.0, x)", "2.0 * where(x < 0.0, 0.0, x)"),
    ),
    Activation(
        "leaky_relu",
        "l",
        lambda x: F.leaky_relu(x, LEAKY_SLOPE),
        lambda x: torch.where(x > 0, 1.0, LEAKY_SLOPE).to(x.dtype),
        lambda grad, x: _aten.leaky_relu_backward(grad, x, LEAKY_SLOPE, False),
        kernel=(f"x * where(x > 0.0, 1.0, {LEAKY_SLOPE})", f"where(x > 0.0, 1.0, {LEAKY_SLOPE})"),
    ),
    Activation(
        "tanh",
        "t",
        torch.tanh,
        lambda x: 1 - torch.tanh(x).square(),
        kernel=("tanh(x)", "1.0 - tanh(x) * tanh(x)"),
    ),
    Activation(
        "gelu_tanh",
        "gt",
        lambda x: F.gelu(x, approximate="tanh"),
        _gelu_tanh_derivative,
        lambda grad, x: _aten.gelu_backward(grad, x, approximate="tanh"),
        kernel=(
            f"x * {_TANH}",
            f"{_TANH} * (1.0 + x * (1.0 - {_TANH}) * {_GELU_SCALE} * (1.0 + {3 * _GELU_CUBE} * x * x))",
        ),
    ),
    Activation(
        "quick_gelu",
        "qg",
        lambda x: x * torch.sigmoid(QUICK_GELU_SLOPE * x),
        _quick_gelu_derivative,
        kernel=(f"x * {_QUICK}", f"{_QUICK} * (1.0 + {QUICK_GELU_SLOPE} * x * (1.0 - {_QUICK}))"),
    ),
):
    register_activation(_activation)
