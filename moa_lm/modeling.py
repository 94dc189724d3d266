"""Llama and LlamaMoE with any FFN of the family, as transformers models.

Attention, norms, rotary positions, cache, generation, checkpointing, loading and saving are transformers'. This
module replaces the `mlp` of a decoder layer, the `forward` of the decoder, which builds a mask only for given
positions, and the training loss. Projections keep Llama's names: a `swiglu` model and a Llama share a state dict.
"""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, LlamaModel, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)

from moa_ffn import FFN
from moa_ffn.backends import is_plain
from moa_lm.configuration import MoALlamaConfig
from moa_lm.convert import from_llama
from moa_lm.loss import IGNORED_LABEL, linear_cross_entropy, module_cross_entropy
from moa_lm.moe import Experts, MoE
from moa_lm.router import TopKRouter, load_balancing_loss, router_z_loss
from moa_lm.transformers_internals import (
    CACHE,
    OutputRecorder,
    ParentsInitializeChildren,
    can_return_tuple,
    capture_outputs,
    merge_with_config_defaults,
    takes_cache,
)


@dataclass
class MoAModelOutput(BaseModelOutputWithPast):
    """Output of the decoder.

    Attributes:
        router_logits: One (B * T, num_experts) float32 tensor per layer; with `output_router_logits` and experts.
    """

    router_logits: tuple[Tensor, ...] | None = None


@dataclass
class MoACausalLMOutput(CausalLMOutputWithPast):
    """Output of the causal language model.

    Attributes:
        loss: Scalar training loss: lm_loss, with experts plus router_aux_loss_coef * aux_loss + router_z_loss_coef *
            z_loss, in evaluation mode too. Compare models by lm_loss.
        router_logits: As in `MoAModelOutput`.
        lm_loss: Scalar, mean cross-entropy of the next token in nats; with `labels`.
        aux_loss: Scalar, load-balancing loss, mean over layers; with experts and `labels` or `output_router_logits`.
        z_loss: Scalar, router z-loss, mean over layers; as aux_loss.
        sequence_losses: (B,) mean cross-entropy of each sequence without gradient, 0 for a sequence without labels;
            with `skip_logits`.
    """

    router_logits: tuple[Tensor, ...] | None = None
    lm_loss: Tensor | None = None
    aux_loss: Tensor | None = None
    z_loss: Tensor | None = None
    sequence_losses: Tensor | None = None


class MoALlamaDecoderLayer(LlamaDecoderLayer):
    """Llama's decoder layer with an `FFN` as `mlp`, or an `MoE` if the configuration has experts."""

    def __init__(self, config: MoALlamaConfig, layer_idx: int) -> None:
        super(LlamaDecoderLayer, self).__init__()  # LlamaDecoderLayer.__init__ would allocate a LlamaMLP
        self.hidden_size = config.hidden_size
        self.self_attn = LlamaAttention(config=config, layer_idx=layer_idx)
        self.mlp = _feedforward(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)


def _feedforward(config: MoALlamaConfig) -> nn.Module:
    if config.num_experts > 0:
        return MoE(config)
    return FFN(config.hidden_size, config.intermediate_size, **config.ffn_arguments())


class MoALlamaPreTrainedModel(ParentsInitializeChildren, LlamaPreTrainedModel):
    """Initialization, loading and recording of intermediate outputs, for all models of this module."""

    if TYPE_CHECKING:
        config: MoALlamaConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    config_class = MoALlamaConfig
    _no_split_modules = ["MoALlamaDecoderLayer"]  # noqa: RUF012
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": MoALlamaDecoderLayer,
        "attentions": LlamaAttention,
        "router_logits": OutputRecorder(TopKRouter, index=0),
    }
    model_tags = ["moa", "mixture-of-activations"]  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialize a module after its children: normal(initializer_range), mixing by the layer's own rule."""
        super()._init_weights(module)
        if isinstance(module, FFN):
            module.init_weights(lambda weight: weight)  # its projections are initialized as linear layers
        elif isinstance(module, Experts | TopKRouter):
            module.init_weights()


