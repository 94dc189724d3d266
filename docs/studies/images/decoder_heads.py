"""Overlap of the attention of a masked autoencoder's two decoder heads: 1 when both attend alike.

python docs/studies/images/decoder_heads.py data/cifar10/val RUN [RUN ...]

Prints, for each run, the mean of sum(min(a, b)) over the masked patches of 256 held-out images, where a and b are the
attention weights of the two heads, and the loss on normalized pixels of these images.
"""

import argparse
from pathlib import Path

import torch
import webdataset as wds
from torch import Tensor, nn

from moa_vision.data import normalize
from moa_vision.export import load_mae
from moa_vision.mae import MAE


@torch.no_grad()
def overlap_and_loss(mae: MAE, images: Tensor, noise: Tensor) -> tuple[float, float]:
    """Return the overlap of the first decoder block's two heads, and the loss, on images (B, C, H, W)."""
    block = mae.decoder_blocks[0]
    seen: dict[str, Tensor] = {}
    block.register_forward_pre_hook(lambda _, args, given: seen.update(given), with_kwargs=True)
    block.get_submodule("qkv").register_forward_hook(lambda _, args, out: seen.update(qkv=out))
    loss = mae(images, noise).loss.item()
    qkv = nn.functional.embedding(seen["rows"], seen["qkv"])  # (B, N, 3 * heads * D)
    q, k, _ = qkv.unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, N, D) each
    weights = (q[:, :, -seen["outputs"] :] @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
    return weights.amin(1).sum(-1).mean().item(), loss


def main() -> None:
    """Print a line for each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=Path, help="folder of held-out shards")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a finished run")
    args = parser.parse_args()
    shards = wds.WebDataset(sorted(map(str, args.shards.glob("*.tar"))), shardshuffle=False).decode("torchrgb")
    pixels = torch.stack([sample["jpg"] for sample, _ in zip(shards, range(256), strict=False)])
    for run in args.runs:
        mae = load_mae(run / "export").eval()
        noise = torch.rand(len(pixels), mae.num_patches, generator=torch.Generator().manual_seed(0))
        images = normalize(pixels, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
        print("{}: overlap {:.3f}, loss {:.4f}".format(run.name, *overlap_and_loss(mae, images, noise)))


if __name__ == "__main__":
    main()
