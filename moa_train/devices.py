"""Devices: peak FLOP/s and memory; memory that a process uses and that a forward pass saves."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode  # the import that torch's documentation gives
from torch.multiprocessing.reductions import StorageWeakRef


class Gpu(NamedTuple):
    """A device type.

    Attributes:
        name: Words of `torch.cuda.get_device_name()`, followed by the memory where it varies, or "cpu".
        memory_gib: Device memory; drivers and error correction take up to 6 % of it.
        peak_flops: Dense bf16 tensor-core peak with float32 accumulation, FLOP/s.
    """

    name: str
    memory_gib: float | None
    peak_flops: float | None

    @property
    def option(self) -> str:
        """The name on a command line, e.g. "a100-80gb"."""
        return self.name.lower().replace(" ", "-")


GPUS = (
    Gpu("B200", 180, 2250e12),
    Gpu("GH200", 96, 989e12),
    Gpu("H200", 141, 989e12),
    Gpu("H100 NVL", 94, 835e12),
    Gpu("H100 PCIe", 80, 756e12),
    Gpu("H100", 80, 989e12),
    Gpu("A100 80GB", 80, 312e12),
    Gpu("A100 40GB", 40, 312e12),
    Gpu("A40", 48, 149.7e12),
    Gpu("A30", 24, 165e12),
    Gpu("A10G", 24, 70e12),
    Gpu("A10", 24, 125e12),
    Gpu("L40S", 48, 362e12),
    Gpu("L40", 48, 181e12),
    Gpu("L4", 24, 121e12),
    Gpu("RTX 6000 Ada", 48, 364e12),
    Gpu("RTX 5090", 32, 209.5e12),
    Gpu("RTX 4090", 24, 165.2e12),
    Gpu("RTX 3090", 24, 71e12),
    Gpu("cpu", None, None),
)
"""Devices of the planner, from NVIDIA's data sheets; longer names come before those that they contain."""


def bf16_peak_flops(device_name: str) -> float | None:
    """Return the dense bf16 peak in FLOP/s, None for unlisted devices, laptop chips and MIG slices."""
    words = device_name.replace("-", " ").split()
    if "Laptop" in words or "MIG" in words:
        return None
    text = f" {' '.join(words)} "
    names = ((gpu.name.removesuffix(" 80GB").removesuffix(" 40GB"), gpu.peak_flops) for gpu in GPUS)
    return next((peak for name, peak in names if f" {name} " in text), None)


def find_gpu(option: str) -> Gpu:
    """Return the device of `GPUS` with this `Gpu.option`."""
    return next(gpu for gpu in GPUS if gpu.option == option)


def device_name(device: torch.device) -> str:
    """Return e.g. "NVIDIA H200" or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def peak_memory_mib(device: torch.device) -> float:
    """Return the peak memory so far, MiB: of a GPU's allocator, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return held / (2**20 if sys.platform == "darwin" else 2**10)  # bytes on macOS, else KiB


class SavedBytes(NamedTuple):
    """Bytes that eager autograd saves for backward.

    Attributes:
        fixed: Independent of the batch: weights cast by autocast, gradients that the loss computes early.
        per_sample: For each sample.
    """

    fixed: int
    per_sample: int


def trace_saved_bytes(model: nn.Module, loss: Callable[[int], Tensor], *, bf16: bool) -> SavedBytes:
    """Return the bytes that `loss(n)`, the loss of n samples, saves for backward, without computing anything.

    Forward passes of one and two samples run on torch's fake tensors, which have no memory. Activations are those of
    a CPU in eager mode.

    Args:
        model: The model, on torch's "meta" device.
        loss: Makes a batch of n samples and returns its loss through `model`.
        bf16: Whether to use bf16 autocast.
    """

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, samples: int) -> Tensor:
            return loss(samples)

    bound = Loss()
    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        tensors: dict[str, Tensor] = {
            name: torch.empty(tensor.shape, dtype=tensor.dtype, requires_grad=tensor.requires_grad)
            for name, tensor in (*bound.named_parameters(), *bound.named_buffers())
        }
        one, two = (
            saved_bytes(lambda n=n: torch.func.functional_call(bound, tensors, (n,)), tensors.values()) for n in (1, 2)
        )
    return SavedBytes(2 * one - two, two - one)


def saved_bytes(loss: Callable[[], Tensor], parameters: Iterable[Tensor]) -> int:
    """Return the bytes of the distinct storages that autograd saves in `loss()`, without those of the parameters."""
    own = {StorageWeakRef(parameter.untyped_storage()) for parameter in parameters}  # an identity, of fake ones too
    storages: dict[StorageWeakRef, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[StorageWeakRef(storage)] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = loss()
    total = sum(storage.nbytes() for identity, storage in storages.items() if identity not in own)
    del kept
    return total
