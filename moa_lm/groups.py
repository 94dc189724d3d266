"""Which parameters of a language model Muon steps, and which have no weight decay."""

from __future__ import annotations

from torch import nn

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Of attention and of every FFN: dense, shared experts, routed experts."""


def hidden_matrices(model: nn.Module) -> set[str]:
    """Return the names of the weights that map hidden states to hidden states: the projections of attention and FFNs.

    Those of routed experts are stacks (E, outputs, inputs), all others matrices (outputs, inputs). They are what Muon
    is for (https://kellerjordan.github.io/posts/muon/). Not among them are embeddings and head, whose one side is the
    vocabulary, the router, whose rows are experts, the mixing, whose rows are coefficients, and all vectors.

    Args:
        model: A MoALlamaForCausalLM, or a module that holds one. Frozen parameters are left out.
    """
    return {name for name in _trainable(model) if name.removesuffix(".weight").rpartition(".")[2] in PROJECTIONS}


def no_weight_decay(model: nn.Module) -> set[str]:
    """Return the names of the parameters without weight decay: norms, biases, and the coefficients of LA variants.

    A routed expert's bias or coefficients are a row of a matrix, but no weights either. Everything else is decayed:
    projections and router, `mix_proj` as in the vision half, and embeddings and head as in nanoGPT.

    Args:
        model: A MoALlamaForCausalLM, or a module that holds one. Frozen parameters are left out.
    """
    return {
        name
        for name, parameter in _trainable(model).items()
        if parameter.ndim < 2 or name.endswith((".bias", "_bias", "mix_coef"))
    }


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
