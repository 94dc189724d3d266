"""The mixture of two branches that are projected already: its coefficients, and the backend that computes it."""

import logging
from collections.abc import Callable
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from moa_ffn import compiled, eager, kernels
from moa_ffn.reference import gate_function
from moa_ffn.spec import FFNSpec

_logger = logging.getLogger(__name__)


class Coefficients(NamedTuple):
    """Mixing coefficients in factored form; a field is None where the variant has no such factor.

    gate (..., K1), up (..., K2), pair (..., K1, K2); the matrix is `pair`, or the outer product of `gate` and `up`.
    """

    gate: Tensor | None = None
    up: Tensor | None = None
    pair: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> "Coefficients":
        """The same factors, each through `function`."""
        return Coefficients(*(None if factor is None else function(factor) for factor in self))


def mixing_coefficients(spec: FFNSpec, flat: Tensor) -> Coefficients:
    """The coefficients (..., num_coefficients) of a mixture in factored form; logits of MoA go through the gate."""
    k1, k2 = len(spec.gate_dictionary), len(spec.up_dictionary)
    nonlinearity = partial(gate_function, gate=spec.gate) if spec.token_adaptive else lambda factor: factor
    match spec.form:
        case "gate":
            return Coefficients(gate=nonlinearity(flat))
        case "up":
            return Coefficients(up=nonlinearity(flat))
        case "separable":
            return Coefficients(gate=nonlinearity(flat[..., :k1]), up=nonlinearity(flat[..., k1:]))
        case "full":
            return Coefficients(pair=nonlinearity(flat).unflatten(-1, (k1, k2)))
        case _:
            return Coefficients()


def mixture(a: Tensor, b: Tensor | None, mix: Tensor | None, spec: FFNSpec, backend: str = "auto") -> Tensor:
    """sum_kl C_kl f_k(a) g_l(b), the formula of arXiv:2605.26647.

    Args:
        a: (..., H) gate branch.
        b: (..., H) up branch in a's dtype; None for Type-I.
        mix: the mixing logits (..., n) of MoA variants, n = `FFNSpec.num_coefficients`; the coefficients (..., n), or
            (n,) for all tokens, of LA variants; None for fixed ones.
        spec: which mixture.
        backend: as for `FFN`; "blocks" is "eager" here.

    Returns:
        (..., H) in a's dtype.

    Raises:
        ValueError: the backend was asked for by name and cannot run; the message says why.
    """
    backend = _choose(a, spec) if backend == "auto" else backend
    if backend == "triton":
        return kernels.mixture(a, b, mix, spec)
    fused = backend == "cpu"
    obstacle = _compiled_obstacle(a) if fused else None
    if obstacle is not None:
        raise ValueError(f"backend='cpu' cannot run: {obstacle}; backend='auto' takes one that can")
    mix = mix if mix is None or mix.ndim == a.ndim else mix.expand(*a.shape[:-1], -1)
    coefficients = Coefficients() if mix is None else mixing_coefficients(spec, mix).map(lambda c: c.to(a.dtype))
    compute = compiled.mixture if fused else eager.mixture
    return compute(a, b, *coefficients, spec.gate_dictionary, spec.up_dictionary)


def _choose(a: Tensor, spec: FFNSpec) -> str:
    if a.is_cuda:
        obstacle = kernels.obstacle(a, spec)
        if obstacle is None:
            return "triton"
        say_once(f"mixtures are not fused on this GPU: {obstacle}")
    return "cpu" if _compiled_obstacle(a) is None else "eager"


def say_once(message: str) -> None:
    """Warn, unless it was said before; not while a graph is traced, which logging would break."""
    if not torch.compiler.is_compiling():
        _warn(message)


@lru_cache
def _warn(message: str) -> None:
    _logger.warning(message)


def _compiled_obstacle(a: Tensor) -> str | None:
    """Why compiled.py cannot compute the mixture of a, or None."""
    if torch.compiler.is_compiling():
        return "the layer is being compiled, where the plain form is the one that fuses"
    if a.device.type != "cpu" or a.dtype not in compiled.DTYPES:
        return f"it computes float32 and float64 on a CPU, not {a.dtype} on {a.device.type}"
    return None if a.numel() < compiled.MIN_ELEMENTS else compiled.obstacle()
