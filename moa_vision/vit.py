"""ViTs with any FFN of the family, registered with timm as `vit_{size}_patch16_{variant}`, 224 pixels.

Each model is timm's own `VisionTransformer` with `moa_ffn.FFN` as its `mlp_layer`, or timm's `NaFlexVit` with
`use_naflex=True` or TIMM_USE_NAFLEXVIT=true. In addition to timm's arguments, `ffn_*` keyword arguments set the FFN
(`FFN_ARGUMENTS`): `timm.create_model("vit_base_patch16_qdmoa", ffn_mixing_gate="tanh", ffn_gate_activations="g,s")`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.naflexvit import NaFlexVit, _create_naflexvit_from_classic  # private; present in timm 1.0.31
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from moa_ffn import FFN, VARIANTS, FFNSpec

__all__ = ["FFN_ARGUMENTS", "SIZES", "VARIANTS", "TimmFFN", "ffn_layer", "ffn_settings", "model_name"]

SIZES: dict[str, dict[str, int]] = {
    "tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
}
"""Widths and depths of timm's vit_*_patch16_224."""

_SETTINGS = (
    "mixing_gate",
    "gate_activations",
    "up_activations",
    "mixed_branch",
    "mix_bias",
    "mix_base",
    "anchor",
    "mix_pool",
    "mix_init_std",
    "coef_init",
    "backend",
)
FFN_ARGUMENTS: tuple[str, ...] = tuple(f"ffn_{name}" for name in _SETTINGS)
"""Keyword arguments of every model here: the arguments of `moa_ffn.FFN` with the prefix `ffn_`."""


class TimmFFN(FFN):
    """`FFN` with the constructor and hooks that timm expects of an `mlp_layer`.

    Args:
        in_features: Token width.
        hidden_features: Hidden width of the two-matrix MLP. A Type-II FFN uses 2/3 of it, rounded to a multiple of 8,
            so that parameter counts agree (Shazeer, arXiv:2002.05202).
        act_layer: Ignored; the variant sets the activations.
        norm_layer: Must be None.
        bias, drop, device, dtype, variant, **settings: As in `FFN`.

    Raises:
        ValueError: `norm_layer` is given (timm's `scale_mlp_norm`), or a setting is invalid.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        act_layer: object = None,
        norm_layer: object = None,
        bias: bool = True,
        drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        variant: str,
        **settings: Any,
    ) -> None:
        if norm_layer is not None:
            raise ValueError("scale_mlp_norm=True is not supported with these FFNs")
        if FFNSpec(variant).type_two:
            hidden_features = max(8, 8 * round(hidden_features / 12))
        super().__init__(
            in_features, hidden_features, variant, bias=bias, drop=drop, device=device, dtype=dtype, **settings
        )

    def reset_parameters(self) -> None:
        """Initialize all parameters; timm's `init_weights("reset")` calls this after resetting the projections."""
        self.init_weights()

    @property
    def fc2(self) -> nn.Linear:
        """Output projection, under the name that timm's `fix_init` scales."""
        return self.down_proj


def ffn_layer(variant: str, **settings: Any) -> Callable[..., TimmFFN]:
    """Return a timm `mlp_layer` that builds `variant` with `settings` (keyword arguments of `FFN`)."""
    return partial(TimmFFN, variant=variant, **settings)


def ffn_settings(ffn: FFN) -> dict[str, Any]:
    """Return the keyword arguments that `ffn` was built with, except variant and sizes."""
    return {name: getattr(ffn.spec if hasattr(ffn.spec, name) else ffn, name) for name in _SETTINGS}


def constant_coefficients(model: nn.Module) -> set[str]:
    """Return the names of LA coefficients and of parameters of activations, which get no weight decay."""
    return {name for name, _ in model.named_parameters() if name.endswith(("mix_coef", "act_param"))}


def model_name(size: str, variant: str) -> str:
    """Return the timm name of a size and variant.

    Raises:
        ValueError: `size` or `variant` is unknown.
    """
    for field, value, allowed in (("size", size, tuple(SIZES)), ("variant", variant, VARIANTS)):
        if value not in allowed:
            raise ValueError(f"{field}={value!r} is not one of {', '.join(allowed)}")
    return f"vit_{size}_patch16_{variant}"


