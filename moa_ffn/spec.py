"""The variants of the family and `FFNSpec`, which describes one of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from moa_ffn.activations import ACTIVATIONS, num_parameters, resolve_activations

Gate = Literal["sigmoid", "tanh", "softmax"]
Branch = Literal["gate", "up"]
Base = Literal["none", "anchor"]
Form = Literal["fixed", "gate", "up", "separable", "full"]
"""Shape of the coefficient matrix C: one-hot, a column, a row, an outer product, or unconstrained."""

GATES: tuple[str, ...] = get_args(Gate)
BRANCHES: tuple[str, ...] = get_args(Branch)
BASES: tuple[str, ...] = get_args(Base)

DEFAULT_GATE_ACTIVATIONS = ("gelu", "silu", "relu2")
DEFAULT_UP_ACTIVATIONS = ("identity", "tanh")
SWIGLU_PAIR = ("silu", "identity")
"""Activations of the branches that are not mixed: SwiGLU's (s, id)."""


class Dictionaries(NamedTuple):
    """Names of the activations of each branch: K1 of the gate branch, K2 of the up branch (none for Type-I)."""

    gate: tuple[str, ...]
    up: tuple[str, ...]


class _Variant(NamedTuple):
    type_two: bool
    mixing: Literal["fixed", "constant", "token"]
    form: Literal["fixed", "gate", "one", "separable", "full"]
    """As `Form`; "one" is "gate" or "up", according to `FFNSpec.mixed_branch`."""
    fixed_activation: str = "silu"


_VARIANTS = {
    "relu2": _Variant(False, "fixed", "fixed", "relu2"),
    "gelu": _Variant(False, "fixed", "fixed", "gelu"),
    "swish": _Variant(False, "fixed", "fixed", "swish"),
    "xielu": _Variant(False, "fixed", "fixed", "xielu"),
    "polynorm": _Variant(False, "fixed", "fixed", "polynorm"),
    "pau": _Variant(False, "fixed", "fixed", "pau"),
    "la": _Variant(False, "constant", "gate"),
    "moa": _Variant(False, "token", "gate"),
    "swiglu": _Variant(True, "fixed", "fixed"),
    "geglu": _Variant(True, "fixed", "fixed", "gelu"),
    "reglu": _Variant(True, "fixed", "fixed", "relu"),
    "relu2glu": _Variant(True, "fixed", "fixed", "relu2"),
    "bilinear": _Variant(True, "fixed", "fixed", "identity"),
    "onela": _Variant(True, "constant", "one"),
    "bila": _Variant(True, "constant", "separable"),
    "qdla": _Variant(True, "constant", "full"),
    "onemoa": _Variant(True, "token", "one"),
    "bimoa": _Variant(True, "token", "separable"),
    "qdmoa": _Variant(True, "token", "full"),
}
VARIANTS: tuple[str, ...] = tuple(_VARIANTS)


