"""The kernels as operators of torch: `moa_ffn::mixture`, `moa_ffn::packed_mixture`, and the backward of each.

They are opaque (`torch.library.custom_op`). `triton_op` would have compilers read the kernels' source, but that is
generated when a kernel is first needed and is no Triton kernel at all in the interpreter, and there is nothing to
fuse into a kernel that is the whole mixture already. So torch sees one call each way, of known shapes
(`register_fake`) and with known gradients (`register_autograd`), and compiles, exports and checkpoints it as an
operator of its own.

Shapes: N rows (tokens), H columns, n coefficients. Saved for the backward are the inputs alone. The last four
arguments are the fields of a `Mixture`; results that a mixture does not have are empty tensors.
"""

from typing import Any

import torch
from torch import Tensor

from moa_ffn.backends.triton import build
from moa_ffn.backends.triton.source import Mixture


@torch.library.custom_op("moa_ffn::mixture", mutates_args=())
def mixture(a: Tensor, b: Tensor | None, mix: Tensor | None, form: str, gate: str, f: str, g: str) -> Tensor:
    """a (N, H), b (N, H), mix (N, n) or (n,) -> (N, H), contiguous, in a's dtype."""
    out = _like(a)
    build.forward(Mixture(form, gate, f, g), {**_inputs(a=a, b=b, mix=mix), "out": out})
    return out


