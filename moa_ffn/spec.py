"""FFNSpec: which mixture an FFN computes. Names such as "qdmoa" resolve here, once."""

from dataclasses import dataclass
from typing import Literal, get_args

from moa_ffn.activations import ACTIVATIONS, resolve_activations

Gate = Literal["sigmoid", "tanh", "softmax"]
Branch = Literal["gate", "up"]
Form = Literal["fixed", "gate", "up", "separable", "full"]
"""Shape of the coefficient matrix C: one-hot, a column, a row, an outer product, or unconstrained."""

GATES: tuple[str, ...] = get_args(Gate)
BRANCHES: tuple[str, ...] = get_args(Branch)

DEFAULT_GATE_ACTIVATIONS = ("gelu", "silu", "relu2")
DEFAULT_UP_ACTIVATIONS = ("identity", "tanh")
SWIGLU_PAIR = ("silu", "identity")
"""What a branch holds when it is not mixed: SwiGLU's (s, id)."""


@dataclass(frozen=True)
class _Variant:
    type_two: bool
    mixing: Literal["fixed", "constant", "token"]
    mixed: Literal["none", "gate", "one", "both", "pairs"] = "none"
    fixed_activation: str = "silu"


_VARIANTS = {
    "relu2": _Variant(False, "fixed", fixed_activation="relu2"),
    "gelu": _Variant(False, "fixed", fixed_activation="gelu"),
    "la": _Variant(False, "constant", "gate"),
    "moa": _Variant(False, "token", "gate"),
    "swiglu": _Variant(True, "fixed"),
    "onela": _Variant(True, "constant", "one"),
    "bila": _Variant(True, "constant", "both"),
    "qdla": _Variant(True, "constant", "pairs"),
    "onemoa": _Variant(True, "token", "one"),
    "bimoa": _Variant(True, "token", "both"),
    "qdmoa": _Variant(True, "token", "pairs"),
}
VARIANTS: tuple[str, ...] = tuple(_VARIANTS)


def _require(field: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{field}={value!r} is not one of {', '.join(allowed)}")


@dataclass(frozen=True)
class FFNSpec:
    """One member of the family out = down(sum_kl C_kl f_k(a) g_l(b)), arXiv:2605.26647.

    Fields that the variant does not use are accepted, checked and without effect, so that one configuration serves
    a whole comparison; the properties below say what is computed.

    Args:
        variant: one of `VARIANTS`.
        mixing_gate: nonlinearity of the token's mixing coefficients: sigmoid, tanh or softmax (over each mixed
            branch, over all pairs for the quadratic form). The paper finds sigmoid best. Fixed and LA variants do
            not use it.
        gate_activations: dictionary of the gate branch, names or abbreviations. The paper leaves the final choice
            open; default gelu, silu, relu2.
        up_activations: dictionary of the up branch; default identity, tanh. Unused by Type-I.
        mixed_branch: which branch the one-sided variants mix (open in the paper); default "gate". The other stays as
            in SwiGLU: silu on the gate branch, identity on the up branch.
        mix_bias: bias on the mixing logits (open; the definition pi_k = mixing_gate(u_k . x) has none). Default False.

    Raises:
        ValueError: a field has a value that is not allowed; the message names it.
    """

    variant: str = "qdmoa"
    mixing_gate: str = "sigmoid"
    gate_activations: tuple[str, ...] = DEFAULT_GATE_ACTIVATIONS
    up_activations: tuple[str, ...] = DEFAULT_UP_ACTIVATIONS
    mixed_branch: str = "gate"
    mix_bias: bool = False

    def __post_init__(self) -> None:
        _require("variant", self.variant, VARIANTS)
        _require("mixing_gate", self.mixing_gate, GATES)
        _require("mixed_branch", self.mixed_branch, BRANCHES)
        for field in ("gate_activations", "up_activations"):
            object.__setattr__(self, field, resolve_activations(getattr(self, field), field))

    @property
    def _variant(self) -> _Variant:
        return _VARIANTS[self.variant]

    @property
    def type_two(self) -> bool:
        """True when the FFN has a second (up) branch."""
        return self._variant.type_two

    @property
    def token_adaptive(self) -> bool:
        """True for MoA: the coefficients are computed from the token."""
        return self._variant.mixing == "token"

    @property
    def learned_constant(self) -> bool:
        """True for LA: the coefficients are parameters, the same for all tokens."""
        return self._variant.mixing == "constant"

    @property
    def form(self) -> Form:
        """Shape of the coefficient matrix."""
        forms: dict[str, Form] = {"none": "fixed", "gate": "gate", "both": "separable", "pairs": "full"}
        if self._variant.mixed == "one":
            return "gate" if self.mixed_branch == "gate" else "up"
        return forms[self._variant.mixed]

    @property
    def gate_dictionary(self) -> tuple[str, ...]:
        """Activations f_k that the gate branch computes, K1 of them."""
        if self.form == "fixed":
            return (self._variant.fixed_activation,)
        return (SWIGLU_PAIR[0],) if self.form == "up" else self.gate_activations

    @property
    def up_dictionary(self) -> tuple[str, ...]:
        """Activations g_l that the up branch computes, K2 of them; empty for Type-I, where b = 1."""
        if not self.type_two:
            return ()
        return (SWIGLU_PAIR[1],) if self.form in ("fixed", "gate") else self.up_activations

    @property
    def num_coefficients(self) -> int:
        """Free mixing coefficients of a token: 0, K1, K2, K1 + K2 or K1 * K2."""
        k1, k2 = len(self.gate_dictionary), len(self.up_dictionary)
        return {"fixed": 0, "gate": k1, "up": k2, "separable": k1 + k2, "full": k1 * k2}[self.form]

    @property
    def terms(self) -> tuple[str, ...]:
        """Names of the terms f_k(a) g_l(b), row by row, such as "g·id"; of f_k(a) alone, "g", for Type-I."""
        gate, up = (
            [ACTIVATIONS[name].abbreviation for name in names] for names in (self.gate_dictionary, self.up_dictionary)
        )
        return tuple(f"{f}·{g}" for f in gate for g in up) if self.type_two else tuple(gate)

    def extra_parameters(self, dim: int) -> int:
        """Parameters beyond the fixed FFN of the same widths: num_coefficients * (dim [+ 1 with bias]) for MoA,
        num_coefficients for LA.
        """
        per_coefficient = dim + self.mix_bias if self.token_adaptive else 1
        return self.num_coefficients * per_coefficient

    def __str__(self) -> str:
        parts = [self.variant, f"f={','.join(self.gate_dictionary)}"]
        parts += [f"g={','.join(self.up_dictionary)}"] if self.type_two else []
        parts += [f"mixing_gate={self.mixing_gate}"] if self.token_adaptive else []
        return ", ".join(parts)