def _load_filter(state_dict: dict[str, Tensor], model: VisionTransformer) -> dict[str, Tensor]:
    """Apply timm's conversion of positions and patch size, and rename the final norm to the model's name for it.

    With `global_pool="avg"` timm moves the norm after the pooling and calls it `fc_norm`.
    """
    state_dict = checkpoint_filter_fn(state_dict, model)
    ours, theirs = ("norm.", "fc_norm.") if isinstance(model.fc_norm, nn.Identity) else ("fc_norm.", "norm.")
    return {ours + k.removeprefix(theirs) if k.startswith(theirs) else k: v for k, v in state_dict.items()}


def flops_per_image(model: nn.Module, image_shape: Sequence[int]) -> int:
    """Count the FLOPs that one more image (C, H, W) adds to a forward pass: matrix products, a multiply-add is two.

    Nothing is computed and no weight is copied.
    """
    weights = {name: tensor.to("meta") for name, tensor in (*model.named_parameters(), *model.named_buffers())}

    def flops(images: int) -> int:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            torch.func.functional_call(model, weights, (torch.empty(images, *image_shape, device="meta"),))
        return counter.get_total_flops()

    return flops(2) - flops(1)


def _create(
    name: str, size: str, variant: str, pretrained: bool, use_naflex: bool | None, kwargs: dict[str, Any]
) -> VisionTransformer | NaFlexVit:
    given = {key for key in kwargs if key.startswith("ffn_")}
    if unknown := given - set(FFN_ARGUMENTS):
        raise ValueError(f"{name}: unknown argument {min(unknown)!r}; allowed: {', '.join(FFN_ARGUMENTS)}")
    for key in ("act_layer", "mlp_layer"):
        if kwargs.get(key) is not None:
            raise ValueError(f"{name}: {key} is not allowed, because the model name sets the FFN")
    settings = {key.removeprefix("ffn_"): kwargs.pop(key) for key in given}
    arguments = {"patch_size": 16, **SIZES[size], **kwargs, "mlp_layer": ffn_layer(variant, **settings)}
    if use_naflex is None:
        use_naflex = os.environ.get("TIMM_USE_NAFLEXVIT", "false").lower() == "true"
    if use_naflex:
        model = _create_naflexvit_from_classic(name, pretrained, **arguments)
    else:
        model = build_model_with_cfg(
            VisionTransformer,
            name,
            pretrained,
            pretrained_filter_fn=_load_filter,
            feature_cfg={"out_indices": arguments.pop("out_indices", 3), "feature_cls": "getter"},
            **arguments,
        )
    if sum(isinstance(module, TimmFFN) for module in model.modules()) < arguments["depth"]:
        raise ValueError(
            f"{name}: block_fn={kwargs.get('block_fn')!r} builds blocks without the {variant} FFN; "
            "use a block that calls its mlp_layer, such as timm's Block, ResPostBlock or ParallelThingsBlock"
        )
    return model


def _entrypoint(size: str, variant: str) -> Callable[..., VisionTransformer | NaFlexVit]:
    name = model_name(size, variant)

    def create(
        pretrained: bool = False, use_naflex: bool | None = None, **kwargs: Any
    ) -> VisionTransformer | NaFlexVit:
        return _create(name, size, variant, pretrained, use_naflex, kwargs)

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"ViT-{size.capitalize()}/16 at 224 pixels with the `{variant}` FFN."
    return create


default_cfgs = generate_default_cfgs(
    {
        model_name(size, variant): {
            "input_size": (3, 224, 224),
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "mean": IMAGENET_DEFAULT_MEAN,
            "std": IMAGENET_DEFAULT_STD,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        }
        for size in SIZES
        for variant in VARIANTS
    }
)

for _size in SIZES:
    for _variant in VARIANTS:
        globals()[model_name(_size, _variant)] = register_model(_entrypoint(_size, _variant))
