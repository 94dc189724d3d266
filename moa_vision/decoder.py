"""Parts of the MAE decoder: a transformer block that skips redundant tokens, and fixed sin-cos positions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DecoderBlock(nn.Module):
    """Pre-norm transformer block, as timm's `Block`, that can share equal input tokens and skip unused outputs.

    Args:
        dim: Width E.
        num_heads: Attention heads.
        mlp: Module from (..., E) to (..., E).
    """

    def __init__(self, dim: int, num_heads: int, mlp: nn.Module) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = mlp

    def forward(self, x: Tensor, rows: Tensor | None = None, outputs: int | None = None) -> Tensor:
        """Apply attention and MLP, each on a normalized copy and with a residual connection.

        Args:
            x: Tokens (B, N, E); with `rows`, distinct tokens (R, E).
            rows: (B, N) int64. Token n of image b is x[rows[b, n]], so only R tokens are normalized and projected to
                queries, keys and values.
            outputs: Compute only the last `outputs` tokens. All N tokens stay keys and values.

        Returns:
            (B, N, E), or (B, outputs, E).
        """
        kept = slice(None if outputs is None else -outputs, None)
        qkv = self.qkv(self.norm1(x))
        if rows is not None:  # in x's precision, because backward sums the gradients of a row over the batch
            x, qkv = F.embedding(rows, x), F.embedding(rows, qkv.to(x.dtype))
        qkv = qkv.unflatten(-1, (3, self.num_heads, -1))
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))  # (B, heads, N, E / heads)
        mixed = F.scaled_dot_product_attention(q[:, :, kept], k, v)
        x = x[:, kept] + self.proj(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


def sincos_positions(grid_size: tuple[int, int], dim: int) -> Tensor:
    """Return fixed 2-D positions (rows * columns, dim), float32.

    The first half encodes the column and the second half the row, the order of `get_2d_sincos_pos_embed` in
    facebookresearch/mae.
    """
    frequency = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))

    def axis(length: int) -> Tensor:
        angle = torch.arange(length, dtype=torch.float64).outer(frequency)
        return torch.cat([angle.sin(), angle.cos()], dim=1)

    rows, columns = grid_size
    row = axis(rows).unsqueeze(1).expand(-1, columns, -1)
    column = axis(columns).unsqueeze(0).expand(rows, -1, -1)
    return torch.cat([column, row], dim=-1).flatten(0, 1).float()
