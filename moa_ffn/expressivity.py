"""The paper's separation results as executable checks: fixed < LA < MoA at one hidden unit (arXiv:2605.26647).

Each witness is a function on R^2 that the stronger class represents exactly with one hidden unit. `Witness.built` sets
those weights by hand. `fit` searches the weaker class, with every activation of the paper, by L-BFGS from many starting
points.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moa_ffn.layers import FFN

WIDTH = 1
"""Hidden units of the witnesses and of the weaker classes."""

LAMBDA = 1.5
"""Slope of the second witness, tanh(LAMBDA x1) ReLU(x2); any nonzero value separates the classes."""

_TABLE = ("identity", "gelu", "silu", "relu", "relu2", "leaky_relu", "tanh")


@dataclass(frozen=True)
class Witness:
    """A target function and the two classes it separates.

    Args:
        formula: The target, as text.
        target: (N, 2) -> (N,).
        stronger: Name of the class that contains the target.
        built: Builds the FFN with one hidden unit whose output 0 is the target and whose output 1 is zero.
        weaker: Name of the class that does not contain it.
        candidates: Builds the FFNs of the weaker class at the same width, one per choice of dictionary.
    """

    formula: str
    target: Callable[[Tensor], Tensor]
    stronger: str
    built: Callable[[], FFN]
    weaker: str
    candidates: Callable[[], list[FFN]]


def _ffn(variant: str, f: tuple[str, ...] = _TABLE, g: tuple[str, ...] = _TABLE) -> FFN:
    return FFN(
        2,
        WIDTH,
        variant,
        mixing_gate="tanh",
        gate_activations=f,
        up_activations=g,
        dtype=torch.float64,
        mix_init_std=1.0,
    )


def _set(parameter: Tensor, rows: list[list[float]] | list[float]) -> None:
    with torch.no_grad():
        parameter.copy_(torch.tensor(rows, dtype=parameter.dtype))


def _set_output(ffn: FFN) -> FFN:
    _set(ffn.down_proj.weight, [[1.0], [0.0]])
    return ffn


def _built_la() -> FFN:
    ffn = _ffn("la", ("relu", "relu2"))
    _set(ffn.gate_proj.weight, [[1.0, 0.0]])
    assert ffn.mix_coef is not None
    _set(ffn.mix_coef, [1.0, 1.0])
    return _set_output(ffn)


def _built_moa() -> FFN:
    ffn = _ffn("moa", ("relu",))
    _set(ffn.gate_proj.weight, [[0.0, 1.0]])
    assert ffn.mix_proj is not None
    _set(ffn.mix_proj.weight, [[LAMBDA, 0.0]])
    return _set_output(ffn)


def _built_qdmoa() -> FFN:
    ffn = _ffn("qdmoa", ("relu",), ("relu",))
    _set(ffn.gate_proj.weight, [[0.0, 1.0]])
    assert ffn.up_proj is not None and ffn.mix_proj is not None
    _set(ffn.up_proj.weight, [[1.0, 0.0]])
    _set(ffn.mix_proj.weight, [[1.0, 0.0]])
    return _set_output(ffn)


WITNESSES = (
    Witness(
        "ReLU(x1) + ReLU(x1)^2",
        lambda x: x[:, 0].relu() + x[:, 0].relu().square(),
        "LA",
        _built_la,
        "fixed activation",
        # LA over one activation is that fixed activation: its coefficient is absorbed by down_proj.
        lambda: [_ffn("la", (name,)) for name in _TABLE],
    ),
    Witness(
        f"tanh({LAMBDA} x1) ReLU(x2)",
        lambda x: (LAMBDA * x[:, 0]).tanh() * x[:, 1].relu(),
        "MoA",
        _built_moa,
        "LA",
        lambda: [_ffn("la")],
    ),
    Witness(
        "ReLU(x2) ReLU(x1) tanh(x1)",
        lambda x: x[:, 1].relu() * x[:, 0].relu() * x[:, 0].tanh(),
        "quadratic MoA",
        _built_qdmoa,
        "quadratic LA",
        lambda: [_ffn("qdla")],
    ),
)


def grid(points: int = 33, radius: float = 2.0) -> Tensor:
    """Return (points^2, 2) float64 inputs that cover [-radius, radius]^2."""
    axis = torch.linspace(-radius, radius, points, dtype=torch.float64)
    return torch.cartesian_prod(axis, axis)


def relative_error(ffn: FFN, witness: Witness, x: Tensor) -> float:
    """Return the RMS of ffn(x)[:, 0] - target(x) relative to the RMS of the target, for x (N, 2)."""
    with torch.no_grad():
        target = witness.target(x)
        return ((ffn(x)[:, 0] - target).square().mean() / target.square().mean()).sqrt().item()


def fit(candidates: list[FFN], witness: Witness, x: Tensor, *, starts: int, steps: int = 200, seed: int = 0) -> float:
    """Return the smallest relative error that L-BFGS reaches over all candidates, from `starts` random points each."""
    torch.manual_seed(seed)
    return min(_fit_once(ffn, witness, x, steps) for ffn in candidates for _ in range(starts))


def _fit_once(ffn: FFN, witness: Witness, x: Tensor, steps: int) -> float:
    target = witness.target(x)
    for parameter in ffn.parameters():
        torch.nn.init.normal_(parameter)
    optimizer = torch.optim.LBFGS(
        ffn.parameters(), max_iter=steps, tolerance_grad=1e-12, tolerance_change=1e-15, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (ffn(x)[:, 0] - target).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)  # pyright: ignore[reportArgumentType]  # torch types the closure as () -> float
    error = relative_error(ffn, witness, x)
    return error if error == error else float("inf")
