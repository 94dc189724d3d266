"""Fused kernels of the mixture for GPUs: one forward and one backward for the whole family.

    source.py     mixture -> text of its kernels
    functions.py  device functions that Triton does not have
    build.py      text -> kernels, block sizes, launch
    operators.py  operators of torch, with fake and autograd registrations
    layer.py      the whole layer: one matrix product, the mixture, down_proj

Both read and write each element once. The nonlinearity of the mixing gate and its derivative are inside; arithmetic
is in float32; the backward computes the activations again from a, b and mix, the only tensors saved. Importing this
does not import Triton, which is needed once a kernel runs.

Shapes: (...) tokens, H hidden width, n = `FFNSpec.num_coefficients`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from moa_ffn.backends.triton import build, operators, source
from moa_ffn.spec import FFNSpec
from moa_ffn.torch_internals import constant_in_graphs

__all__ = [
    "DTYPES",
    "Gradients",
    "PackedGradients",
    "mixture",
    "mixture_backward",
    "packed_mixture",
    "packed_mixture_backward",
    "unavailable_reason",
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

MIN_CAPABILITY = (8, 0)
"""The first NVIDIA GPUs with bfloat16."""


class Gradients(NamedTuple):
    """Gradients of a mixture's inputs, each as its input in shape and dtype; the mixture itself, if it was wanted.

    None where the mixture has no such input.
    """

    a: Tensor
    b: Tensor | None
    mix: Tensor | None
    output: Tensor | None


class PackedGradients(NamedTuple):
    """Gradients of a packed mixture's inputs, as `Gradients`."""

    projected: Tensor
    mix: Tensor | None
    output: Tensor | None


def unavailable_reason(a: Tensor, spec: FFNSpec) -> str | None:
    """Why the kernels cannot compute this mixture for `a`, or None."""
    names = dict.fromkeys([*spec.gate_dictionary, *spec.up_dictionary])
    return _unavailable_reason(a.device.type, a.device.index, a.dtype, ",".join(names))


@constant_in_graphs  # looking for modules and devices cannot be traced
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


def mixture(a: Tensor, b: Tensor | None, mix: Tensor | None, spec: FFNSpec) -> Tensor:
    """sum_kl C_kl f_k(a) g_l(b), the formula of arXiv:2605.26647; differentiable once in a, b and mix.

    a, b and mix may be parts of one matrix product, [a | b | mix | padding]: rows may lie at any distance. Only where
    the elements of a row are not side by side is a tensor copied.

    Args:
        a: (..., H) gate branch, float32, bfloat16 or float16.
        b: (..., H) up branch in a's dtype; None for Type-I.
        mix: the mixing logits (..., n) of MoA variants; the coefficients (..., n), or (n,) for all tokens, of LA
            variants; None for fixed ones. In order of `FFNSpec.terms` for the quadratic form, else gate branch, then
            up branch. Any of the three dtypes.
        spec: which mixture.

    Returns:
        (..., H) in a's dtype, contiguous.

    Raises:
        ValueError: the kernels cannot run (see `unavailable_reason`), or a tensor does not fit.
        RuntimeError: in a second differentiation.
    """
    _check(a, b, mix, spec)
    out = operators.mixture(_rows(a), _rows(b), _mix_rows(mix, spec), *source.Mixture.of(spec))
    return out.view(a.shape)


def mixture_backward(
    grad: Tensor, a: Tensor, b: Tensor | None, mix: Tensor | None, spec: FFNSpec, with_output: bool = False
) -> Gradients:
    """Gradients of `mixture`'s tensors for the gradient (..., H) of its result, for a layer with its own backward.

    `with_output=True` also gives the mixture, at the price of one write: the layer needs it for down_proj's gradient
    and so does not have to save it.

    Raises:
        ValueError: as `mixture`.
    """
    _check(a, b, mix, spec)
    _check_fits("grad", grad, a, a.shape, DTYPES)
    wanted = source.Mixture.of(spec)
    found = operators.mixture_backward(_rows(grad), _rows(a), _rows(b), _mix_rows(mix, spec), with_output, *wanted)
    grad_a, grad_b, grad_mix, out = found
    return Gradients(
        grad_a.view(a.shape),
        None if b is None else grad_b.view(b.shape),
        None if mix is None else grad_mix.view(mix.shape),
        out.view(a.shape) if with_output else None,
    )


