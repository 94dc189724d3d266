"""What a device can do and what a run asks of it: peak rates, memory held and needed."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn

BF16_PEAK_FLOPS = {
    "B200": 2250e12,
    "GH200": 989e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "A40": 149.7e12,
    "A30": 165e12,
    "A10G": 70e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 6000 Ada": 364e12,
    "RTX 5090": 209.5e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
}
"""Dense bf16 tensor-core peak with float32 accumulation, FLOP/s, from NVIDIA's data sheets. The first name whose
words occur in `torch.cuda.get_device_name()` counts, so longer names stand before those they contain."""


def bf16_peak_flops(device_name: str) -> float | None:
    """Return the device's dense bf16 peak in FLOP/s, or None for one the table lacks (laptop chips, MIG slices)."""
    words = device_name.replace("-", " ").split()
    if "Laptop" in words or "MIG" in words:
        return None
    for name, peak in BF16_PEAK_FLOPS.items():
        parts = name.split()
        if any(words[i : i + len(parts)] == parts for i in range(len(words))):
            return peak
    return None


def device_name(device: torch.device) -> str:
    """Return e.g. "NVIDIA H200" or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def peak_memory_mib(device: torch.device) -> float:
    """Return the most memory held so far, MiB: by the allocator of a GPU, else by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return held / (2**20 if sys.platform == "darwin" else 2**10)  # bytes there, KiB elsewhere


def state_bytes(model: nn.Module, with_one_moment: Collection[str] = ()) -> int:
    """Return the bytes of weights, gradients and the optimizer's moments: AdamW's two, Muon's one where named."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    spared = sum(p.numel() * p.element_size() for name, p in model.named_parameters() if name in with_one_moment)
    return weights + 3 * trained - spared


def saved_bytes_per_sample(
    model: nn.Module, loss: Callable[[Any], torch.Tensor], example: Callable[[int], Any]
) -> int:
    """Return the bytes that eager autograd keeps for backward, for each sample of a batch.

    Counted in two forward passes, of one and of two samples (`loss(example(n))`), as the growth of the distinct
    storages saved, parameters aside. torch.compile keeps less. The random generators are left as they were.
    """
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def saved(count: int) -> int:
        storages: dict[int, torch.UntypedStorage] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            kept = loss(example(count))
        total = sum(storage.nbytes() for pointer, storage in storages.items() if pointer not in parameters)
        del kept
        return total

    devices = [p.device for p in model.parameters() if p.device.type == "cuda"][:1]
    with torch.random.fork_rng(devices=devices):
        return saved(2) - saved(1)
