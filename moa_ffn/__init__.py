"""Mixture of Activations: one feedforward layer for every variant of arXiv:2605.26647."""

from __future__ import annotations

import moa_ffn.trainable_activations  # noqa: F401  # registers them
from moa_ffn.activations import ACTIVATIONS, Activation, register_activation
from moa_ffn.backends import BACKENDS
from moa_ffn.coefficients import Coefficients, init_mixing, mixing_coefficients
from moa_ffn.layers import FFN
from moa_ffn.mixing import mixture
from moa_ffn.spec import GATES, VARIANTS, FFNSpec
from moa_ffn.upcycling import upcycle

__all__ = [
    "ACTIVATIONS",
    "BACKENDS",
    "FFN",
    "GATES",
    "VARIANTS",
    "Activation",
    "Coefficients",
    "FFNSpec",
    "init_mixing",
    "mixing_coefficients",
    "mixture",
    "register_activation",
    "upcycle",
]
