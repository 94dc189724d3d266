"""Muon for matrices, for stacks of matrices such as experts, and for shards, with torch.optim.Muon's arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moa_train.distributed import full, local, shard_like

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic applied to the singular values (Keller Jordan's Muon, and torch.optim.Muon)."""

ITERATIONS = 5

EPS = 1e-7
"""Lower bound of the norm by which a matrix is divided."""

BATCH_ELEMENTS = 2**24
"""Most elements that several parameters have together when they are orthogonalized at once."""

UPDATE_SCALES: dict[str, Callable[[int, int], float]] = {
    "match_rms_adamw": lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),
    "original": lambda rows, columns: math.sqrt(max(1.0, rows / columns)),
}
"""Scales of the orthogonalized update of a matrix by the names of torch.optim.Muon (`adjust_lr_fn`)."""


class Muon(torch.optim.Optimizer):
    """Muon for matrices (A, B) and stacks (E, A, B), whose E matrices are orthogonalized separately.

    Each matrix W takes the step of `torch.optim.Muon`, which supports whole matrices only, one after the other. With
    gradient G, momentum m and learning rate r: M <- m M + (1 - m) G, then W <- (1 - r weight_decay) W -
    r scale(A, B) orthogonalize(m M + (1 - m) G). The two agree up to the rounding of bfloat16. Matrices of one shape
    share their matrix products. The state of a parameter is one tensor, "momentum_buffer". A matrix with zero
    gradient, such as an expert without tokens, takes a full step along its momentum: the size of an update does not
    depend on that of the gradient.

    With FSDP2, parameters and momenta are in shards of their first dimension. A rank steps its matrices of a stack
    alone. A matrix (A, B) is gathered and orthogonalized on every rank, which keeps its own rows.

    Weight decay is decoupled, the momentum Nesterov's, and `adjust_lr_fn` a key of `UPDATE_SCALES`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        adjust_lr_fn: str = "original",
    ) -> None:
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "adjust_lr_fn": adjust_lr_fn}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Step every parameter that has a gradient."""
        for group in self.param_groups:
            scale = UPDATE_SCALES[group["adjust_lr_fn"]]
            for batch in _batches([parameter for parameter in group["params"] if parameter.grad is not None]):
                blends = [_look_ahead(self.state[each], each, group["momentum"]) for each in batch]
                for parameter, update in zip(batch, _orthogonal(blends), strict=True):
                    own = local(parameter)
                    own.mul_(1 - group["lr"] * group["weight_decay"])
                    own.add_(update, alpha=-group["lr"] * scale(*parameter.shape[-2:]))


def _batches(parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Yield parameters that are orthogonalized together: those of one matrix shape, and parameters in shards alone."""
    by_shape: dict[tuple[int, ...], list[nn.Parameter]] = {}
    for parameter in parameters:
        if isinstance(parameter, DTensor):
            yield [parameter]
            continue
        batch = by_shape.setdefault(tuple(parameter.shape[-2:]), [])
        if batch and sum(map(Tensor.numel, batch)) + parameter.numel() > BATCH_ELEMENTS:
            yield [*batch]
            batch.clear()
        batch.append(parameter)
    yield from by_shape.values()


def _look_ahead(state: dict[str, Tensor], parameter: nn.Parameter, momentum: float) -> Tensor:
    """Update the momentum; return Nesterov's blend of it with the gradient, in the gradient's shape."""
    gradient = parameter.grad
    assert gradient is not None
    if "momentum_buffer" not in state:
        state["momentum_buffer"] = torch.zeros_like(gradient)
    return gradient.lerp(state["momentum_buffer"].lerp_(gradient, 1 - momentum), momentum)


def _orthogonal(blends: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return this rank's part of each orthogonalized matrix (A, B) or stack (E, A, B) of a batch."""
    first = blends[0]
    if isinstance(first, DTensor) and first.ndim == 2:
        return [local(shard_like(first, orthogonalize(full(first)[None])[0]))]
    parts = [local(blend) for blend in blends]  # shards of a stack hold whole matrices
    stacks = [part.reshape(-1, *part.shape[-2:]) for part in parts]
    updates = orthogonalize(torch.cat(stacks) if len(stacks) > 1 else stacks[0]).split([len(stack) for stack in stacks])
    return [update.view(part.shape) for update, part in zip(updates, parts, strict=True)]


def orthogonalize(matrices: Tensor) -> Tensor:
    """Return approximately U V^T for every matrix U S V^T of a stack (E, A, B), in bfloat16.

    Five steps of a quintic Newton-Schulz iteration, X <- a X + b (X X^T) X + c (X X^T)^2 X, from X / norm(X)
    (https://kellerjordan.github.io/posts/muon/). They keep the singular vectors and map singular values of at least
    0.005 of the norm to between 0.68 and 1.16, smaller ones to less. A zero matrix stays zero.
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
    """Return the FLOPs of `orthogonalize` for a stack (E, A, B) or a matrix (A, B), two per multiply-add.

    With sides s <= l an iteration takes 2 s^2 l for X X^T, 2 s^3 for its square and 2 s^2 l for the product with X.
    Only matrix products are counted; torch.optim.Muon has the same number.
    """
    *stack, rows, columns = shape
    short, long = sorted((rows, columns))
    return math.prod(stack) * ITERATIONS * 2 * short**2 * (2 * long + short)
