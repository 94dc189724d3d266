"""Where a masked autoencoder's training step spends its time: one timeline, cut where a part of the model begins.

A step is a sequence of marks; what lies between two of them belongs to the first one's part, so that the parts add
up to the step. Forward marks are set when a module is called. The backward of a part ends when the gradient of its
input is complete, which a hook on that tensor tells; it runs the parts in reverse order. Nothing is compiled, since a
compiled step has no such places.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from moa_vision.mae import MAE

Part = tuple[str, str]
"""(phase, part); the phase is one of `PHASES`, or "optimizer"."""
PHASES = ("forward", "backward")
Reading = TypeVar("Reading")

PARTS = (
    *("patch embedding", "encoder attention", "encoder FFN", "encoder norm"),
    *("decoder embedding", "decoder attention", "decoder FFN", "head", "loss"),
)
"""In the order of a forward pass. "patch embedding" begins with normalizing pixels and masking; attention and FFN
include their norm and residual; "loss" includes the targets."""


class Timeline(Generic[Reading]):
    """Marks of one step.

    Args:
        read: reads a clock or counter.
        differences: readings in their order -> the amount between each two neighbours.
    """

    def __init__(self, read: Callable[[], Reading], differences: Callable[[list[Reading]], list[float]]) -> None:
        self.read, self.differences = read, differences
        self.marks: list[tuple[Part, Reading]] = []

    def mark(self, phase: str, part: str) -> None:
        """What follows belongs to this part."""
        self.marks.append(((phase, part), self.read()))

    def begin(self, part: str, x: Tensor | None = None) -> None:
        """A forward part begins, with the input x; in the backward the part before it will follow it."""
        before = self.marks[-1][0][1]
        self.mark("forward", part)
        if x is not None and x.requires_grad:
            x.register_hook(lambda _: self.mark("backward", before))

    def finish(self) -> dict[Part, float]:
        """Total of each part; the next step can begin."""
        amounts: dict[Part, float] = defaultdict(float)
        differences = self.differences([*(reading for _, reading in self.marks), self.read()])
        for (part, _), amount in zip(self.marks, differences, strict=True):
            amounts[part] += amount
        self.marks.clear()
        return dict(amounts)


def clock(device: torch.device) -> Timeline[Any]:
    """A timeline in seconds: of the device's events on a GPU, else of the host's clock."""
    if device.type != "cuda":
        return Timeline(time.perf_counter, _steps)

    def event() -> torch.cuda.Event:
        now = torch.cuda.Event(enable_timing=True)
        now.record()
        return now

    def seconds(events: list[torch.cuda.Event]) -> list[float]:
        events[-1].synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in pairwise(events)]

    return Timeline(event, seconds)


def counter(flops: FlopCounterMode) -> Timeline[float]:
    """A timeline in floating-point operations of matrix products."""
    return Timeline(flops.get_total_flops, _steps)


def _steps(readings: list[float]) -> list[float]:
    return [after - before for before, after in pairwise(readings)]


@contextmanager
def marked(mae: MAE, timeline: Timeline[Any]) -> Iterator[None]:
    """Every forward and backward pass of the model sets its marks."""

    def before(module: nn.Module, part: str) -> Any:
        return module.register_forward_pre_hook(lambda _, inputs: timeline.begin(part, inputs[0]))

    def after(_: nn.Module, inputs: object, output: Any) -> None:
        timeline.begin("loss", output)

    handles = [before(mae.encoder.norm, "encoder norm"), before(mae.decoder_embed, "decoder embedding")]
    for name, blocks in (("encoder", mae.encoder.blocks), ("decoder", mae.decoder_blocks)):
        for block in blocks:
            norm2 = block.get_submodule("norm2")
            handles += [before(block, f"{name} attention"), before(norm2, f"{name} FFN")]
    handles += [before(mae.decoder_norm, "head"), mae.decoder_head.register_forward_hook(after)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def split_step(
    loss: Callable[[], Tensor],
    optimizer: torch.optim.Optimizer,
    precision: torch.autocast,
    timeline: Timeline[Any],
) -> dict[Part, float]:
    """A training step of a `marked` model, by part."""
    timeline.mark("forward", PARTS[0])
    with precision:
        value = loss()
    timeline.mark("backward", PARTS[-1])
    value.backward()
    timeline.mark("optimizer", "optimizer")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return timeline.finish()
