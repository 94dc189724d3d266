"""Continuous measures of multiple-choice samples: bits per byte of the right answer, and its probability.

Both use the log-likelihoods of all choices, so they separate models whose accuracies do not differ. Source: Heineman
et al. (2025), "Signal and Noise", arXiv:2508.13144.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import special

BITS_PER_BYTE = "bits_per_byte"
PROBABILITY = "p_right"


def measures(sample: Mapping[str, Any]) -> dict[str, float]:
    """Return both measures of one sample of lm-eval, {} for other kinds of tasks.

    Bits per byte are -log2 P(answer | context) divided by the answer's length in UTF-8 bytes, its leading space
    included. The probability is the softmax over the choices' log-likelihoods, without normalization by length.
    WinoGrande's choices are contexts with one common continuation; its bits are those of that continuation.
    """
    arguments, responses = sample.get("arguments"), sample.get("filtered_resps")
    if not isinstance(arguments, Mapping) or not isinstance(responses, list) or "acc" not in sample:
        return {}  # generation, or samples of lm-eval before 0.4.3
    try:
        likelihoods = np.array([float(likelihood) for likelihood, _ in responses])
        answers = [str(request["arg_1"]) for request in arguments.values()]
        right = _right(sample, likelihoods, answers)
    except (KeyError, TypeError, ValueError):
        return {}
    if len(answers) != len(likelihoods) or not 0 <= right < len(answers) or not answers[right]:
        return {}  # acc_mutual_info adds requests without a context
    bits = -likelihoods[right] / math.log(2) / len(answers[right].encode())
    return {BITS_PER_BYTE: float(bits), PROBABILITY: float(special.softmax(likelihoods)[right])}


def _right(sample: Mapping[str, Any], likelihoods: NDArray[np.float64], answers: list[str]) -> int:
    """Return the index of the right choice.

    The target of WinoGrande is the common continuation, so the right one of its two contexts follows from `acc`.
    """
    if len(answers) == 2 and answers[0] == answers[1]:
        best = int(likelihoods.argmax())
        return best if sample["acc"] else 1 - best
    return int(sample["target"])


def cluster(sample: Mapping[str, Any]) -> str:
    """Return the name of the group of related items that a sample belongs to, by default its own.

    WinoGrande's items come in twins that differ in one word and share both options.
    """
    doc = sample.get("doc")
    options = [doc.get("option1"), doc.get("option2")] if isinstance(doc, Mapping) else [None]
    if all(isinstance(option, str) for option in options):
        return " | ".join(sorted(map(str, options)))
    return str(sample["doc_id"])
