"""The kernels as torch operators: `moa_ffn::mixture`, `moa_ffn::packed_mixture` and their backwards.

They are opaque custom operators, not `triton_op`: the kernels' source is generated at run time, and nothing remains to
be fused into a kernel that is the whole mixture. torch sees one call each way with known shapes and gradients, and can
compile, export and checkpoint it.

Shapes: N rows (tokens), H columns, n coefficients, P parameters of activations. `kind` is the key of a
`source.Mixture`. Results that a mixture does not have are empty tensors, because an operator cannot return None.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moa_ffn.backends.triton import build
from moa_ffn.backends.triton.source import Mixture


@torch.library.custom_op("moa_ffn::mixture", mutates_args=())
def mixture(a: Tensor, b: Tensor | None, mix: Tensor | None, act: Tensor | None, kind: str) -> Tensor:
    """Return the mixture (N, H), contiguous, in a's dtype, for a (N, H), b (N, H), mix (N, n) or (n,), and act (P,)."""
    out = _like(a)
    build.forward(Mixture.parse(kind), {**_inputs(a=a, b=b, mix=mix, act=act), "out": out})
    return out


@torch.library.custom_op("moa_ffn::mixture_backward", mutates_args=())
def mixture_backward(
    grad: Tensor, a: Tensor, b: Tensor | None, mix: Tensor | None, act: Tensor | None, kind: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of a, b, mix and act, shaped like these, for the output's gradient (N, H)."""
    results = {"grad_a": _like(a), **_shared_gradients(a.shape[0], mix=mix, act=act)}
    if b is not None:
        results["grad_b"] = _like(b)
    build.backward(Mixture.parse(kind), {**_inputs(grad=grad, a=a, b=b, mix=mix, act=act), **results})
    grad_mix, grad_act = (_reduced(results.get(f"grad_{name}"), x, a) for name, x in (("mix", mix), ("act", act)))
    return results["grad_a"], results.get("grad_b", a.new_empty(0)), grad_mix, grad_act


@torch.library.custom_op("moa_ffn::packed_mixture", mutates_args=())
def packed_mixture(projected: Tensor, mix: Tensor | None, act: Tensor | None, columns: int, kind: str) -> Tensor:
    """Return the mixture (N, H) of the columns [a | b | mix | padding] of `projected` (N, W), with H = `columns`.

    For LA, `mix` (n,) is an argument and not among the columns.
    """
    wanted = Mixture.parse(kind)
    out = projected.new_empty(projected.shape[0], columns)
    build.forward(wanted, {**_inputs(**_parts(projected, mix, columns, wanted), act=act), "out": out})
    return out


@torch.library.custom_op("moa_ffn::packed_mixture_backward", mutates_args=())
def packed_mixture_backward(
    grad: Tensor,
    projected: Tensor,
    mix: Tensor | None,
    act: Tensor | None,
    columns: int,
    with_output: bool,
    kind: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of `projected` (zero in the padding), mix and act, and the mixture if `with_output`."""
    wanted = Mixture.parse(kind)
    grad_projected = _like(projected)
    shared = _shared_gradients(projected.shape[0], mix=mix, act=act)
    grad_mix, grad_act = shared.get("grad_mix"), shared.get("grad_act")
    parts = _parts(grad_projected, grad_mix, columns, wanted)
    grad_projected[:, sum(part.shape[1] for part in parts.values() if part is not grad_mix) :].zero_()
    results = {**shared, **{f"grad_{name}": part for name, part in parts.items()}}
    if with_output:
        results["out"] = projected.new_empty(projected.shape[0], columns)
    build.backward(wanted, {**_inputs(grad=grad, **_parts(projected, mix, columns, wanted), act=act), **results})
    out = results.get("out", projected.new_empty(0))
    return grad_projected, _reduced(grad_mix, mix, projected), _reduced(grad_act, act, projected), out


def _like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)  # contiguous, also if x is a view


def _inputs(**tensors: Tensor | None) -> dict[str, Tensor]:
    """Return the tensors that are given, with the elements of each row contiguous."""
    given = {name: x for name, x in tensors.items() if x is not None}
    return {name: x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous() for name, x in given.items()}


def _parts(projected: Tensor, mix: Tensor | None, columns: int, mixture: Mixture) -> dict[str, Tensor]:
    """Return a, b and mix as views of the columns of `projected` (N, W)."""
    names = ["a", "b"] if mixture.type_two else ["a"]
    parts = {name: projected.narrow(1, index * columns, columns) for index, name in enumerate(names)}
    if mixture.coefficients:
        first = len(names) * columns
        parts["mix"] = projected.narrow(1, first, mixture.coefficients) if mix is None else mix
    return parts


def _shared_gradients(rows: int, **tensors: Tensor | None) -> dict[str, Tensor]:
    """Return where each row writes the gradients of mix and act; shared ones are summed later, in float32."""
    return {
        f"grad_{name}": _like(x) if x.ndim == 2 else x.new_empty(rows, len(x), dtype=torch.float32)
        for name, x in tensors.items()
        if x is not None
    }


def _reduced(grad: Tensor | None, x: Tensor | None, like: Tensor) -> Tensor:
    if grad is None or x is None:
        return like.new_empty(0)
    return grad if x.ndim == 2 else grad.sum(0).to(x.dtype)


@mixture.register_fake
def _(a: Tensor, b: Tensor | None, mix: Tensor | None, act: Tensor | None, kind: str) -> Tensor:
    return _like(a)


@mixture_backward.register_fake
def _(
    grad: Tensor, a: Tensor, b: Tensor | None, mix: Tensor | None, act: Tensor | None, kind: str
) -> tuple[Tensor, ...]:
    return _like(a), *(a.new_empty(0) if x is None else _like(x) for x in (b, mix, act))


@packed_mixture.register_fake
def _(projected: Tensor, mix: Tensor | None, act: Tensor | None, columns: int, kind: str) -> Tensor:
    return projected.new_empty(projected.shape[0], columns)


@packed_mixture_backward.register_fake
def _(
    grad: Tensor,
    projected: Tensor,
    mix: Tensor | None,
    act: Tensor | None,
    columns: int,
    with_output: bool,
    kind: str,
) -> tuple[Tensor, ...]:
    out = projected.new_empty((projected.shape[0], columns) if with_output else 0)
    return _like(projected), *(projected.new_empty(0) if x is None else _like(x) for x in (mix, act)), out


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.kind = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    found = mixture_backward(grad, *ctx.saved_tensors, ctx.kind)
    *needed, _ = ctx.needs_input_grad
    return *(gradient if need else None for gradient, need in zip(found, needed, strict=True)), None


def _no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError("the kernels have no second derivatives; use FFN(backend='eager')")


mixture.register_autograd(_gradients, setup_context=_save)
for _backward in (mixture_backward, packed_mixture_backward):
    _backward.register_autograd(_no_second_derivative)
