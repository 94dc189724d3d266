"""The table of activations: name, abbreviation, function, derivative and kernel expressions of each.

Trainable activations have parameters, one set per layer and branch, which every function below takes after x as p0,
p1, ...: tensors (..., 1) that broadcast against x (..., H).
"""

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
    """An activation: elementwise, or with `derivative=None` a function of whole rows (..., H).

    Args:
        name: Full name, such as `gelu`.
        abbreviation: Short name of the paper, such as `g`.
        function: x -> sigma(x), any shape and floating dtype.
        derivative: x -> sigma'(x), same shape and dtype; None for functions of rows.
        backward: (grad, x) -> vector-Jacobian product, for activations with a fused kernel in torch and for functions
            of rows. The default multiplies by `derivative`.
        kernel: Value, derivative and `slopes` for the GPU kernels: expressions in x, p0, p1, ... of numbers, operators
            and the functions of `moa_ffn.backends.triton.source.VOCABULARY`, finite at 0. Without it the activation
            runs in plain torch.
        parameters: Initial values of the trainable parameters.
        slopes: x -> the derivative of sigma(x) by each parameter, shaped like x.
    """

    name: str
    abbreviation: str
    function: Callable[..., Tensor]
    derivative: Callable[..., Tensor] | None
    backward: Callable[..., Tensor] | None = None
    kernel: tuple[str, ...] | None = None
    parameters: tuple[float, ...] = ()
    slopes: Callable[..., tuple[Tensor, ...]] | None = None

    def vjp(self, grad: Tensor, x: Tensor, *parameters: Tensor) -> Tensor:
        """Return the vector-Jacobian product by x, same shape as `x`."""
        # torch's backward kernels are not differentiable
        if self.derivative is not None and (self.backward is None or torch.is_grad_enabled()):
            return grad * self.derivative(x, *parameters)
        assert self.backward is not None
        return self.backward(grad, x, *parameters)

    def parameter_vjp(self, grad: Tensor, x: Tensor, *parameters: Tensor) -> list[Tensor]:
        """Return the vector-Jacobian products by the parameters, (...) for grad and x (..., H)."""
        if self.slopes is None:
            return []
        return [(grad * slope).sum(-1) for slope in self.slopes(x, *parameters)]


def num_parameters(names: Iterable[str]) -> int:
    """Return the number of trainable parameters of a dictionary."""
    return sum(len(ACTIVATIONS[name].parameters) for name in names)


def split_parameters(act: Tensor | None, *dictionaries: tuple[str, ...]) -> list[list[tuple[Tensor, ...]]]:
    """Return the parameters of each activation of each dictionary, (..., 1) each, out of act (..., P)."""
    values = [] if act is None else [act.narrow(-1, i, 1) for i in range(sum(map(num_parameters, dictionaries)))]
    rest = iter(values)
    return [[tuple(next(rest) for _ in ACTIVATIONS[name].parameters) for name in names] for names in dictionaries]


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
