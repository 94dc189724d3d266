"""FLOPs of image models, counted by `torch.utils.flop_counter` on the meta device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def flops_per_image(model: nn.Module, image_shape: Sequence[int]) -> int:
    """Count the FLOPs that one more image adds to a forward pass: matrix products, a multiply-add is two.

    Nothing is computed and no weight is copied.

    Args:
        model: Module of images (B, C, H, W).
        image_shape: (C, H, W).
    """
    weights = {name: tensor.to("meta") for name, tensor in (*model.named_parameters(), *model.named_buffers())}

    def flops(images: int) -> int:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            torch.func.functional_call(model, weights, (torch.empty(images, *image_shape, device="meta"),))
        return counter.get_total_flops()

    return flops(2) - flops(1)
