"""Upcycling: the feedforward modules of a trained model, replaced by MoA layers that compute the same function.

Modules are found by their structure, not by their class. Each replacement is compared with the original on random
tokens before the model is changed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moa_ffn.activations import ACTIVATIONS
from moa_ffn.layers import FFN
from moa_ffn.spec import DEFAULT_GATE_ACTIVATIONS, FFNSpec

SPLIT = (("gate_proj", "up_proj", "down_proj"), ("fc1_g", "fc1_x", "fc2"))
"""Gate, up and down projections of gated linear units: transformers' Llama and its relatives, timm's SwiGLU."""

FUSED = (("gate_up_proj", "down_proj"), ("fc1", "fc2"))
"""Gate and up projections in one matrix, and down: transformers' Phi-3, timm's GluMlp and SwiGLUPacked."""

PLAIN = (("fc1", "fc2"), ("c_fc", "c_proj"), ("dense_h_to_4h", "dense_4h_to_h"), ("up_proj", "down_proj"))
"""Both projections of two-matrix MLPs: timm and CLIP, GPT-2, GPT-NeoX, Nemotron."""

ACTIVATION_NAMES = ("act", "act_fn", "activation_fn")
_DROPOUT_NAMES = ("drop1", "drop2", "dropout")

_TOKENS = 16
"""Random tokens on which a replacement is compared with the original."""


class _Pretrained(NamedTuple):
    gate: nn.Module
    up: nn.Module | None
    down: nn.Module
    activation: str
    drop: tuple[float, float]


def upcycle(model: nn.Module, variant: str = "qdmoa", **settings: Any) -> dict[str, FFN]:
    """Replace the feedforward modules of `model`, in place, by layers with `mix_base="anchor"`.

    The model computes the same function as before, its mixing vectors are zero and have gradients. Found are gated
    linear units with `gate_proj`, `up_proj` and `down_proj` (Llama, Mistral, Qwen, OLMo 2, SmolLM3, Gemma) or a fused
    `gate_up_proj` (Phi-3), timm's SwiGLU, SwiGLUPacked and GluMlp, and two-matrix MLPs (timm's Mlp, CLIP, Phi, GPT-2,
    GPT-NeoX). Weights of separate projections are shared with the original; fused and transposed ones are copied.

    Args:
        model: The trained model. A part of it, such as `model.layers[8:]`, works as well.
        variant: A mixed variant: Type-II for gated linear units, Type-I (moa, la) for two-matrix MLPs. Modules of the
            other type stay as they are.
        **settings: Other arguments of `FFN`. The activation of the pretrained FFN is added to the default
            `gate_activations`; given ones must contain it.

    Returns:
        The new layers by module name.

    Raises:
        ValueError: The model has no feedforward module of the variant's type, or one cannot be replaced exactly. The
            message names the module and the reason, and the model is unchanged.
    """
    spec = FFNSpec(variant)
    if spec.form == "fixed":
        raise ValueError(
            f"variant={variant!r} has no mixture; use a variant such as {'qdmoa' if spec.type_two else 'moa'}"
        )
    layers: dict[int, FFN] = {}
    found: dict[str, FFN] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        pretrained = _read(name, module) if name else None
        if pretrained is not None and (pretrained.up is not None) == spec.type_two:
            if id(module) not in layers:
                layers[id(module)] = _replacement(name, module, pretrained, variant, settings)
            found[name] = layers[id(module)]
    if not found:
        kind = "gated linear unit" if spec.type_two else "two-matrix MLP"
        raise ValueError(f"the model has no {kind} that {variant!r} could replace; see moa_ffn.upcycle for known ones")
    for name, layer in found.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
    return found


def _read(name: str, module: nn.Module) -> _Pretrained | None:
    """Return the parts of a feedforward module, or None for other modules."""
    children = dict(module.named_children())
    function = next((getattr(module, key) for key in ACTIVATION_NAMES if hasattr(module, key)), None)
    names = next((names for names in SPLIT + FUSED + PLAIN if _are_linear(children, names)), None)
    if names is None or function is None:
        return None
    _check_children(name, children, names)
    projections: list[Any] = [_linear(children[key]) for key in names]
    if len(names) == 2 and projections[0].out_features == 2 * projections[1].in_features:
        projections[:1] = _halves(projections[0], gate_last=getattr(module, "gate_last", False))
    gate, *up, down = projections
    return _Pretrained(gate, up[0] if up else None, down, _activation(name, function, gate.weight), _drop(module))


def _are_linear(children: dict[str, nn.Module], names: tuple[str, ...]) -> bool:
    return all(isinstance(children.get(name), nn.Linear) or _is_transposed(children.get(name)) for name in names)


def _is_transposed(module: nn.Module | None) -> bool:
    return type(module).__name__ == "Conv1D" and isinstance(getattr(module, "nf", None), int)  # transformers' GPT-2


def _check_children(name: str, children: dict[str, nn.Module], projections: tuple[str, ...]) -> None:
    known = {*projections, *ACTIVATION_NAMES, *_DROPOUT_NAMES}
    for key, child in children.items():
        if key not in known and not isinstance(child, nn.Identity):
            raise ValueError(f"{name} cannot be replaced exactly: it has a {type(child).__name__} ({key})")


def _linear(module: Any) -> Any:
    """Return the module as nn.Linear; transformers' Conv1D stores the transposed weight."""
    return _new_linear(module.weight.t(), module.bias) if _is_transposed(module) else module


