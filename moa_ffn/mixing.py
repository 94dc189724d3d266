"""The mixture of two projected branches."""

from __future__ import annotations

from torch import Tensor

from moa_ffn.backends import compiled, eager, select_backend, triton
from moa_ffn.coefficients import Coefficients, mixing_coefficients
from moa_ffn.spec import FFNSpec
from moa_ffn.torch_internals import is_transformed


def mixture(
    a: Tensor,
    b: Tensor | None,
    mix: Tensor | None,
    spec: FFNSpec,
    backend: str = "auto",
    act: Tensor | None = None,
) -> Tensor:
    """Return sum_kl C_kl f_k(a) g_l(b), the formula of arXiv:2605.26647.

    Args:
        a: (..., H) gate branch.
        b: (..., H) up branch in a's dtype; None for Type-I.
        mix: (..., n) mixing logits of MoA variants, n = `FFNSpec.num_coefficients`; (..., n) or (n,) coefficients of
            LA variants; None for fixed variants.
        spec: The mixture.
        backend: As for `FFN`.
        act: (P,) parameters of trainable activations, P = `FFNSpec.num_activation_parameters`; None for P = 0.

    Returns:
        (..., H) in a's dtype.

    Raises:
        ValueError: The requested backend is unavailable, or `act` is missing; the message gives the reason.
    """
    backend = select_backend(backend, a, spec)
    if (act is None) != (spec.num_activation_parameters == 0):
        raise ValueError(f"act must hold the {spec.num_activation_parameters} parameters of the activations of {spec}")
    if backend == "triton":
        return triton.mixture(a, b, mix, spec, act)
    if not is_transformed(a):
        mix = mix.expand(*a.shape[:-1], -1) if mix is not None and spec.learned_constant else mix
        act = None if act is None else act.expand(*a.shape[:-1], -1)
    coefficients = Coefficients() if mix is None else mixing_coefficients(spec, mix)
    coefficients = coefficients._replace(act=act).map(lambda c: c.type_as(a))
    compute = compiled.mixture if backend == "cpu" else eager.mixture
    return compute(a, b, coefficients, spec.dictionaries)