@torch.library.custom_op("moa_ffn::mixture_backward", mutates_args=())
def mixture_backward(
    grad: Tensor,
    a: Tensor,
    b: Tensor | None,
    mix: Tensor | None,
    with_output: bool,
    form: str,
    gate: str,
    f: str,
    g: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """grad (N, H) -> gradients of a, b and mix, shaped as these, and the mixture (N, H) itself if wanted."""
    results = {"grad_a": _like(a)}
    if b is not None:
        results["grad_b"] = _like(b)
    if mix is not None:
        results["grad_mix"] = _mix_gradient(mix, a.shape[0])
    if with_output:
        results["out"] = _like(a)
    build.backward(Mixture(form, gate, f, g), {**_inputs(grad=grad, a=a, b=b, mix=mix), **results})
    grad_a, grad_b, out = (results.get(name, a.new_empty(0)) for name in ("grad_a", "grad_b", "out"))
    return grad_a, grad_b, _reduced(results.get("grad_mix"), mix, a), out


@torch.library.custom_op("moa_ffn::packed_mixture", mutates_args=())
def packed_mixture(projected: Tensor, mix: Tensor | None, columns: int, form: str, gate: str, f: str, g: str) -> Tensor:
    """`mixture` of the columns [a | b | mix | padding] of projected (N, W); of [a | b | padding] if mix is given."""
    wanted = Mixture(form, gate, f, g)
    out = projected.new_empty(projected.shape[0], columns)
    build.forward(wanted, {**_inputs(**_parts(projected, mix, columns, wanted)), "out": out})
    return out


@torch.library.custom_op("moa_ffn::packed_mixture_backward", mutates_args=())
def packed_mixture_backward(
    grad: Tensor,
    projected: Tensor,
    mix: Tensor | None,
    columns: int,
    with_output: bool,
    form: str,
    gate: str,
    f: str,
    g: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """grad (N, H) -> gradients of projected, one tensor (N, W) with zeros in the padding, and of mix; the mixture."""
    wanted = Mixture(form, gate, f, g)
    grad_projected = _like(projected)
    grad_mix = None if mix is None else _mix_gradient(mix, projected.shape[0])
    grads = _parts(grad_projected, grad_mix, columns, wanted)
    grad_projected[:, _used(columns, mix, wanted) :].zero_()
    results = {f"grad_{name}": part for name, part in grads.items()}
    if with_output:
        results["out"] = projected.new_empty(projected.shape[0], columns)
    build.backward(wanted, {**_inputs(grad=grad, **_parts(projected, mix, columns, wanted)), **results})
    out = results.get("out", projected.new_empty(0))
    return grad_projected, _reduced(grad_mix, mix, projected), out


def _like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)  # contiguous, also where x is a view


def _inputs(**tensors: Tensor | None) -> dict[str, Tensor]:
    """The tensors that there are; those whose rows do not have their elements side by side, copied."""
    given = {name: x for name, x in tensors.items() if x is not None}
    return {name: x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous() for name, x in given.items()}


def _mix_gradient(mix: Tensor, rows: int) -> Tensor:
    """Where each row writes the gradient of its coefficients; in float32 if they are all rows', to be summed."""
    return _like(mix) if mix.ndim == 2 else mix.new_empty(rows, len(mix), dtype=torch.float32)


def _reduced(grad_mix: Tensor | None, mix: Tensor | None, like: Tensor) -> Tensor:
    if grad_mix is None or mix is None:
        return like.new_empty(0)
    return grad_mix if mix.ndim == 2 else grad_mix.sum(0).to(mix.dtype)


def _used(columns: int, mix: Tensor | None, mixture: Mixture) -> int:
    """Columns of `projected` before the padding."""
    return columns * (1 + mixture.type_two) + (mixture.coefficients if mix is None else 0)


def _parts(projected: Tensor, mix: Tensor | None, columns: int, mixture: Mixture) -> dict[str, Tensor]:
    """a, b and mix as views of projected (N, W); mix as given, if it is."""
    names = ["a", "b"] if mixture.type_two else ["a"]
    parts = {name: projected.narrow(1, index * columns, columns) for index, name in enumerate(names)}
    if mixture.coefficients:
        first = len(names) * columns
        parts["mix"] = projected.narrow(1, first, mixture.coefficients) if mix is None else mix
    return parts


@mixture.register_fake
def _(a: Tensor, b: Tensor | None, mix: Tensor | None, *settings: str) -> Tensor:
    return _like(a)


@mixture_backward.register_fake
def _(
    grad: Tensor, a: Tensor, b: Tensor | None, mix: Tensor | None, with_output: bool, *settings: str
) -> tuple[Tensor, ...]:
    return _like(a), *(a.new_empty(0) if x is None else _like(x) for x in (b, mix, a if with_output else None))


@packed_mixture.register_fake
def _(projected: Tensor, mix: Tensor | None, columns: int, *settings: str) -> Tensor:
    return projected.new_empty(projected.shape[0], columns)


@packed_mixture_backward.register_fake
def _(
    grad: Tensor, projected: Tensor, mix: Tensor | None, columns: int, with_output: bool, *settings: str
) -> tuple[Tensor, ...]:
    out = projected.new_empty((projected.shape[0], columns) if with_output else 0)
    return _like(projected), projected.new_empty(0) if mix is None else _like(mix), out


def _keep_mixture(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a, b, mix, *ctx.settings = inputs
    ctx.save_for_backward(a, b, mix)


def _mixture_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    *found, _ = mixture_backward(grad, *ctx.saved_tensors, False, *ctx.settings)
    return _needed(ctx, found)


def _keep_packed(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    projected, mix, *ctx.settings = inputs
    ctx.save_for_backward(projected, mix)


def _packed_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    columns, *fields = ctx.settings
    *found, _ = packed_mixture_backward(grad, *ctx.saved_tensors, columns, False, *fields)
    return _needed(ctx, found)


def _needed(ctx: Any, found: list[Tensor]) -> tuple[Tensor | None, ...]:
    """One gradient for each argument: those found, where they are needed, and none for the settings behind them."""
    grads = [grad if needed else None for grad, needed in zip(found, ctx.needs_input_grad, strict=False)]
    return (*grads, *(None for _ in ctx.settings))


def _no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError("the kernels have no second derivatives; FFN(backend='eager') has")


mixture.register_autograd(_mixture_gradients, setup_context=_keep_mixture)
packed_mixture.register_autograd(_packed_gradients, setup_context=_keep_packed)
for _backward in (mixture_backward, packed_mixture_backward):
    _backward.register_autograd(_no_second_derivative)
