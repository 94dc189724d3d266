"""Parameter groups of a language model: those that Muon steps, and those without weight decay."""

from __future__ import annotations

from torch import nn

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Projections of attention and of every FFN: dense, shared experts, routed experts."""


def hidden_matrices(model: nn.Module) -> set[str]:
    """Return the names of the weights that map hidden states to hidden states: the projections of attention and FFNs.

    Those of routed experts are stacks (E, outputs, inputs), all others matrices (outputs, inputs). Muon is designed
    for such matrices (https://kellerjordan.github.io/posts/muon/). Embeddings, head, router, mixing and vectors map
    from or to something else and are left out, as are frozen parameters.
    """
    return {name for name in _trainable(model) if name.removesuffix(".weight").rpartition(".")[2] in PROJECTIONS}


def no_weight_decay(model: nn.Module) -> set[str]:
    """Return the names of the parameters without weight decay: norms, biases, LA coefficients, activations.

    Biases and coefficients of routed experts, stacked to matrices, are among them. All other parameters are decayed:
    projections, router, `mix_proj` (as in the vision half), embeddings and head (as in nanoGPT).
    Frozen parameters are left out too.
    """
    return {
        name
        for name, parameter in _trainable(model).items()
        if parameter.ndim < 2 or name.endswith((".bias", "_bias", "mix_coef", "act_param"))
    }


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