def packed_mixture(projected: Tensor, mix: Tensor | None, hidden_dim: int, spec: FFNSpec) -> Tensor:
    """`mixture` of the parts of one matrix product. Its gradient is one tensor, ready for that product's backward,
    where autograd would put the gradients of the parts together in one more pass. Loads are widest where H and W are
    multiples of 16.

    Args:
        projected: (..., W), in its rows a (H), for Type-II b (H), then, unless given as `mix`, the mixing logits (n);
            what follows is padding.
        mix: as for `mixture`, where it is not in `projected`; else None.
        hidden_dim: H.
        spec: which mixture.

    Returns:
        (..., H) in projected's dtype, contiguous.

    Raises:
        ValueError, RuntimeError: as `mixture`.
    """
    _check_packed(projected, mix, hidden_dim, spec)
    wanted = source.Mixture.of(spec)
    out = operators.packed_mixture(_rows(projected), _mix_rows(mix, spec), hidden_dim, *wanted)
    return out.view(*projected.shape[:-1], hidden_dim)


def packed_mixture_backward(
    grad: Tensor, projected: Tensor, mix: Tensor | None, hidden_dim: int, spec: FFNSpec, with_output: bool = False
) -> PackedGradients:
    """Gradients of `packed_mixture`'s tensors, zero in the padding, and the mixture, as `mixture_backward`.

    Raises:
        ValueError: as `mixture`.
    """
    _check_packed(projected, mix, hidden_dim, spec)
    shape = (*projected.shape[:-1], hidden_dim)
    _check_fits("grad", grad, projected, shape, DTYPES)
    wanted, rows = source.Mixture.of(spec), (_rows(grad), _rows(projected), _mix_rows(mix, spec))
    grad_projected, grad_mix, out = operators.packed_mixture_backward(*rows, hidden_dim, with_output, *wanted)
    return PackedGradients(
        grad_projected.view(projected.shape),
        None if mix is None else grad_mix.view(mix.shape),
        out.view(shape) if with_output else None,
    )


def _rows(x: Tensor | None) -> Tensor | None:
    """x (..., H) as (N, H), a view wherever its rows are evenly spaced."""
    return None if x is None else x.reshape(-1, x.shape[-1])


def _mix_rows(mix: Tensor | None, spec: FFNSpec) -> Tensor | None:
    return mix if mix is None or _shared(mix, spec) else _rows(mix)


def _shared(mix: Tensor, spec: FFNSpec) -> bool:
    """True for LA's coefficients (n,) of all tokens."""
    return mix.ndim == 1 and spec.learned_constant


def _check(a: Tensor, b: Tensor | None, mix: Tensor | None, spec: FFNSpec) -> None:
    """Raise what `mixture` says it raises."""
    _check_runs(a, spec)
    if (b is not None) != spec.type_two:
        raise ValueError(f"b must be {'given for' if spec.type_two else 'None for'} {spec.variant}")
    if (mix is not None) != (spec.num_coefficients > 0):
        raise ValueError(f"mix must be {'given for' if spec.num_coefficients else 'None for'} {spec.variant}")
    if b is not None:
        _check_fits("b", b, a, a.shape, (a.dtype,))
    _check_mix(mix, a, spec)


def _check_packed(projected: Tensor, mix: Tensor | None, hidden_dim: int, spec: FFNSpec) -> None:
    """Raise what `packed_mixture` says it raises."""
    _check_runs(projected, spec)
    if mix is None and spec.learned_constant:
        raise ValueError(f"mix must be given for {spec.variant}: its coefficients are no part of a product")
    if mix is not None and not spec.num_coefficients:
        raise ValueError(f"mix must be None for {spec.variant}")
    used = hidden_dim * (1 + spec.type_two) + (spec.num_coefficients if mix is None else 0)
    if hidden_dim < 1 or projected.shape[-1] < used:
        width = projected.shape[-1]
        raise ValueError(f"hidden_dim={hidden_dim}: {spec.variant} needs {used} columns, and projected has {width}")
    _check_mix(mix, projected, spec)


def _check_runs(x: Tensor, spec: FFNSpec) -> None:
    reason = unavailable_reason(x, spec)
    if reason is not None:
        raise ValueError(reason)


def _check_mix(mix: Tensor | None, x: Tensor, spec: FFNSpec) -> None:
    if mix is not None:
        leading = () if _shared(mix, spec) else x.shape[:-1]
        _check_fits("mix", mix, x, (*leading, spec.num_coefficients), DTYPES)


def _check_fits(name: str, x: Tensor, like: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> None:
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(x.shape)}; it must be {tuple(shape)}")
    if x.dtype not in dtypes or x.device != like.device:
        allowed = " or ".join(str(dtype) for dtype in dtypes)
        raise ValueError(f"{name} is {x.dtype} on {x.device}; it must be {allowed} on {like.device}")
