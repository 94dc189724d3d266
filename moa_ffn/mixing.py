"""The mixture of two branches that are projected already, and its coefficients."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from torch import Tensor

from moa_ffn.backends import compiled, eager, select_backend, triton
from moa_ffn.backends.reference import gate_function
from moa_ffn.spec import FFNSpec
from moa_ffn.torch_internals import is_transformed


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
    nonlinearity = partial(gate_function, gate=spec.mixing_gate) if spec.token_adaptive else lambda factor: factor
    match spec.form:
        case "gate":
            return Coefficients(gate=nonlinearity(flat))
        case "up":
            return Coefficients(up=nonlinearity(flat))
        case "separable":
            return Coefficients(gate=nonlinearity(flat.narrow(-1, 0, k1)), up=nonlinearity(flat.narrow(-1, k1, k2)))
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
        backend: as for `FFN`.

    Returns:
        (..., H) in a's dtype.

    Raises:
        ValueError: the backend was asked for by name and cannot run; the message says why.
    """
    backend = select_backend(backend, a, spec)
    if backend == "triton":
        return triton.mixture(a, b, mix, spec)
    if mix is not None and spec.learned_constant and not is_transformed(a):
        mix = mix.expand(*a.shape[:-1], -1)
    coefficients = Coefficients() if mix is None else mixing_coefficients(spec, mix).map(lambda c: c.type_as(a))
    compute = compiled.mixture if backend == "cpu" else eager.mixture
    return compute(a, b, *coefficients, spec.gate_dictionary, spec.up_dictionary)
