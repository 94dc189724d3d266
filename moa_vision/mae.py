"""Masked autoencoder around any timm ViT (arXiv:2111.06377).

Shapes: B images, C channels, p patch size, K = p * p * C values per patch, L patches per image, V visible and
M = L - V masked patches, P prefix tokens (class, registers), encoder width D, decoder width E.

The model computes the same function as facebookresearch/mae with less work:

- Only visible patches are embedded.
- Decoder tokens stay in the order prefix, visible, masked; attention does not depend on the order.
- The first decoder block normalizes and projects the mask token once per position instead of once per image.
- The last decoder block and the head compute masked tokens only.
"""

from __future__ import annotations

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

from moa_ffn import FFN, VARIANTS
from moa_train.errors import ConfigError
from moa_vision import vit
from moa_vision.decoder import DecoderBlock, sincos_positions
from moa_vision.vit import FFN_ARGUMENTS, constant_coefficients, ffn_layer, ffn_settings, flops_per_image

TARGET_EPS = 1e-6
"""Epsilon inside the square root of a patch's standard deviation, as in facebookresearch/mae."""

_SET_BY_MAE = {"img_size", "num_classes", "global_pool", "fc_norm", "mlp_layer", "device", "dtype"}


class MAEOutput(NamedTuple):
    """Result of `MAE.forward`.

    Attributes:
        loss: () float32, mean squared error on the masked patches.
        prediction: (B, M, K) for the masked patches in ascending order; with `norm_pix_loss` in units of the
            normalized patch.
        mask: (B, L) float32, 1 = masked.
    """

    loss: Tensor
    prediction: Tensor
    mask: Tensor


