"""Fused GPU kernels of the mixture: one forward and one backward for the whole family.

    source.py     mixture -> source text of its kernels
    functions.py  device functions that Triton lacks
    build.py      source text -> kernels, block sizes, launch
    operators.py  torch operators with fake and autograd registrations
    layer.py      the whole layer: one matrix product, the mixture, down_proj

Each kernel reads and writes every element once and includes the mixing gate's nonlinearity and its derivative.
Arithmetic is in float32. The backward recomputes the activations from a, b and mix, the only saved tensors. Triton is
imported when the first kernel runs.

Shapes: (...) tokens, H hidden width, n = `FFNSpec.num_coefficients`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moa_ffn.backends.triton import build, operators, source
from moa_ffn.spec import FFNSpec
from moa_ffn.torch_internals import constant_in_graphs

__all__ = ["DTYPES", "mixture", "unavailable_reason"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

MIN_CAPABILITY = (8, 0)
"""Compute capability of the first NVIDIA GPUs with bfloat16."""


def unavailable_reason(a: Tensor, spec: FFNSpec) -> str | None:
    """Return why the kernels cannot compute this mixture for `a`, or None."""
    names = dict.fromkeys([*spec.gate_dictionary, *spec.up_dictionary])
    return _unavailable_reason(a.device.type, a.device.index, a.dtype, ",".join(names))


@constant_in_graphs  # queries of modules and devices cannot be traced
def _unavailable_reason(device: str, index: int | None, dtype: torch.dtype, names: str) -> str | None:
    if dtype not in DTYPES:
        return f"kernels compute {', '.join(str(t).removeprefix('torch.') for t in DTYPES)}, not {dtype}"
    for name in names.split(","):
        try:
            source.expressions(name, "x")
        except ValueError as error:
            return str(error)
    if not build.installed():
        return "triton is not installed"
    if build.interpreting():
        return None
    if device != "cuda":
        return f"kernels need a GPU (or TRITON_INTERPRET=1), not a tensor on {device}"
    if torch.version.hip is None and torch.cuda.get_device_capability(index) < MIN_CAPABILITY:
        return "kernels need a GPU of compute capability {}.{} or newer".format(*MIN_CAPABILITY)
    return None


def mixture(a: Tensor, b: Tensor | None, mix: Tensor | None, spec: FFNSpec, act: Tensor | None = None) -> Tensor:
    """Return sum_kl C_kl f_k(a) g_l(b), the formula of arXiv:2605.26647; differentiable once in a, b, mix and act.

    The inputs may be slices of one matrix product [a | b | mix | padding]: rows may have any stride. A tensor is copied
    only if the elements of a row are not contiguous.

    Args:
        a: (..., H) gate branch, float32, bfloat16 or float16.
        b: (..., H) up branch in a's dtype; None for Type-I.
        mix: (..., n) mixing logits of MoA variants; (..., n) or (n,) coefficients of LA variants; None for fixed
            variants. Order: `FFNSpec.terms` for the quadratic form, else gate branch, then up branch. Any of the
            three dtypes.
        spec: The mixture.
        act: (P,) parameters of trainable activations; None without them.

    Returns:
        (..., H) in a's dtype, contiguous.

    Raises:
        ValueError: The kernels are unavailable (see `unavailable_reason`), or a tensor has a wrong shape or dtype.
        RuntimeError: In a second differentiation.
    """
    _check(a, b, mix, act, spec)
    shared = mix is not None and mix.ndim == 1 and spec.learned_constant
    rows = mix if mix is None or shared else mix.reshape(-1, mix.shape[-1])
    b_rows = None if b is None else b.reshape(-1, b.shape[-1])
    out = operators.mixture(a.reshape(-1, a.shape[-1]), b_rows, rows, act, source.Mixture.of(spec).key)
    return out.view(a.shape)


def _check(a: Tensor, b: Tensor | None, mix: Tensor | None, act: Tensor | None, spec: FFNSpec) -> None:
    """Raise ValueError for what the kernels would read out of bounds or misinterpret."""
    reason = unavailable_reason(a, spec)
    if reason is not None:
        raise ValueError(reason)
    parameters = spec.num_activation_parameters
    for name, tensor, used in (
        ("b", b, spec.type_two),
        ("mix", mix, spec.num_coefficients > 0),
        ("act", act, parameters > 0),
    ):
        if (tensor is not None) != used:
            raise ValueError(f"{name} must be {'given' if used else 'None'} for {spec.variant}")
    if b is not None:
        _check_tensor("b", b, a, a.shape, (a.dtype,))
    if mix is not None:
        leading = () if mix.ndim == 1 and spec.learned_constant else a.shape[:-1]
        _check_tensor("mix", mix, a, (*leading, spec.num_coefficients), DTYPES)
    if act is not None:
        _check_tensor("act", act, a, (parameters,), DTYPES)


def _check_tensor(name: str, x: Tensor, a: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> None:
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(x.shape)}; it must be {tuple(shape)}")
    if x.dtype not in dtypes or x.device != a.device:
        allowed = " or ".join(str(dtype) for dtype in dtypes)
        raise ValueError(f"{name} is {x.dtype} on {x.device}; it must be {allowed} on {a.device}")
