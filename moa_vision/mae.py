"""Masked autoencoder around any timm ViT: patchify -> mask -> encode -> decode -> loss (arXiv:2111.06377).

Shapes: B images, C channels, p patch size, K = p * p * C values a patch, L patches an image of which V stay visible
and M = L - V are masked, P prefix tokens (class, registers), D encoder width, E decoder width.

Exact savings over the plain formulation: only visible patches are embedded; decoder tokens keep the order prefix,
visible, masked (attention does not see order, positions are added before); the first decoder block normalizes and
projects the mask token once a position, not once an image; the last decoder block and the head compute masked tokens
only.
"""

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from timm.layers import Mlp, PatchEmbed
from timm.models import checkpoint_seq
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from moa_ffn import FFN, VARIANTS
from moa_vision import vit
from moa_vision.vit import FFN_ARGUMENTS, ffn_layer, ffn_settings

TARGET_EPS = 1e-6
"""Added to a patch's variance before the square root, as in facebookresearch/mae."""

BUILD_FAULTS = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    RuntimeError,
)
"""What timm's and torch's constructors raise for values that cannot be."""

MOST_BLOCKS, LARGEST_SIDE = 2**10, 2**14
"""Upper limits of a depth and of an image's side in pixels, far beyond any model: a billion blocks take memory and
hours even without their weights.
"""

_SET_BY_MAE = ("img_size", "num_classes", "global_pool", "fc_norm", "mlp_layer", "device", "dtype")


class MAEOutput(NamedTuple):
    """What `MAE.forward` returns.

    loss: () float32, mean squared error on the masked patches.
    prediction: (B, M, K), row j belongs to the j-th one of the image's mask. With `norm_pix_loss` in units of the
        normalized patch.
    mask: (B, L) float32, 1 = masked.
    """

    loss: Tensor
    prediction: Tensor
    mask: Tensor


