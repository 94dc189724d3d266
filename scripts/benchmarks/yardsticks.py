"""What a device can do at best: copy bytes, multiply matrices. Measured beside what is compared with it."""

import torch

from .measure import MIB, Case

COPY_MIB = {"cuda": 1024, "cpu": 256}
"""Bytes read in a copy, by type of device: far more than caches hold."""

PRODUCT_SIZE = {"cuda": 8192, "cpu": 1024}
"""Rows and columns of the matrices of a product, by type of device: enough for the full rate."""


def copy_case(device: torch.device, labels: dict[str, str], mib: int | None = None) -> Case:
    """A copy of a large tensor; items are the bytes moved, read and written."""
    source = torch.ones((mib or COPY_MIB[device.type]) * MIB, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    return Case(labels, lambda: target.copy_(source), items=2 * source.numel())


def product_case(device: torch.device, dtype: torch.dtype, labels: dict[str, str], size: int | None = None) -> Case:
    """A product of square matrices; items are floating-point operations, a multiply-add is two."""
    size = size or PRODUCT_SIZE[device.type]
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    result = torch.empty_like(left)
    return Case(labels, lambda: torch.mm(left, right, out=result), items=2 * size**3)
