"""Muon for stacks of matrices, as experts are, and for matrices in shards: torch.optim.Muon's arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moa_train.distributed import full, local, place_like

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic that an iteration applies to the singular values (Keller Jordan's Muon, and torch.optim.Muon)."""

ITERATIONS = 5

EPS = 1e-7
"""Smallest norm that a matrix is divided by."""


class UpdateScale(NamedTuple):
    """What multiplies the orthogonalized update of a matrix of A rows and B columns: as text, and of (A, B)."""

    formula: str
    factor: Callable[[int, int], float]


UPDATE_SCALES = {
    "match_rms_adamw": UpdateScale("0.2 sqrt(max(A, B))", lambda rows, columns: 0.2 * math.sqrt(max(rows, columns))),
    "original": UpdateScale("sqrt(max(1, A / B))", lambda rows, columns: math.sqrt(max(1.0, rows / columns))),
}
"""By the names that torch.optim.Muon gives them (`adjust_lr_fn`)."""


class StackedMuon(torch.optim.Optimizer):
    """Muon for parameters of shape (E, A, B), each of whose E matrices (A, B) is orthogonalized on its own.

    Each matrix W takes the same step as in `torch.optim.Muon`, which knows matrices only, and these only whole. With
    gradient G, momentum m and rate r: M <- m M + (1 - m) G, then W <- (1 - r weight_decay) W - r scale(A, B)
    orthogonalize(m M + (1 - m) G). A stack's matrices share their products, so the two agree up to the rounding of
    bfloat16. The state of a parameter is one tensor, "momentum_buffer". A matrix whose gradient is zero, as that of
    an expert without a token in a step, is stepped in full along its momentum: the size of an update does not depend
    on that of the gradient.

    Parameters may be in shards of their first dimension (FSDP2), and their momentum is then. Of a stack each process
    has whole matrices and steps them alone. A matrix (A, B), a stack of one, is gathered: its momentum blended with
    its gradient is orthogonalized on every process, which keeps its own rows.

    Args:
        params: Parameters (E, A, B) or (A, B), or groups of them.
        lr: Rate.
        weight_decay: Decoupled weight decay.
        momentum: Nesterov momentum, in [0, 1).
        adjust_lr_fn: A key of `UPDATE_SCALES`.

    Raises:
        ValueError: a parameter is neither a matrix nor a stack of them, or `adjust_lr_fn` is unknown.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        adjust_lr_fn: str = "original",
    ) -> None:
        if adjust_lr_fn not in UPDATE_SCALES:
            raise ValueError(f"adjust_lr_fn is {adjust_lr_fn!r}; it must be one of {', '.join(UPDATE_SCALES)}")
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "adjust_lr_fn": adjust_lr_fn}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of matrices and stacks. Raises ValueError for a parameter that is neither."""
        super().add_param_group(param_group)
        for parameter in self.param_groups[-1]["params"]:
            if parameter.ndim not in (2, 3):
                shape = tuple(parameter.shape)
                raise ValueError(
                    f"a parameter has the shape {shape}; it must be a matrix (A, B) or a stack of matrices (E, A, B)"
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step every parameter that has a gradient; return what `closure` returns, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            scale = UPDATE_SCALES[group["adjust_lr_fn"]].factor
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                update = _orthogonal(_look_ahead(self.state[parameter], parameter.grad, group["momentum"]))
                own = local(parameter)
                own.mul_(1 - group["lr"] * group["weight_decay"])
                own.add_(update, alpha=-group["lr"] * scale(*parameter.shape[-2:]))
        return loss


def _look_ahead(state: dict[str, Tensor], gradient: Tensor, momentum: float) -> Tensor:
    """Take the gradient into the momentum; return Nesterov's blend of both, in the gradient's shape."""
    if "momentum_buffer" not in state:
        state["momentum_buffer"] = torch.zeros_like(gradient)
    return gradient.lerp(state["momentum_buffer"].lerp_(gradient, 1 - momentum), momentum)


def _orthogonal(blend: Tensor) -> Tensor:
    """Return this process's part of the orthogonalized matrices (E, A, B) or matrix (A, B)."""
    if blend.ndim == 3:  # in shards of whole matrices
        return orthogonalize(local(blend))
    return local(place_like(blend, orthogonalize(full(blend)[None])[0]))


def orthogonalize(matrices: Tensor) -> Tensor:
    """Return about U V^T of every matrix U S V^T of a stack (E, A, B), in bfloat16.

    Five steps of a quintic Newton-Schulz iteration, X <- a X + b (X X^T) X + c (X X^T)^2 X, from X / norm(X)
    (https://kellerjordan.github.io/posts/muon/). They keep the singular vectors and take every singular value of at
    least 0.005 of the norm to between 0.68 and 1.16, smaller ones less far up. A matrix of zeros stays zero.
    """
    a, b, c = COEFFICIENTS
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.to(torch.bfloat16, copy=True)
    x = x.mT if tall else x  # the smaller of the two Gram matrices
    x.div_(torch.linalg.matrix_norm(x, keepdim=True).clamp_min_(EPS))
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def orthogonalize_flops(shape: Sequence[int]) -> int:
    """Return the FLOPs of `orthogonalize` for a stack (E, A, B) or a matrix (A, B), a multiply-add being two.

    With sides s <= l an iteration has 2 s^2 l for X X^T, 2 s^3 for its square and 2 s^2 l for the product with X.
    Matrix products only, which torch.optim.Muon has as many of.
    """
    *stack, rows, columns = shape
    short, long = sorted((rows, columns))
    return math.prod(stack) * ITERATIONS * 2 * short**2 * (2 * long + short)