class MAE(nn.Module):
    """Masked autoencoder; wraps `encoder`, initializes it anew, and takes off its classifier.

    Initialization, positions, targets and sizes follow facebookresearch/mae: Xavier-uniform linear layers, patch
    embedding included, fixed sin-cos positions, tokens N(0, 0.02), LayerNorm eps 1e-6. FFN layers initialize their
    own mixing.

    Args:
        encoder: a timm `VisionTransformer` with convolutional patch embedding, absolute positions and a last norm.
        decoder_dim, decoder_depth, decoder_heads, decoder_mlp_ratio: sizes of the decoder.
        decoder_ffn: variant of the decoder's FFN; None: the encoder's. Other FFN settings are always the encoder's.
        mask_ratio: part of the patches that is masked; V = int(L * (1 - mask_ratio)).
        norm_pix_loss: compare with patches normalized to mean 0 and variance 1, each by itself.

    Attributes:
        grid_size: (rows, columns) of patches. patch_size: p in pixels. num_patches: L. num_visible: V. in_chans: C.

    Raises:
        ValueError: the encoder or a size cannot work; the message says what can.
    """

    decoder_pos: Tensor
    config: dict[str, Any] | None = None

    def __init__(
        self,
        encoder: VisionTransformer,
        *,
        decoder_dim: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
        decoder_mlp_ratio: float = 4.0,
        decoder_ffn: str | None = None,
        mask_ratio: float = 0.75,
        norm_pix_loss: bool = True,
    ) -> None:
        super().__init__()
        if problem := _encoder_problem(encoder):
            raise ValueError(f"encoder: {problem}")
        if decoder_depth < 1 or decoder_dim % 4 or decoder_dim % decoder_heads:
            raise ValueError(
                f"decoder_dim={decoder_dim}, decoder_depth={decoder_depth}, decoder_heads={decoder_heads}: "
                "decoder_dim must be a multiple of 4 and of decoder_heads, decoder_depth at least 1"
            )
        self.grid_size: tuple[int, int] = encoder.patch_embed.grid_size
        self.patch_size: int = encoder.patch_embed.patch_size[0]
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.num_visible = int(self.num_patches * (1 - mask_ratio))
        self.in_chans: int = encoder.patch_embed.proj.in_channels
        self.norm_pix_loss = norm_pix_loss
        if not 0 < self.num_visible < self.num_patches:
            raise ValueError(
                f"mask_ratio={mask_ratio} leaves {self.num_visible} of {self.num_patches} patches visible; "
                "at least one must be visible and one masked"
            )
        encoder.reset_classifier(0)
        self.encoder = encoder
        self.decoder_embed = nn.Linear(encoder.embed_dim, decoder_dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, decoder_dim))
        self.register_buffer("decoder_pos", sincos_positions(self.grid_size, decoder_dim), persistent=False)
        mlp_layer = _decoder_ffn(encoder, decoder_ffn)
        self.decoder_blocks = nn.ModuleList(
            DecoderBlock(decoder_dim, decoder_heads, mlp_layer(decoder_dim, int(decoder_dim * decoder_mlp_ratio)))
            for _ in range(decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(decoder_dim, eps=1e-6)
        self.decoder_head = nn.Linear(decoder_dim, self.patch_size**2 * self.in_chans)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """The official recipe's initialization, in place."""
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            elif isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, FFN):  # after its own linear layers, so that it has the last word
                module.init_weights(nn.init.xavier_uniform_)
        encoder = self.encoder
        nn.init.xavier_uniform_(encoder.patch_embed.proj.weight.flatten(1))
        for token in (encoder.cls_token, encoder.reg_token, self.mask_token):
            if token is not None:
                nn.init.normal_(token, std=0.02)
        assert encoder.pos_embed is not None
        encoder.pos_embed.requires_grad_(False).zero_()  # prefix tokens have position zero
        encoder.pos_embed[0, -self.num_patches :] = sincos_positions(self.grid_size, encoder.embed_dim)

    def forward(self, images: Tensor, noise: Tensor | None = None) -> MAEOutput:
        """Mask, reconstruct, and compare.

        Args:
            images: (B, C, H, W) float, normalized by the data set's mean and deviation.
            noise: (B, L); the V patches with the least noise stay visible. None: drawn from the device's generator.

        Raises:
            ValueError: a shape does not fit the model.
        """
        patches = self.patchify(images)
        if noise is None:
            noise = torch.rand(patches.shape[:2], device=images.device)
        mask = self.mask_from(noise)
        visible, masked = self.split(mask)
        latent = self.encode(_take(patches, visible), visible)
        prediction = self.decode(latent, visible, masked)
        target = _take(patches, masked).float()
        if self.norm_pix_loss:
            mean, std = _patch_statistics(target)
            target = (target - mean) / std
        return MAEOutput(F.mse_loss(prediction.float(), target), prediction, mask)

    def mask_from(self, noise: Tensor) -> Tensor:
        """Mask (B, L) float32, 1 where `noise` (B, L) is not among the row's V least."""
        if noise.ndim != 2 or noise.shape[1] != self.num_patches:
            raise ValueError(f"noise has shape {tuple(noise.shape)}; allowed: (B, {self.num_patches})")
        visible = noise.argsort(dim=1, stable=True)[:, : self.num_visible]
        return torch.ones_like(noise, dtype=torch.float32).scatter(1, visible, 0.0)

    def split(self, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Ascending indices of the visible (B, V) and of the masked (B, M) patches of a mask (B, L)."""
        order = mask.argsort(dim=1, stable=True)
        return order[:, : self.num_visible], order[:, self.num_visible :]

    def encode(self, patches: Tensor, visible: Tensor) -> Tensor:
        """Encode visible patches (B, V, K), at indices `visible` (B, V), to latent tokens (B, P + V, D)."""
        encoder, embed = self.encoder, self.encoder.patch_embed
        weight = embed.proj.weight.permute(0, 2, 3, 1).flatten(1)  # (D, K), a patch's values in patchify's order
        x = embed.norm(F.linear(patches, weight, embed.proj.bias))
        assert encoder.pos_embed is not None
        x = x + encoder.pos_embed[0, -self.num_patches :][visible]
        prefix = [token for token in (encoder.cls_token, encoder.reg_token) if token is not None]
        x = torch.cat([*(token.expand(len(x), -1, -1) for token in prefix), x], dim=1)
        x = encoder.norm_pre(encoder.pos_drop(x))
        x = checkpoint_seq(encoder.blocks, x) if encoder.grad_checkpointing else encoder.blocks(x)
        return encoder.norm(x)

    def decode(self, latent: Tensor, visible: Tensor, masked: Tensor) -> Tensor:
        """Predict the masked patches (B, M, K) from latent tokens (B, P + V, D) and both sets of indices."""
        x = self.decoder_embed(latent)
        prefix = x.shape[1] - visible.shape[1]
        seen = torch.cat([x[:, :prefix], x[:, prefix:] + self.decoder_pos[visible]], dim=1)
        # As yet, the mask tokens of one position are the same in all images: L rows stand for all B * M of them.
        x = torch.cat([seen.flatten(0, 1), self.mask_token[0] + self.decoder_pos])
        own = torch.arange(seen.shape[0] * seen.shape[1], device=x.device).view(seen.shape[:2])
        rows = torch.cat([own, own.numel() + masked], dim=1)
        first, last = self.decoder_blocks[0], self.decoder_blocks[-1]
        for block in self.decoder_blocks:
            x = block(x, rows=rows if block is first else None, outputs=masked.shape[1] if block is last else None)
        return self.decoder_head(self.decoder_norm(x))

    def patchify(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) to patches (B, L, K); patches row by row, a patch's values in the order (p, p, C)."""
        (rows, columns), p = self.grid_size, self.patch_size
        expected = (self.in_chans, rows * p, columns * p)
        if images.ndim != 4 or images.shape[1:] != expected:
            raise ValueError(f"images have shape {tuple(images.shape)}; allowed: (B, {str(expected)[1:]}")
        patches = images.unflatten(3, (columns, p)).unflatten(2, (rows, p))  # (B, C, rows, p, columns, p)
        return patches.permute(0, 2, 4, 3, 5, 1).reshape(len(images), self.num_patches, -1)

    def unpatchify(self, patches: Tensor, mask: Tensor | None = None) -> Tensor:
        """Patches (B, L, K) to images (B, C, H, W); with a mask (B, L), `patches` (B, M, K) are the masked ones, in
        the order of `MAEOutput.prediction`, and the visible ones become 0.
        """
        if mask is not None:
            masked = self.split(mask)[1].unsqueeze(-1).expand_as(patches)
            patches = patches.new_zeros(*mask.shape, patches.shape[-1]).scatter(1, masked, patches)
        (rows, columns), p = self.grid_size, self.patch_size
        x = patches.unflatten(2, (p, p, self.in_chans)).unflatten(1, (rows, columns))
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)

    def reconstruct(self, images: Tensor, output: MAEOutput) -> Tensor:
        """Images (B, C, H, W) float32, in the units of `images`: visible patches as given, masked ones predicted."""
        patches = self.patchify(images).float()
        masked = self.split(output.mask)[1]
        prediction = self._to_pixels(output.prediction, _take(patches, masked))
        return self.unpatchify(patches.scatter(1, masked.unsqueeze(-1).expand_as(prediction), prediction))

    def reconstruction_losses(self, images: Tensor, output: MAEOutput) -> dict[str, Tensor]:
        """Both mean squared errors of each image's masked patches, (B,) float32, whatever the model trains on.

        loss_norm compares normalized patches, loss_pixel pixels in the units of `images`.
        """
        target = _take(self.patchify(images), self.split(output.mask)[1]).float()
        error = self._to_pixels(output.prediction, target) - target
        _, std = _patch_statistics(target)
        return {
            "loss_norm": (error / std).square().mean(dim=(1, 2)),
            "loss_pixel": error.square().mean(dim=(1, 2)),
        }

    def _to_pixels(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Prediction (B, M, K) in pixel units, float32; `target` (B, M, K) float32 are the true patches."""
        if not self.norm_pix_loss:
            return prediction.float()
        mean, std = _patch_statistics(target)
        return prediction.float() * std + mean

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay must leave alone: the coefficients of LA variants."""
        return {name for name, _ in self.named_parameters() if name.endswith("mix_coef")}


class DecoderBlock(nn.Module):
    """timm's `Block` with the options of projecting equal tokens once, and of computing the last tokens only.

    Shape:
        x (B, N, E) to (B, N, E).
        With `rows` (B, N), int64: x (R, E) holds distinct tokens, and token n of image b is x[rows[b, n]]. Only R
        tokens are normalized and projected to queries, keys and values.
        With `outputs=n`: to (B, n, E), the last n tokens of the same result. All N tokens are keys and values, but
        only n are queries and go through the MLP.
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
        """Attend, then the MLP, each on a normalized copy and added to its input."""
        kept = slice(None if outputs is None else -outputs, None)
        qkv = self.qkv(self.norm1(x))
        if rows is not None:  # in x's precision: backward adds up a row's gradients from the whole batch
            x, qkv = F.embedding(rows, x), F.embedding(rows, qkv.to(x.dtype))
        qkv = qkv.unflatten(-1, (3, self.num_heads, -1))
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))  # (B, heads, N, E / heads)
        mixed = F.scaled_dot_product_attention(q[:, :, kept], k, v)
        x = x[:, kept] + self.proj(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


def sincos_positions(grid_size: tuple[int, int], dim: int) -> Tensor:
    """Fixed positions (rows * columns, dim) float32, half of them for the column, then half for the row.

    The order of facebookresearch/mae, whose `get_2d_sincos_pos_embed` puts the column first.
    """
    frequency = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))

    def axis(length: int) -> Tensor:
        angle = torch.arange(length, dtype=torch.float64).outer(frequency)
        return torch.cat([angle.sin(), angle.cos()], dim=1)

    rows, columns = grid_size
    row = axis(rows).unsqueeze(1).expand(-1, columns, -1)
    column = axis(columns).unsqueeze(0).expand(rows, -1, -1)
    return torch.cat([column, row], dim=-1).flatten(0, 1).float()


def _take(x: Tensor, indices: Tensor) -> Tensor:
    """Rows of x (B, L, K) at indices (B, n): (B, n, K)."""
    return x.gather(1, indices.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def _patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation (unbiased variance, eps inside the root) of each patch: (..., K) to twice (..., 1)."""
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return mean, (variance + TARGET_EPS).sqrt()


def _encoder_problem(encoder: object) -> str | None:
    """Why `encoder` cannot be masked, or None."""
    if not isinstance(encoder, VisionTransformer):
        return f"is a {type(encoder).__name__}; allowed: a timm VisionTransformer"
    embed = encoder.patch_embed
    if not isinstance(embed, PatchEmbed) or not isinstance(embed.proj, nn.Conv2d) or embed.grid_size is None:
        return "patch_embed must be timm's PatchEmbed with one convolution and a fixed image size"
    if len({*embed.patch_size}) != 1 or len(embed.patch_size) != 2:
        return f"patch_size={embed.patch_size} must be square"
    if embed.img_size != tuple(length * embed.patch_size[0] for length in embed.grid_size):
        return f"img_size={embed.img_size} must be a multiple of patch_size={embed.patch_size[0]}"
    if encoder.pos_embed is None or encoder.embed_dim % 4:
        return f"needs an absolute position embedding and embed_dim={encoder.embed_dim} a multiple of 4"
    if encoder.num_prefix_tokens != encoder.has_class_token + encoder.num_reg_tokens:
        return "prefix tokens other than class and register tokens are not supported"
    if not isinstance(encoder.patch_drop, nn.Identity):
        return "patch_drop_rate must be 0, the mask does this work"
    if encoder.attn_pool is not None or isinstance(encoder.norm, nn.Identity):
        return f"needs its last norm before pooling; global_pool={encoder.global_pool!r} must be 'token' or ''"
    return None


def _decoder_ffn(encoder: VisionTransformer, variant: str | None) -> Callable[..., nn.Module]:
    """The decoder's mlp_layer: settings and, unless `variant` says otherwise, variant of the encoder's FFN."""
    mlp = getattr(encoder.blocks[0], "mlp", None)
    if isinstance(mlp, FFN):
        return ffn_layer(variant or mlp.spec.variant, **ffn_settings(mlp))
    if variant is None and type(mlp) is Mlp and type(mlp.act) is nn.GELU:
        variant = "gelu"
    if variant is None:
        raise ValueError(
            f"decoder_ffn=None: the encoder's {type(mlp).__name__} is none of {', '.join(VARIANTS)}; name one of them"
        )
    return ffn_layer(variant)


def create_mae(
    encoder_name: str,
    *,
    img_size: int | Sequence[int],
    encoder_args: Mapping[str, Any] | None = None,
    **mae_args: Any,
) -> MAE:
    """Build a MAE from plain values, which it keeps as `mae.config` for `export`.

    Args:
        encoder_name: a timm VisionTransformer's name, such as "vit_base_patch16_qdmoa".
        img_size: pixels, one number or (H, W).
        encoder_args: arguments of timm's VisionTransformer, and `ffn_*` where the name is one of ours.
        mae_args: arguments of `MAE`.

    Raises:
        ValueError: a name or a value is not allowed; the message names it.
    """
    if not timm.is_model(encoder_name):
        close = difflib.get_close_matches(encoder_name, timm.list_models(), 3) or sorted(vit.default_cfgs)
        raise ValueError(f"encoder {encoder_name!r} is not a timm model; did you mean {', '.join(close)}?")
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    args = dict(encoder_args or {})
    if not 1 <= min(height, width) <= max(height, width) <= LARGEST_SIDE:
        raise ValueError(f"img_size={img_size}: a side must be from 1 to {LARGEST_SIDE} pixels")
    for name, given in (("encoder_args.depth", args), ("decoder_depth", mae_args)):
        depth = given.get(name.rpartition(".")[2], 1)
        if not isinstance(depth, int) or not 1 <= depth <= MOST_BLOCKS:
            raise ValueError(f"{name}={depth!r}: must be an integer from 1 to {MOST_BLOCKS}")
    allowed = set(inspect.signature(VisionTransformer).parameters) - set(_SET_BY_MAE)
    if encoder_name in vit.default_cfgs:
        allowed |= set(FFN_ARGUMENTS)
    if unknown := set(args) - allowed:
        raise ValueError(f"encoder_args: unknown {min(unknown)!r} for {encoder_name}; allowed: {sorted(allowed)}")
    try:
        encoder = timm.create_model(encoder_name, img_size=(height, width), num_classes=0, **args)
        mae = MAE(encoder, **mae_args)  # pyright: ignore[reportArgumentType]  # MAE checks the class
    except ValueError:
        raise
    except BUILD_FAULTS as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(
            f"encoder {encoder_name!r} and its decoder cannot be built with encoder_args={args}, {mae_args}: {reason}"
        ) from error
    mae.config = {"encoder_name": encoder_name, "img_size": [height, width], "encoder_args": args, **mae_args}
    return mae


def parameter_counts(mae: MAE) -> dict[str, int]:
    """Trained parameters: total = encoder + decoder; of these those of all FFNs, and of their mixing alone."""

    def count(*modules: nn.Module) -> int:
        return sum(p.numel() for module in modules for p in module.parameters() if p.requires_grad)

    blocks = [*mae.encoder.blocks, *mae.decoder_blocks]
    ffns = [module for module in mae.modules() if isinstance(module, FFN)]
    total, encoder = count(mae), count(mae.encoder)
    return {
        "total": total,
        "encoder": encoder,
        "decoder": total - encoder,
        "ffn": count(*(block.mlp for block in blocks if isinstance(block.mlp, nn.Module))),
        "mixing": sum(ffn.mixing_parameters() for ffn in ffns),
    }


def forward_flops(mae: MAE) -> int:
    """Floating-point operations of one more image in a forward pass (a multiply-add is two), matrix products only.

    What is computed, not what the plain formulation would take. Left out is the part that a batch of any size needs
    once, the first decoder block's 6 L E^2 for the mask token. Counted by `torch.utils.flop_counter` on the meta
    device: nothing is computed, and no weight is copied. Raises ValueError where the encoder's arguments do not go
    together, as a pass shows.
    """
    weights = {name: tensor.to("meta") for name, tensor in (*mae.named_parameters(), *mae.named_buffers())}
    (rows, columns), p = mae.grid_size, mae.patch_size

    def flops(images: int) -> int:
        batch = torch.empty(images, mae.in_chans, rows * p, columns * p, device="meta")
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            torch.func.functional_call(mae, weights, (batch,))
        return counter.get_total_flops()

    try:
        return flops(2) - flops(1)
    except BUILD_FAULTS as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"the model {mae.config or ''} cannot compute: {reason}") from error