class MoALlamaModel(MoALlamaPreTrainedModel, LlamaModel):  # pyright: ignore[reportIncompatibleVariableOverride]
    """Decoder without a head: tokens -> hidden states (B, T, hidden_size), as `transformers.LlamaModel`."""

    def __init__(self, config: MoALlamaConfig) -> None:
        config.check()
        LlamaPreTrainedModel.__init__(self, config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(MoALlamaDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    @takes_cache
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> MoAModelOutput:
        """Return hidden states of input_ids (B, T) or inputs_embeds (B, T, hidden_size); arguments as in Llama.

        Llama's forward, except that the mask considers positions only if the caller gives them. Llama passes the
        default positions too; torch.compile cannot see that they pack no documents, and every batch would get a mask
        (T, T) instead of the fast kernels of causal attention.

        Raises:
            ValueError: Both or neither of input_ids and inputs_embeds are given.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass either input_ids or inputs_embeds")
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        named_cache: dict[str, Any] = {CACHE: cache}
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=hidden,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **named_cache,
        )
        positions = position_ids
        if positions is None:
            past = 0 if cache is None else cache.get_seq_length()
            positions = torch.arange(hidden.shape[1], device=hidden.device).unsqueeze(0) + past
        rotations = self.rotary_emb(hidden, position_ids=positions)
        for layer in self.layers[: self.config.num_hidden_layers]:
            hidden = layer(
                hidden,
                attention_mask=mask,
                position_embeddings=rotations,
                position_ids=positions,
                use_cache=use_cache,
                **named_cache,
                **kwargs,
            )
        return MoAModelOutput(last_hidden_state=self.norm(hidden), **named_cache)


class MoALlamaForCausalLM(MoALlamaPreTrainedModel, LlamaForCausalLM):  # pyright: ignore[reportIncompatibleVariableOverride]
    """Causal language model: Llama or LlamaMoE with any FFN of the family.

    Supports what `transformers.LlamaForCausalLM` supports: `generate`, `from_pretrained`, gradient checkpointing,
    `resize_token_embeddings`, attention implementations, `push_to_hub`.
    """

    def __init__(self, config: MoALlamaConfig) -> None:
        LlamaPreTrainedModel.__init__(self, config)
        self.model = MoALlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_llama(
        cls, source: str | PathLike[str] | PreTrainedModel, variant: str = "swiglu", **settings: Any
    ) -> Self:
        """Convert a Llama-family checkpoint: all its weights, with `variant` as FFN.

        With "swiglu" the model is the same function as the source. With another variant the projections are kept and
        the mixing is initialized by the layer's own rule: coefficients are near 1/2 for every pair of activations,
        not 1 for (silu, identity), so the model needs further training. No setting of sigmoid, tanh and softmax gates
        without bias starts at SwiGLU.

        Args:
            source: Folder or Hub name with config.json and safetensors, or a model, which is copied.
            variant: A Type-II variant. Type-I has no up branch for up_proj.
            settings: Fields of `MoALlamaConfig` that do not change the shape of a weight (ffn_mixing_gate,
                ffn_mix_init_std, ...), and of `from_pretrained`'s arguments dtype (default: the source's),
                device_map, max_memory, offload_folder, attn_implementation, revision, token, cache_dir and
                local_files_only.

        Returns:
            The model in evaluation mode, as from `from_pretrained`.

        Raises:
            ConfigError: The architecture does not map one to one (accepted: llama; mistral without a sliding window;
                moa_llama with swiglu), or a setting is invalid.
            DataError: The folder does not exist, is damaged, or has missing or unknown weights.
            OSError: There is no such checkpoint on the Hub, or the weights are not safetensors.
        """
        return from_llama(cls, source, variant, **settings)

    @takes_cache
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_router_logits: bool | None = None,
        skip_logits: bool | None = None,
        **kwargs: Any,
    ) -> MoACausalLMOutput:
        """Return logits of the next token, and with labels the training loss; arguments as in `LlamaForCausalLM`.

        Args:
            input_ids: (B, T) tokens.
            attention_mask: (B, T), 0 for padding, which the routers' losses leave out.
            position_ids: (B, T) or (1, T). Those of `document_positions` keep attention within documents, without an
                `attention_mask` and without a cache (`use_cache=False`, which skip_logits implies).
            labels: (B, T), -100 for positions without loss; shifted inside, as in transformers.
            logits_to_keep: 0 for all positions, n for the last n, or the indices of the positions.
            output_router_logits: Return the router logits of every layer; None uses the configuration's setting.
            skip_logits: Compute the loss without the logits of all tokens at once (see `moa_lm.loss`): `logits` is
                None, `sequence_losses` is set. A wrapped `lm_head` (adapter, quantized or sharded weight, hooks) is
                called for one chunk of tokens at a time. None means False.
            kwargs: `shift_labels` (B, T) instead of `labels`: the next token of each position, already shifted.
                `num_items_in_batch`, the number of labels of the whole accumulated batch, scales the loss, routers'
                losses included, from a mean to its share of that batch's mean.

        Raises:
            ValueError: skip_logits is set without labels.
        """
        # Not a named argument: transformers' Trainer requires every argument with "label" in its name.
        shift_labels: Tensor | None = kwargs.pop("shift_labels", None)
        if labels is not None and shift_labels is None:
            shift_labels = nn.functional.pad(labels[..., 1:], (0, 1), value=IGNORED_LABEL)
        if skip_logits:
            if shift_labels is None:
                raise ValueError("skip_logits=True leaves nothing to return without labels or shift_labels")
            use_cache = bool(use_cache)
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        routed = self.config.num_experts > 0 and (output_router_logits or shift_labels is not None)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_logits=routed,
            return_dict=True,
            **kwargs,
        )
        items = kwargs.get("num_items_in_batch")
        logits = lm_loss = sequence_losses = None
        if skip_logits:
            assert shift_labels is not None
            lm_loss, sequence_losses = self._losses(outputs.last_hidden_state, shift_labels, items)
        else:
            logits = self.lm_head(_slice_positions(outputs.last_hidden_state, logits_to_keep))
            if shift_labels is not None:
                lm_loss = self.loss_function(
                    logits=logits,
                    labels=labels,
                    shift_labels=shift_labels.contiguous(),  # transformers views it flat
                    vocab_size=self.config.vocab_size,
                    **kwargs,
                )
        aux_loss = z_loss = None
        if routed:
            aux_loss, z_loss = self._router_losses(outputs, attention_mask)
        return MoACausalLMOutput(
            loss=self._training_loss(lm_loss, aux_loss, z_loss, shift_labels, items),
            logits=logits,
            **{CACHE: outputs.get(CACHE)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits if output_router_logits else None,
            lm_loss=lm_loss,
            aux_loss=aux_loss,
            z_loss=z_loss,
            sequence_losses=sequence_losses,
        )

    def _losses(self, hidden: Tensor, shift_labels: Tensor, items: int | Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the mean loss, or its share of `items`, and the mean of each sequence (B,) for hidden (B, T, D)."""
        labels = shift_labels.to(hidden.device)
        if is_plain(self.lm_head) and self.lm_head.bias is None:
            found = linear_cross_entropy(hidden.flatten(0, 1), self.lm_head.weight, labels.flatten())
        else:
            found = module_cross_entropy(hidden, self.lm_head, labels)
        labels = labels.to(found.tokens.device)
        counts = (labels != IGNORED_LABEL).sum(-1)
        divisor = counts.sum().clamp_min(1) if items is None else torch.as_tensor(items, device=labels.device)
        return found.total / divisor, found.tokens.view_as(labels).sum(-1) / counts.clamp_min(1)

    def _router_losses(self, outputs: MoAModelOutput, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return load-balancing and z-loss, means over layers. Only a mask (B, T) can tell padding."""
        assert outputs.last_hidden_state is not None and outputs.router_logits is not None
        if outputs.last_hidden_state.requires_grad and not outputs.router_logits[-1].requires_grad:
            blocks: Any = self.model.layers
            before = (self.model.embed_tokens, *blocks[:-1], blocks[-1].self_attn, blocks[-1].mlp.router)
            if any(parameter.requires_grad for module in before for parameter in module.parameters()):
                raise ValueError(
                    "gradient checkpointing with use_reentrant=True gives the routers' losses no gradient; pass "
                    'gradient_checkpointing_kwargs={"use_reentrant": False}'
                )
        batch, tokens = outputs.last_hidden_state.shape[:2]
        mask = attention_mask if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2 else None
        mask = None if mask is None else mask[:, -tokens:]  # with a cache it also covers past tokens
        device = outputs.last_hidden_state.device
        layers = [logits.unflatten(0, (batch, tokens)) for logits in outputs.router_logits]
        k = self.config.num_experts_per_tok
        aux = torch.stack([load_balancing_loss(logits, k, mask).to(device) for logits in layers])
        z = torch.stack([router_z_loss(logits, mask).to(device) for logits in layers])
        return aux.mean(), z.mean()

    def _training_loss(
        self,
        lm_loss: Tensor | None,
        aux_loss: Tensor | None,
        z_loss: Tensor | None,
        shift_labels: Tensor | None,
        num_items_in_batch: int | Tensor | None,
    ) -> Tensor | None:
        if lm_loss is None or shift_labels is None or aux_loss is None or z_loss is None:
            return lm_loss
        extra = self.config.router_aux_loss_coef * aux_loss + self.config.router_z_loss_coef * z_loss
        if num_items_in_batch is not None:
            items = (shift_labels != IGNORED_LABEL).sum()
            extra = extra * (items / num_items_in_batch).to(extra.device)
        return lm_loss + extra.to(lm_loss.device)


def document_positions(input_ids: Tensor, end_of_text: int) -> Tensor:
    """Return the positions (B, T) of tokens (B, T) in their documents: 0 at the start of a row and after end-of-text.

    As `position_ids` of a model without `attention_mask` and cache, they keep attention within documents, in eager and
    sdpa attention: transformers treats every position that does not follow its predecessor as a boundary.
    """
    places = torch.arange(input_ids.shape[-1], device=input_ids.device).expand_as(input_ids)
    starts = nn.functional.pad(input_ids[..., :-1] == end_of_text, (1, 0), value=True)
    return places - torch.where(starts, places, 0).cummax(-1).values


def labels_within_documents(input_ids: Tensor, shift_labels: Tensor, end_of_text: int) -> Tensor:
    """Return the labels (B, T) without those of end-of-text inputs, which belong to the next document."""
    return shift_labels.masked_fill(input_ids == end_of_text, IGNORED_LABEL)


def _slice_positions(hidden: Tensor, positions: int | Tensor) -> Tensor:
    """Select positions of hidden (B, T, D) as transformers: the last n, indices (P,) or (B, P), or a mask (B, T)."""
    if not isinstance(positions, Tensor):
        return hidden[:, -positions:]  # 0 selects all
    if positions.dtype == torch.bool:
        return hidden[positions]
    return hidden[:, positions] if positions.ndim == 1 else hidden.take_along_dim(positions.unsqueeze(-1), dim=1)
