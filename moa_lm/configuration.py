"""MoALlamaConfig: Llama's configuration plus the FFN's settings and, for LlamaMoE, the experts'."""

from __future__ import annotations  # keeps huggingface_hub's strict dataclasses from type-checking our fields first

import sys
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig

from moa_ffn import BACKENDS, FFNSpec
from moa_ffn.spec import DEFAULT_GATE_ACTIVATIONS, DEFAULT_UP_ACTIVATIONS
from moa_lm.dispatch import METHODS

EXPERT_MIXINGS = ("layer", "expert")
SILU = ("silu", "swish")
"""Names that transformers has for Llama's activation."""
LARGEST, MOST_LAYERS = 2**20, 2**12
"""Upper limits of sizes and of layers, far beyond any model. A damaged config.json may ask for more: for tensors
whose bytes torch cannot count, for a billion layers, which take memory and hours even without their weights."""

_SPEC_FIELDS = ("mixing_gate", "gate_activations", "up_activations", "mixed_branch", "mix_bias")
_LAYER_FIELDS = ("mix_init_std", "coef_init", "backend")
FFN_FIELDS: tuple[str, ...] = tuple(f"ffn_{name}" for name in ("variant", *_SPEC_FIELDS, *_LAYER_FIELDS))
"""Fields that set the layer; each is `moa_ffn.FFN`'s argument of the same name without `ffn_`."""


_EVEN = f"1 or even, to {LARGEST}: rotary positions turn pairs; left out, it is hidden_size / num_attention_heads"


def _require(fine: bool, field: str, value: object, allowed: str) -> None:
    if not fine:
        raise ValueError(f"{field}={value!r}: must be {allowed}")


def _is_count(value: object, least: int, most: int = LARGEST) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _is_finite(value: object, least: float = -sys.float_info.max) -> bool:
    """Whether it is a number that a float can hold; JSON's integers have no limit."""
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= sys.float_info.max