@dataclass(frozen=True)
class FFNSpec:
    """One member of the family out = down(sum_kl C_kl f_k(a) g_l(b)), arXiv:2605.26647.

    Fields that the variant does not use are validated and ignored, so that one configuration serves all variants of a
    comparison.

    Args:
        variant: One of `VARIANTS`.
        mixing_gate: Nonlinearity of the mixing coefficients of MoA variants: sigmoid, tanh or softmax (over each mixed
            branch, or over all pairs). The paper finds sigmoid best.
        gate_activations: Dictionary of the gate branch, names or abbreviations. The paper leaves it open; default
            gelu, silu, relu2.
        up_activations: Dictionary of the up branch of Type-II; default identity, tanh.
        mixed_branch: The branch that the one-sided variants mix (open in the paper); default "gate". The other branch
            is that of SwiGLU: silu on the gate branch, identity on the up branch.
        mix_bias: Bias on the mixing logits (open in the paper, whose formula pi_k = mixing_gate(u_k . x) has none).
        mix_pool: Compute the coefficients of MoA from the mean token of a sequence, one matrix for all its tokens, as
            in Dynamic ReLU (arXiv:2003.10027; not in the paper). For non-causal models only.
        mix_base: "none" is the paper. "anchor" continues a pretrained FFN (not in the paper): every factor of the
            coefficients is onehot + mixing_gate(Ux) - mixing_gate(0), with U = 0 at initialization, so that the layer
            starts as the FFN with the one pair of activations (anchor, identity). LA coefficients start at onehot.
        anchor: Gate activation of the pretrained FFN, for "anchor"; default silu for Type-II, gelu for Type-I.

    Raises:
        ValueError: A field has a value that is not allowed.
    """

    variant: str = "qdmoa"
    mixing_gate: str = "sigmoid"
    gate_activations: tuple[str, ...] = DEFAULT_GATE_ACTIVATIONS
    up_activations: tuple[str, ...] = DEFAULT_UP_ACTIVATIONS
    mixed_branch: str = "gate"
    mix_bias: bool = False
    mix_base: str = "none"
    anchor: str | None = None
    mix_pool: bool = False

    def __post_init__(self) -> None:
        """Validate fields and resolve abbreviations of activations."""
        choices = {"variant": VARIANTS, "mixing_gate": GATES, "mixed_branch": BRANCHES, "mix_base": BASES}
        for field, allowed in choices.items():
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field}={getattr(self, field)!r} is not one of {', '.join(allowed)}")
        for field in ("gate_activations", "up_activations"):
            object.__setattr__(self, field, resolve_activations(getattr(self, field), field))
        default = SWIGLU_PAIR[0] if self.type_two else "gelu"
        (anchor,) = resolve_activations(self.anchor or default, "anchor")
        object.__setattr__(self, "anchor", anchor if self.mix_base == "anchor" else None)
        if self.anchored:
            self._check_anchor()

    def _check_anchor(self) -> None:
        for field, name, names in zip(("gate", "up"), self.anchor_pair, self.dictionaries, strict=True):
            if names and name not in names:
                raise ValueError(f"mix_base='anchor' needs {name!r} in {field}_activations={','.join(names)}")

    @property
    def _variant(self) -> _Variant:
        return _VARIANTS[self.variant]

    @property
    def type_two(self) -> bool:
        """Whether the FFN has an up branch."""
        return self._variant.type_two

    @property
    def token_adaptive(self) -> bool:
        """Whether the coefficients are computed from the token (MoA)."""
        return self._variant.mixing == "token"

    @property
    def learned_constant(self) -> bool:
        """Whether the coefficients are parameters shared by all tokens (LA)."""
        return self._variant.mixing == "constant"

    @property
    def anchored(self) -> bool:
        """Whether the mixture starts as a pretrained FFN's pair of activations."""
        return self.mix_base == "anchor" and self._variant.mixing != "fixed"

    @property
    def anchor_pair(self) -> tuple[str, str]:
        """Activations of the pretrained FFN: gate branch, up branch."""
        return self.anchor or SWIGLU_PAIR[0], SWIGLU_PAIR[1]

    @property
    def anchor_coefficients(self) -> tuple[int, ...]:
        """Indices of the coefficients that are 1 for the anchor pair, the others being 0; empty if not anchored."""
        if not self.anchored:
            return ()
        gate, up = self.anchor_pair
        f, g = self.dictionaries
        k, l = f.index(gate), g.index(up) if g else 0  # noqa: E741
        return {"gate": (k,), "up": (l,), "separable": (k, len(f) + l), "full": (k * len(g) + l,)}[self.form]

    @property
    def form(self) -> Form:
        """Shape of the coefficient matrix."""
        form = self._variant.form
        if form == "one":
            return "gate" if self.mixed_branch == "gate" else "up"
        return form

    @property
    def gate_dictionary(self) -> tuple[str, ...]:
        """Activations f_k of the gate branch."""
        if self.form == "fixed":
            return (self._variant.fixed_activation,)
        if self.form == "up":
            return (self.anchor_pair[0],)
        return self.gate_activations

    @property
    def up_dictionary(self) -> tuple[str, ...]:
        """Activations g_l of the up branch; empty for Type-I, where b = 1."""
        if not self.type_two:
            return ()
        return (SWIGLU_PAIR[1],) if self.form in ("fixed", "gate") else self.up_activations

    @property
    def dictionaries(self) -> Dictionaries:
        """Both dictionaries."""
        return Dictionaries(self.gate_dictionary, self.up_dictionary)

    @property
    def num_coefficients(self) -> int:
        """Number of free mixing coefficients per token: 0, K1, K2, K1 + K2 or K1 * K2."""
        k1, k2 = len(self.gate_dictionary), len(self.up_dictionary)
        return {"fixed": 0, "gate": k1, "up": k2, "separable": k1 + k2, "full": k1 * k2}[self.form]

    @property
    def num_activation_parameters(self) -> int:
        """Number of parameters of trainable activations, shared by all tokens."""
        return num_parameters(self.gate_dictionary) + num_parameters(self.up_dictionary)

    @property
    def terms(self) -> tuple[str, ...]:
        """Names of the terms f_k(a) g_l(b), row by row, such as "g·id" ("g" for Type-I)."""
        gate, up = (
            [ACTIVATIONS[name].abbreviation for name in names] for names in (self.gate_dictionary, self.up_dictionary)
        )
        return tuple(f"{f}·{g}" for f in gate for g in up) if self.type_two else tuple(gate)

    def extra_parameters(self, dim: int) -> int:
        """Return the number of parameters beyond the fixed FFN of the same widths.

        It is num_coefficients * (dim [+ 1 with mix_bias]) for MoA and num_coefficients for LA, plus the parameters of
        trainable activations.
        """
        per_coefficient = dim + self.mix_bias if self.token_adaptive else 1
        return self.num_coefficients * per_coefficient + self.num_activation_parameters

    def __str__(self) -> str:
        """Return variant, dictionaries and mixing gate, for logs and `print(model)`."""
        parts = [self.variant, f"f={','.join(self.gate_dictionary)}"]
        parts += [f"g={','.join(self.up_dictionary)}"] if self.type_two else []
        parts += [f"mixing_gate={self.mixing_gate}"] if self.token_adaptive else []
        parts += ["pooled"] if self.token_adaptive and self.mix_pool else []
        parts += [f"anchor={self.anchor_pair[0]}"] if self.anchored else []
        return ", ".join(parts)
