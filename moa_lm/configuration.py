"""MoALlamaConfig: Llama's configuration plus the fields of the FFN and, for LlamaMoE, of the experts."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig

from moa_ffn import BACKENDS, FFNSpec
from moa_ffn.spec import DEFAULT_GATE_ACTIVATIONS, DEFAULT_UP_ACTIVATIONS
from moa_lm.dispatch import METHODS
from moa_train.errors import ConfigError, require

EXPERT_MIXINGS = ("layer", "expert")

SILU = ("silu", "swish")
"""transformers' names of Llama's activation."""

_SPEC_FIELDS = ("mixing_gate", "gate_activations", "up_activations", "mixed_branch", "mix_bias")
_LAYER_FIELDS = ("mix_init_std", "coef_init", "backend")
FFN_FIELDS: tuple[str, ...] = tuple(f"ffn_{name}" for name in ("variant", *_SPEC_FIELDS, *_LAYER_FIELDS))
"""Fields of the FFN; each is the argument of `moa_ffn.FFN` without the prefix `ffn_`."""


@strict
class MoALlamaConfig(LlamaConfig):
    """Configuration of a Llama whose feedforward layers are any member of the MoA family (arXiv:2605.26647).

    Fields of `transformers.LlamaConfig` keep their meaning, with two remarks: `hidden_act` stays "silu", because
    `ffn_variant` decides the activations; `mlp_bias` gives gate_proj, up_proj and down_proj a bias. The `ffn_*` fields
    are the arguments of `moa_ffn.FFN`, with the layer's defaults.

    Args:
        ffn_variant: One of `moa_ffn.VARIANTS`; "swiglu" is the Llama baseline. Default "qdmoa".
        ffn_mixing_gate, ffn_mixed_branch, ffn_mix_bias: See `moa_ffn.FFNSpec`.
        ffn_gate_activations, ffn_up_activations: Dictionaries, as a sequence of names or as text such as "g,s,r2".
            None takes the default. Stored as a list of full names, so that config.json records what was computed.
        ffn_mix_init_std, ffn_coef_init, ffn_backend: See `moa_ffn.FFN`.
        num_experts: Routed experts per layer; 0 is the dense model. Default 0.
        num_experts_per_tok: Experts per token. Default 4, as in the paper's LlamaMoE.
        num_shared_experts: Experts that process every token. Default 1, as in the paper.
        moe_intermediate_size: Hidden width of one expert; required with experts, where it replaces
            `intermediate_size`.
        expert_mixing: "layer" computes the mixing coefficients of a token once for all experts of a layer, "expert" in
            each expert from its own vectors. Default "layer": it adds no parameters per expert and O(d) per layer, as
            in the paper, and computes coefficients once per token rather than k times.
        expert_dispatch: Method of the experts' products, one of `moa_lm.dispatch.METHODS`. Default "auto".
        norm_topk_prob: Normalize the weights of the chosen experts to a sum of 1. Default True.
        router_aux_loss_coef: Weight of the load-balancing loss (not given in the paper). Default 0.01, as in Switch
            Transformer (arXiv:2101.03961).
        router_z_loss_coef: Weight of the router z-loss (not given in the paper). Default 0.001, as in ST-MoE
            (arXiv:2202.08906).
        output_router_logits: Return the router logits with every output. Default False.

    Raises:
        ConfigError: A field has an invalid value, or there is an unknown `ffn_*` field.
        StrictDataclassError: transformers refuses the value of one of Llama's fields.
    """

    model_type = "moa_llama"
    # Outputs that transformers' Trainer leaves out of predictions; the logits remain.
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        *("cache", "past_key_values", "router_logits", "lm_loss", "aux_loss", "z_loss", "sequence_losses"),
    ]

    ffn_variant: str = "qdmoa"
    ffn_mixing_gate: str = "sigmoid"
    ffn_gate_activations: list[str] | tuple[str, ...] | str | None = None
    ffn_up_activations: list[str] | tuple[str, ...] | str | None = None
    ffn_mixed_branch: str = "gate"
    ffn_mix_bias: bool = False
    ffn_mix_init_std: float = 0.02
    ffn_coef_init: float = 0.5
    ffn_backend: str = "auto"
    num_experts: int = 0
    num_experts_per_tok: int = 4
    num_shared_experts: int = 1
    moe_intermediate_size: int | None = None
    expert_mixing: str = "layer"
    expert_dispatch: str = "auto"
    norm_topk_prob: bool = True
    router_aux_loss_coef: float = 0.01
    router_z_loss_coef: float = 0.001
    output_router_logits: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        for name in kwargs:
            require(name, kwargs[name], not name.startswith("ffn_"), f"a field of {', '.join(FFN_FIELDS)}")
        self.check()
        super().__post_init__(**kwargs)

    def check(self) -> None:
        """Check the fields and replace the dictionaries by their full names.

        Called at construction, and again by models, because `from_pretrained(path, field=value)` sets fields later.

        Raises:
            ConfigError: A field has an invalid value; the message names it.
        """
        for field in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            require(field, getattr(self, field), getattr(self, field) >= 1, "1 or above")
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        divides = kv_heads is None or (kv_heads >= 1 and heads % kv_heads == 0)
        require("num_key_value_heads", kv_heads, divides, f"a divisor of num_attention_heads {heads}")
        require("hidden_act", self.hidden_act, self.hidden_act in SILU, "silu; ffn_variant decides the activations")
        self._check_ffn()
        self._check_experts()

    def _check_ffn(self) -> None:
        self.ffn_gate_activations = self.ffn_gate_activations or list(DEFAULT_GATE_ACTIVATIONS)
        self.ffn_up_activations = self.ffn_up_activations or list(DEFAULT_UP_ACTIVATIONS)
        try:
            spec = self.ffn_spec()
        except ValueError as error:
            raise ConfigError(f"ffn_{error}") from error  # the message begins with FFNSpec's name of the field
        self.ffn_gate_activations = list(spec.gate_activations)
        self.ffn_up_activations = list(spec.up_activations)
        _require_bool("ffn_mix_bias", self.ffn_mix_bias)
        _require_number("ffn_mix_init_std", self.ffn_mix_init_std, minimum=0)
        _require_number("ffn_coef_init", self.ffn_coef_init)
        _require_choice("ffn_backend", self.ffn_backend, BACKENDS)

    def _check_experts(self) -> None:
        _require_count("num_experts", self.num_experts, minimum=0)
        _require_count("num_shared_experts", self.num_shared_experts, minimum=0)
        _require_choice("expert_mixing", self.expert_mixing, EXPERT_MIXINGS)
        _require_choice("expert_dispatch", self.expert_dispatch, METHODS)
        _require_number("router_aux_loss_coef", self.router_aux_loss_coef, minimum=0)
        _require_number("router_z_loss_coef", self.router_z_loss_coef, minimum=0)
        _require_bool("norm_topk_prob", self.norm_topk_prob)
        _require_bool("output_router_logits", self.output_router_logits)
        if self.num_experts:
            k = self.num_experts_per_tok
            _require_count("num_experts_per_tok", k)
            require("num_experts_per_tok", k, k <= self.num_experts, f"at most num_experts {self.num_experts}")
            _require_count("moe_intermediate_size", self.moe_intermediate_size)

    @property
    def base_model_tp_plan(self) -> dict[str, Any]:  # type: ignore[override]
        """Llama's tensor-parallel plan, without the FFN where it would be wrong.

        A mixture that is sharded over the hidden width has partial sums as the gradients of its coefficients on each
        rank, which the plan cannot express; fixed FFNs have no coefficients. Experts are not in Llama's plan.
        """
        splits = self.num_experts == 0 and self.ffn_spec().form == "fixed"
        plan = vars(self).get("base_model_tp_plan") or LlamaConfig.base_model_tp_plan or {}
        return {name: style for name, style in plan.items() if splits or ".mlp." not in name}

    @base_model_tp_plan.setter
    def base_model_tp_plan(self, plan: dict[str, Any]) -> None:
        # transformers 5.17 adds the rule of tied embeddings to the configuration's own plan.
        vars(self)["base_model_tp_plan"] = plan

    def ffn_spec(self) -> FFNSpec:
        """Return the mixture that every FFN of the model computes."""
        return FFNSpec(self.ffn_variant, **{name: getattr(self, f"ffn_{name}") for name in _SPEC_FIELDS})

    def ffn_arguments(self) -> dict[str, Any]:
        """Return keyword arguments of `moa_ffn.FFN(dim, hidden_dim, **arguments)`: all `ffn_*` fields and the bias."""
        return {field.removeprefix("ffn_"): getattr(self, field) for field in FFN_FIELDS} | {"bias": self.mlp_bias}


def build_config(**fields: Any) -> MoALlamaConfig:
    """Return a configuration, with transformers' errors for Llama's fields as ConfigError."""
    try:
        return MoALlamaConfig(**fields)
    except ConfigError:
        raise
    except Exception as error:  # transformers raises many types for bad values
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(reason) from error


def _require_count(field: str, value: Any, minimum: int = 1) -> None:
    require(field, value, type(value) is int and value >= minimum, f"an integer, {minimum} or above")


def _require_number(field: str, value: Any, minimum: float = -math.inf) -> None:
    number = type(value) in (int, float) and abs(value) < math.inf and value >= minimum
    require(field, value, number, "a finite number" + (f", {minimum} or above" if minimum > -math.inf else ""))


def _require_bool(field: str, value: Any) -> None:
    require(field, value, type(value) is bool, "true or false")


def _require_choice(field: str, value: Any, choices: tuple[str, ...]) -> None:
    require(field, value, value in choices, f"one of {', '.join(choices)}")