@strict
class MoALlamaConfig(LlamaConfig):
    """Configuration of a Llama whose feedforward layers are any member of the MoA family (arXiv:2605.26647).

    Every field of `transformers.LlamaConfig` keeps its meaning, with two remarks: `hidden_act` stays "silu", because
    `ffn_variant` decides the activations; `mlp_bias` gives gate_proj, up_proj and down_proj a bias. The `ffn_*`
    fields are `moa_ffn.FFN`'s arguments; what the paper leaves open has the layer's default.

    Args:
        ffn_variant: one of `moa_ffn.VARIANTS`; "swiglu" is the Llama baseline. Default "qdmoa".
        ffn_mixing_gate, ffn_mixed_branch, ffn_mix_bias: see `moa_ffn.FFNSpec`.
        ffn_gate_activations, ffn_up_activations: dictionaries, a sequence of names or text such as "g,s,r2". None
            takes the default one. Stored as a list of full names, so that config.json says what was computed.
        ffn_mix_init_std, ffn_coef_init, ffn_backend: see `moa_ffn.FFN`.
        num_experts: routed experts of each layer; 0 is the dense model. Default 0.
        num_experts_per_tok: experts that a token is sent to. Default 4, as in the paper's LlamaMoE.
        num_shared_experts: experts that every token passes; 0 for none. Default 1, as in the paper.
        moe_intermediate_size: hidden width of one expert; required with experts, where it replaces
            `intermediate_size`.
        expert_mixing: "layer" computes a token's mixing coefficients once for all experts of a layer, "expert" in
            each expert from vectors of its own. Default "layer": the mixture then has no parameters per expert and
            adds O(d) a layer, as the paper has it, and a token's coefficients are computed once, not k times.
        expert_dispatch: how the experts' products are computed, one of `moa_lm.dispatch.METHODS`. Default "auto".
        norm_topk_prob: scale the weights of the chosen experts to sum to one. Default True.
        router_aux_loss_coef: weight of the load-balancing loss in the training loss (open in the paper). Default
            0.01, as in Switch Transformer (arXiv:2101.03961).
        router_z_loss_coef: weight of the router z-loss (open). Default 0.001, as in ST-MoE (arXiv:2202.08906).
        output_router_logits: return the routers' logits with every output. Default False.

    Raises:
        ValueError: a field has a value that is not allowed, or an unknown `ffn_*` field is given; the message names
            the field, the value and what is allowed.
    """

    model_type = "moa_llama"
    # What transformers' Trainer leaves out of the predictions that it collects; logits alone remain.
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
        unknown = sorted(name for name in kwargs if name.startswith("ffn_"))
        if unknown:
            raise ValueError(f"unknown field {unknown[0]!r}; allowed: {', '.join(FFN_FIELDS)}")
        self.check()
        super().__post_init__(**kwargs)

    def check(self) -> None:
        """Check every field that is ours and give the dictionaries their full names.

        Construction calls it; models call it again, because `from_pretrained(path, field=value)` sets fields later.

        Raises:
            ValueError: a field has a value that is not allowed.
        """
        self._check_llama()
        self._check_rope()
        self._check_ffn()
        self._check_experts()

    def _check_llama(self) -> None:
        for field in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            value, most = getattr(self, field), MOST_LAYERS if field == "num_hidden_layers" else LARGEST
            _require(_is_count(value, 1, most), field, value, f"an integer from 1 to {most}")
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        divides = kv_heads is None or (_is_count(kv_heads, 1) and heads % kv_heads == 0)
        _require(divides, "num_key_value_heads", kv_heads, f"a divisor of num_attention_heads={heads}")
        width = self.hidden_size
        _require(width % heads == 0, "hidden_size", width, f"a multiple of num_attention_heads={heads}")
        head_dim = width // heads if self.head_dim is None else self.head_dim
        pairs = _is_count(head_dim, 1) and (head_dim == 1 or head_dim % 2 == 0)
        _require(pairs, "head_dim", head_dim, _EVEN)
        drop, eps = self.attention_dropout, self.rms_norm_eps
        _require(drop is None or (_is_finite(drop, 0) and drop <= 1), "attention_dropout", drop, "from 0 to 1")
        _require(_is_finite(eps, 0), "rms_norm_eps", eps, "a finite number, 0 or more")
        pad = self.pad_token_id
        within = pad is None or (_is_count(pad, -self.vocab_size) and pad < self.vocab_size)
        _require(within, "pad_token_id", pad, f"null or below vocab_size={self.vocab_size}")
        silu = self.hidden_act in SILU
        _require(silu, "hidden_act", self.hidden_act, '"silu" or left out: ffn_variant decides the activations')

    def _check_rope(self) -> None:
        rope = self.rope_parameters
        if not isinstance(rope, dict):
            return  # transformers says what else it is
        theta, kind = rope.get("rope_theta", 1.0), rope.get("rope_type", "")
        fine = _is_finite(theta, sys.float_info.min) and isinstance(kind, str)
        _require(fine, "rope_parameters", rope, "null or with rope_theta, a number above 0, and rope_type, a name")

    def _check_ffn(self) -> None:
        for field in ("ffn_gate_activations", "ffn_up_activations"):
            if not getattr(self, field):
                default = DEFAULT_GATE_ACTIVATIONS if field == "ffn_gate_activations" else DEFAULT_UP_ACTIVATIONS
                setattr(self, field, list(default))
        try:
            spec = self.ffn_spec()
        except ValueError as error:
            raise ValueError(f"ffn_{error}") from None  # FFNSpec's message begins with its own field's name
        self.ffn_gate_activations = list(spec.gate_activations)
        self.ffn_up_activations = list(spec.up_activations)
        _require(isinstance(self.ffn_mix_bias, bool), "ffn_mix_bias", self.ffn_mix_bias, "true or false")
        _require(_is_finite(self.ffn_mix_init_std, 0), "ffn_mix_init_std", self.ffn_mix_init_std, "0 or more")
        _require(_is_finite(self.ffn_coef_init), "ffn_coef_init", self.ffn_coef_init, "a finite number")
        _require(self.ffn_backend in BACKENDS, "ffn_backend", self.ffn_backend, f"one of {', '.join(BACKENDS)}")

    def _check_experts(self) -> None:
        for field in ("num_experts", "num_shared_experts"):
            _require(_is_count(getattr(self, field), 0), field, getattr(self, field), f"an integer from 0 to {LARGEST}")
        for field, allowed in (("expert_mixing", EXPERT_MIXINGS), ("expert_dispatch", METHODS)):
            _require(getattr(self, field) in allowed, field, getattr(self, field), f"one of {', '.join(allowed)}")
        for field in ("router_aux_loss_coef", "router_z_loss_coef"):
            _require(_is_finite(getattr(self, field), 0), field, getattr(self, field), "a finite number, 0 or more")
        for field in ("norm_topk_prob", "output_router_logits"):
            _require(isinstance(getattr(self, field), bool), field, getattr(self, field), "true or false")
        if self.num_experts == 0:
            return
        k, width = self.num_experts_per_tok, self.moe_intermediate_size
        fits = _is_count(k, 1) and k <= self.num_experts
        _require(fits, "num_experts_per_tok", k, f"between 1 and num_experts={self.num_experts}")
        _require(_is_count(width, 1), "moe_intermediate_size", width, "a width of at least 1 when num_experts > 0")

    @property
    def base_model_tp_plan(self) -> dict[str, Any]:  # type: ignore[override]
        """Llama's tensor-parallel plan, where it is right for the FFN; elsewhere the FFN is replicated.

        Sharded over the hidden width, a mixture's coefficients get a gradient that is a partial sum on each rank,
        which the plan cannot express; fixed FFNs have none. Experts are not in Llama's plan.
        """
        splits = self.num_experts == 0 and self.ffn_spec().form == "fixed"
        plan = vars(self).get("base_model_tp_plan") or LlamaConfig.base_model_tp_plan or {}
        return {name: style for name, style in plan.items() if splits or ".mlp." not in name}

    @base_model_tp_plan.setter
    def base_model_tp_plan(self, plan: dict[str, Any]) -> None:
        # transformers 5.17 adds the rule of tied embeddings to the configuration's own plan
        vars(self)["base_model_tp_plan"] = plan

    def ffn_spec(self) -> FFNSpec:
        """The mixture that every FFN of the model computes."""
        return FFNSpec(self.ffn_variant, **{name: getattr(self, f"ffn_{name}") for name in _SPEC_FIELDS})

    def ffn_arguments(self) -> dict[str, Any]:
        """Keyword arguments for `moa_ffn.FFN(dim, hidden_dim, **arguments)`: all `ffn_*` fields, and the bias."""
        return {field.removeprefix("ffn_"): getattr(self, field) for field in FFN_FIELDS} | {"bias": self.mlp_bias}