def _halves(linear: nn.Linear, gate_last: bool) -> list[nn.Linear]:
    """Return the gate and the up projection of a fused one."""
    biases = (None, None) if linear.bias is None else linear.bias.chunk(2)
    halves = [_new_linear(weight, bias) for weight, bias in zip(linear.weight.chunk(2), biases, strict=True)]
    return halves[::-1] if gate_last else halves


@torch.no_grad()
def _new_linear(weight: Any, bias: Any) -> nn.Linear:
    """Return a linear map with copies of weight (out, in) and bias."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    for key, value in (("weight", weight), ("bias", bias)):
        if value is not None:
            copy = value.detach().clone(memory_format=torch.contiguous_format)
            setattr(linear, key, nn.Parameter(copy, value.requires_grad))
    return linear


def _activation(name: str, function: Callable[[Tensor], Tensor], weight: Tensor) -> str:
    """Return the name of the activation that has the values of `function`."""
    x = torch.linspace(-8, 8, 1001, device="cpu" if weight.is_meta else weight.device)
    with torch.no_grad():
        values = function(x)
        for known in ACTIVATIONS.values():
            if not known.parameters and torch.allclose(known.function(x), values, rtol=1e-5, atol=1e-6):
                return known.name
    label = getattr(function, "__name__", type(function).__name__)
    raise ValueError(f"{name} cannot be replaced exactly: its activation {label} is not in the table; register it")


def _drop(module: nn.Module) -> tuple[float, float]:
    """Return the dropout probabilities after the activation and after the last projection."""
    first, *last = (getattr(getattr(module, key, None), "p", 0.0) for key in _DROPOUT_NAMES)
    return first, max(*last, getattr(module, "residual_dropout", 0.0))


def _replacement(name: str, module: nn.Module, pretrained: _Pretrained, variant: str, settings: dict[str, Any]) -> FFN:
    gate, up, down, activation, drop = pretrained
    weight: Any = gate.weight
    defaults = {"gate_activations": tuple(dict.fromkeys((*DEFAULT_GATE_ACTIVATIONS, activation))), "drop": drop}
    layer = FFN(
        weight.shape[1],
        weight.shape[0],
        variant,
        **{**defaults, **settings, "mix_base": "anchor", "anchor": activation, "device": "meta", "dtype": weight.dtype},
    )
    layer.to_empty(device=weight.device)
    layer.gate_proj, layer.up_proj, layer.down_proj = gate, up, down  # pyright: ignore[reportAttributeAccessIssue]
    layer.init_mixing()
    layer.train(module.training)
    if not weight.is_meta:
        _check_equal(name, module, layer, weight)
    return layer


@torch.no_grad()
def _check_equal(name: str, module: nn.Module, layer: FFN, like: Tensor) -> None:
    """Compare both modules without dropout, relative to the largest output."""
    x = torch.randn(_TOKENS, like.shape[1], generator=torch.Generator().manual_seed(0)).to(like)
    training = module.training
    expected, actual = module.eval()(x), layer.eval()(x)
    module.train(training)
    layer.train(training)
    error = (actual - expected).abs().max() / expected.abs().max().clamp_min(torch.finfo(x.dtype).tiny)
    if not error <= torch.finfo(x.dtype).eps ** 0.75:
        raise ValueError(f"{name} cannot be replaced exactly: outputs differ by {error:.1e} of the largest")