class MAE(nn.Module):
    """Masked autoencoder that wraps a timm encoder, re-initializes it and removes its classifier.

    Initialization, positions, targets and sizes follow facebookresearch/mae: Xavier-uniform linear layers including
    the patch embedding, fixed sin-cos positions, tokens N(0, 0.02), LayerNorm eps 1e-6. FFN layers initialize their
    mixing parameters.

    Args:
        encoder: timm `VisionTransformer` with convolutional patch embedding, absolute positions and a final norm.
        decoder_dim: Decoder width.
        decoder_depth: Number of decoder blocks.
        decoder_heads: Attention heads of the decoder.
        decoder_mlp_ratio: Hidden width of the decoder's FFN relative to `decoder_dim`.
        decoder_ffn: FFN variant of the decoder, by default the encoder's. Its other settings are the encoder's.
        mask_ratio: Fraction of masked patches; V = int(L * (1 - mask_ratio)).
        norm_pix_loss: Predict patches that are normalized to mean 0 and variance 1.

    Attributes:
        image_size: (height, width) in pixels.
        grid_size: (rows, columns) of patches.
        patch_size, num_patches, num_visible, in_chans: p, L, V and C.
        config: Arguments of `create_mae`; None if the model was built directly.

    Raises:
        ConfigError: The encoder is not supported or a size is out of range.
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
        _check_encoder(encoder)
        sizes = min(decoder_dim, decoder_depth, decoder_heads)
        if sizes < 1 or decoder_dim % 4 or decoder_dim % decoder_heads:
            raise ConfigError(
                f"decoder_dim={decoder_dim}, decoder_depth={decoder_depth}, decoder_heads={decoder_heads}: "
                "decoder_dim must be a multiple of 4 and of decoder_heads, all at least 1"
            )
        self.grid_size: tuple[int, int] = encoder.patch_embed.grid_size
        self.patch_size: int = encoder.patch_embed.patch_size[0]
        self.image_size = (self.grid_size[0] * self.patch_size, self.grid_size[1] * self.patch_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.num_visible = int(self.num_patches * (1 - mask_ratio))
        self.in_chans: int = encoder.patch_embed.proj.in_channels
        self.norm_pix_loss = norm_pix_loss
        if not 0 < self.num_visible < self.num_patches:
            raise ConfigError(
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

    def init_weights(self) -> None:
        """Initialize all weights in place, as in facebookresearch/mae, from torch's generator."""
        for module in reversed(list(self.modules())):
            self.init_module(module)

    @torch.no_grad()
    def init_module(self, module: nn.Module) -> None:
        """Initialize one module, after its children."""
        if isinstance(module, nn.LayerNorm):
            module.reset_parameters()
        elif isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d):  # the patch embedding
            module.reset_parameters()
            nn.init.xavier_uniform_(module.weight.flatten(1))
        elif isinstance(module, FFN):  # overrides the rule of the linear layers inside
            module.init_weights(nn.init.xavier_uniform_)
        elif isinstance(module, VisionTransformer):
            self._init_tokens(module)
        elif module is self:
            nn.init.normal_(self.mask_token, std=0.02)

    def _init_tokens(self, encoder: VisionTransformer) -> None:
        for token in (encoder.cls_token, encoder.reg_token):
            if token is not None:
                nn.init.normal_(token, std=0.02)
        assert encoder.pos_embed is not None
        encoder.pos_embed.requires_grad_(False).zero_()  # prefix tokens have position zero
        encoder.pos_embed[0, -self.num_patches :] = sincos_positions(self.grid_size, encoder.embed_dim)

    def forward(self, images: Tensor, noise: Tensor | None = None) -> MAEOutput:
        """Mask images, reconstruct the masked patches and compute the loss.

        Args:
            images: (B, C, H, W) float, normalized with the mean and deviation of the data set.
            noise: (B, L); the V patches with the lowest noise stay visible. None draws it from the device's generator.

        Raises:
            ValueError: A shape does not match the model.
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
        """Return the mask (B, L) float32 that hides all but the V patches with the lowest noise (B, L)."""
        if noise.ndim != 2 or noise.shape[1] != self.num_patches:
            raise ValueError(f"noise has shape {tuple(noise.shape)}, expected (B, {self.num_patches})")
        visible = noise.argsort(dim=1, stable=True)[:, : self.num_visible]
        return torch.ones_like(noise, dtype=torch.float32).scatter(1, visible, 0.0)

    def split(self, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return the indices of the visible (B, V) and masked (B, M) patches of a mask (B, L), both ascending."""
        order = mask.argsort(dim=1, stable=True)
        return order[:, : self.num_visible], order[:, self.num_visible :]

    def encode(self, patches: Tensor, visible: Tensor) -> Tensor:
        """Encode visible patches (B, V, K) with indices `visible` (B, V) to latent tokens (B, P + V, D)."""
        encoder, embed = self.encoder, self.encoder.patch_embed
        weight = embed.proj.weight.permute(0, 2, 3, 1).flatten(1)  # (D, K), values in the order of `patchify`
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
        # Before the first block, mask tokens at one position are equal in all images: L rows stand for all B * M.
        x = torch.cat([seen.flatten(0, 1), self.mask_token[0] + self.decoder_pos])
        seen_rows = torch.arange(seen.shape[0] * seen.shape[1], device=x.device).view(seen.shape[:2])
        rows = torch.cat([seen_rows, seen_rows.numel() + masked], dim=1)
        first, last = self.decoder_blocks[0], self.decoder_blocks[-1]
        for block in self.decoder_blocks:
            x = block(x, rows=rows if block is first else None, outputs=masked.shape[1] if block is last else None)
        return self.decoder_head(self.decoder_norm(x))

    def patchify(self, images: Tensor) -> Tensor:
        """Split images (B, C, H, W) into patches (B, L, K), row by row; a patch's values are in the order (p, p, C)."""
        (rows, columns), p = self.grid_size, self.patch_size
        expected = (self.in_chans, *self.image_size)
        if images.ndim != 4 or images.shape[1:] != expected:
            raise ValueError(f"images have shape {tuple(images.shape)}, expected (B, {str(expected)[1:]}")
        patches = images.unflatten(3, (columns, p)).unflatten(2, (rows, p))  # (B, C, rows, p, columns, p)
        return patches.permute(0, 2, 4, 3, 5, 1).reshape(len(images), self.num_patches, -1)

    def unpatchify(self, patches: Tensor) -> Tensor:
        """Assemble images (B, C, H, W) from patches (B, L, K)."""
        (rows, columns), p = self.grid_size, self.patch_size
        x = patches.unflatten(2, (p, p, self.in_chans)).unflatten(1, (rows, columns))
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)

    def reconstruct(self, images: Tensor, output: MAEOutput) -> Tensor:
        """Return `images` (B, C, H, W) with the masked patches replaced by their prediction, float32."""
        patches = self.patchify(images).float()
        masked = self.split(output.mask)[1]
        prediction = self._to_pixels(output.prediction, _take(patches, masked))
        return self.unpatchify(patches.scatter(1, masked.unsqueeze(-1).expand_as(prediction), prediction))

    def reconstruction_losses(self, images: Tensor, output: MAEOutput) -> dict[str, Tensor]:
        """Return two mean squared errors per image, (B,) float32, for either setting of `norm_pix_loss`.

        `loss_norm` compares normalized patches, `loss_pixel` pixels in the units of `images`.
        """
        target = _take(self.patchify(images), self.split(output.mask)[1]).float()
        error = self._to_pixels(output.prediction, target) - target
        _, std = _patch_statistics(target)
        return {
            "loss_norm": (error / std).square().mean(dim=(1, 2)),
            "loss_pixel": error.square().mean(dim=(1, 2)),
        }

    def _to_pixels(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Convert predictions to pixel units, given the true patches; both (B, M, K)."""
        if not self.norm_pix_loss:
            return prediction.float()
        mean, std = _patch_statistics(target)
        return prediction.float() * std + mean

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters without weight decay: the constant coefficients of LA variants."""
        return constant_coefficients(self)

    def hidden_matrices(self) -> set[str]:
        """Return the names of the weights that Muon steps: the projections of attention and FFNs in all blocks.

        The joint projection to queries, keys and values is one matrix. Everything else, such as patch embedding,
        prediction head and the projections of mixing coefficients, is left to AdamW.
        """
        return {
            name
            for name, parameter in self.named_parameters()
            if "blocks." in name and name.endswith(".weight") and parameter.ndim == 2 and "mix_proj" not in name
        }


def _take(x: Tensor, indices: Tensor) -> Tensor:
    """Gather rows (B, n, K) of x (B, L, K) at indices (B, n)."""
    return x.gather(1, indices.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def _patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation (unbiased, with epsilon) of each patch: (..., K) to twice (..., 1)."""
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return mean, (variance + TARGET_EPS).sqrt()


def _check_encoder(encoder: object) -> None:
    """Raise ConfigError if `encoder` is not a ViT that `MAE.encode` supports."""
    if not isinstance(encoder, VisionTransformer):
        raise ConfigError(f"encoder is a {type(encoder).__name__}, expected a timm VisionTransformer")
    embed = encoder.patch_embed
    if not isinstance(embed, PatchEmbed) or not isinstance(embed.proj, nn.Conv2d) or embed.grid_size is None:
        raise ConfigError("encoder: patch_embed must be timm's PatchEmbed with one convolution and a fixed image size")
    if len(set(embed.patch_size)) != 1 or len(embed.patch_size) != 2:
        raise ConfigError(f"encoder: patch_size={embed.patch_size} must be square")
    if embed.img_size != tuple(length * embed.patch_size[0] for length in embed.grid_size):
        raise ConfigError(f"img_size={embed.img_size} must be a multiple of patch_size={embed.patch_size[0]}")
    if encoder.pos_embed is None or encoder.embed_dim % 4:
        raise ConfigError(
            f"encoder needs an absolute position embedding and embed_dim={encoder.embed_dim} a multiple of 4"
        )
    blocks = list(encoder.blocks)
    if not blocks or not isinstance(getattr(blocks[0], "mlp", None), nn.Module):
        raise ConfigError("encoder needs at least one block, and blocks with one `mlp` each, as timm's Block")
    if encoder.num_prefix_tokens != encoder.has_class_token + encoder.num_reg_tokens:
        raise ConfigError("encoder: only class and register tokens are supported as prefix tokens")
    if not isinstance(encoder.patch_drop, nn.Identity):
        raise ConfigError("encoder: patch_drop_rate must be 0, because masking already drops patches")
    if encoder.attn_pool is not None or isinstance(encoder.norm, nn.Identity):
        raise ConfigError(f"encoder: global_pool={encoder.global_pool!r} must be 'token' or '' to keep the final norm")


def _decoder_ffn(encoder: VisionTransformer, variant: str | None) -> Callable[..., nn.Module]:
    """Return the decoder's `mlp_layer`, with the settings and by default the variant of the encoder's FFN."""
    mlp = encoder.blocks[0].mlp
    if isinstance(mlp, FFN):
        return ffn_layer(variant or mlp.spec.variant, **ffn_settings(mlp))
    if variant is None and type(mlp) is Mlp and type(mlp.act) is nn.GELU:
        variant = "gelu"
    if variant is None:
        raise ConfigError(
            f"decoder_ffn=None, but the encoder's {type(mlp).__name__} has no equivalent among the variants; "
            f"set decoder_ffn to one of {', '.join(VARIANTS)}"
        )
    return ffn_layer(variant)


def create_mae(
    encoder_name: str,
    *,
    img_size: int | Sequence[int],
    encoder_args: Mapping[str, Any] | None = None,
    **mae_args: Any,
) -> MAE:
    """Build a MAE from plain values, which `MAE.config` keeps for the export.

    Args:
        encoder_name: timm name of a VisionTransformer, such as "vit_base_patch16_qdmoa".
        img_size: Image size in pixels, one number or (height, width).
        encoder_args: Arguments of timm's VisionTransformer, and `ffn_*` for the models of `moa_vision.vit`.
        **mae_args: Arguments of `MAE`.

    Raises:
        ConfigError: A name or value is invalid.
    """
    if not timm.is_model(encoder_name):
        close = difflib.get_close_matches(encoder_name, timm.list_models(), 3) or sorted(vit.default_cfgs)
        raise ConfigError(f"encoder {encoder_name!r} is not a timm model; did you mean {', '.join(close)}?")
    args = dict(encoder_args or {})
    allowed = set(inspect.signature(VisionTransformer).parameters) - _SET_BY_MAE
    if encoder_name in vit.default_cfgs:
        allowed |= set(FFN_ARGUMENTS)
    if unknown := set(args) - allowed:
        raise ConfigError(f"encoder_args: unknown {min(unknown)!r} for {encoder_name}; allowed: {sorted(allowed)}")
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    try:
        encoder = timm.create_model(encoder_name, img_size=(height, width), num_classes=0, **args)
    except Exception as error:  # timm does not validate its arguments, so a wrong one can raise anything
        raise ConfigError(
            f"timm cannot build {encoder_name!r} with img_size={(height, width)}, encoder_args={args}: "
            f"{type(error).__name__}: {error}"
        ) from error
    mae = MAE(encoder, **mae_args)  # pyright: ignore[reportArgumentType]  # MAE checks the class
    mae.config = {"encoder_name": encoder_name, "img_size": [height, width], "encoder_args": args, **mae_args}
    return mae


def parameter_counts(mae: MAE) -> dict[str, int]:
    """Count trainable parameters: total = encoder + decoder, and of these the FFNs and their mixing."""

    def count(*modules: nn.Module) -> int:
        return sum(p.numel() for module in modules for p in module.parameters() if p.requires_grad)

    blocks = [*mae.encoder.blocks, *mae.decoder_blocks]
    total, encoder = count(mae), count(mae.encoder)
    return {
        "total": total,
        "encoder": encoder,
        "decoder": total - encoder,
        "ffn": count(*(block.mlp for block in blocks if isinstance(block.mlp, nn.Module))),
        "mixing": sum(module.mixing_parameters() for module in mae.modules() if isinstance(module, FFN)),
    }


def forward_flops(mae: MAE) -> int:
    """Count the FLOPs that one more image adds to a forward pass (`flops_per_image`).

    The work that is done once per batch is not part of it: 6 L E^2 for the mask token in the first decoder block.
    """
    return flops_per_image(mae, (mae.in_chans, *mae.image_size))
