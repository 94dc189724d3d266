"""Source text of the Triton kernels of a mixture.

A kernel is straight-line code for one form, one mixing gate and one pair of dictionaries. The core of the forward of
qd-MoA with f = (silu, relu) and g = (identity, tanh) is

    f0 = a * sigmoid(a)
    f1 = tl.where(a < 0.0, 0.0, a)
    g0 = b
    g1 = tanh(b)
    v0 = c0 * g0 + c1 * g1
    v1 = c2 * g0 + c3 * g1
    out = f0 * v0 + f1 * v1

and `print(forward(mixture))` shows all of it. One program computes one row (token), whose coefficients are scalars. The
backward sums their gradients over the row's columns in a fixed order and writes them once, without atomics, so results
are deterministic. Row offsets are 64-bit, columns 32-bit.
"""

from __future__ import annotations

import ast
import textwrap
from collections.abc import Iterable, Sequence
from functools import cache
from typing import NamedTuple

from moa_ffn.activations import ACTIVATIONS, num_parameters
from moa_ffn.spec import FFNSpec

VOCABULARY = {
    **{
        name: f"tl.{name}"
        for name in ("exp", "exp2", "log", "sqrt", "abs", "erf", "sin", "cos", "maximum", "minimum", "where")
    },
    **{name: name for name in ("sigmoid", "tanh", "normal")},
}
"""Functions that `Activation.kernel` may call, and their names in kernels: Triton's, or those of functions.py."""


class Mixture(NamedTuple):
    """The mixture that a kernel computes, sum_kl C_kl f_k(a) g_l(b).

    form: Shape of the coefficient matrix, a `moa_ffn.spec.Form`.
    gate: Nonlinearity of the mixing logits, or "none" for constant or no coefficients.
    f, g: Names of the activations of the gate and up branches, separated by commas; g is empty for Type-I.
    ones: Indices of the coefficients that an anchored mixture starts at 1, separated by commas; empty if not anchored.
    """

    form: str
    gate: str
    f: str
    g: str
    ones: str = ""

    @classmethod
    def of(cls, spec: FFNSpec) -> Mixture:
        """Return the mixture of an FFN."""
        gate = spec.mixing_gate if spec.token_adaptive else "none"
        ones = spec.anchor_coefficients if spec.token_adaptive else ()
        f, g = (",".join(names) for names in spec.dictionaries)
        return cls(spec.form, gate, f, g, ",".join(map(str, ones)))

    @classmethod
    def parse(cls, key: str) -> Mixture:
        """Return the mixture with this `key`."""
        return cls(*key.split(";"))

    @property
    def key(self) -> str:
        """The fields as one string, the form in which torch operators accept them."""
        return ";".join(self)

    @property
    def type_two(self) -> bool:
        """Whether there is an up branch."""
        return self.g != ""

    @property
    def gate_coefficients(self) -> list[int]:
        """Indices of the gate branch's coefficients in a row of `mix`."""
        return list(range(len(self.f.split(",")))) if self.form in ("gate", "separable") else []

    @property
    def up_coefficients(self) -> list[int]:
        """Indices of the up branch's coefficients."""
        first = len(self.gate_coefficients)
        return list(range(first, first + len(self.g.split(",")))) if self.form in ("up", "separable") else []

    @property
    def pair_coefficients(self) -> list[list[int]]:
        """Indices of the coefficients C_kl of the full form, K1 rows of K2."""
        k1, k2 = len(self.f.split(",")), len(self.g.split(","))
        return [[k * k2 + l for l in range(k2)] for k in range(k1)] if self.form == "full" else []  # noqa: E741

    @property
    def coefficients(self) -> int:
        """Number of coefficients per token."""
        return len(self.gate_coefficients) + len(self.up_coefficients) + sum(map(len, self.pair_coefficients))

    @property
    def parameters(self) -> int:
        """Number of parameters of trainable activations, shared by all tokens."""
        return num_parameters(name for names in (self.f, self.g) if names for name in names.split(","))


@cache
def expressions(name: str, variable: str, first: int = 0) -> tuple[str, ...]:
    """Return value, derivative and slopes of an activation at `variable`, with parameters t<first>, ..., as source.

    Raises:
        ValueError: The activation has no kernel expressions, or they use unsupported names.
    """
    texts = ACTIVATIONS[name].kernel
    if texts is None:
        raise ValueError(f"activation {name!r} has no kernel expressions (the field `kernel` of its table entry)")
    parameters = {f"p{index}": f"t{first + index}" for index in range(len(ACTIVATIONS[name].parameters))}
    return tuple(_translate(name, text, {"x": variable, **parameters, **VOCABULARY}) for text in texts)


def _translate(name: str, text: str, known: dict[str, str]) -> str:
    try:
        tree = ast.parse(text, mode="eval")
    except SyntaxError as error:
        raise ValueError(f"activation {name!r}: kernel expression {text!r}: {error.msg}") from None
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) or (isinstance(node, ast.Name) and node.id not in known):
            allowed = f"x, numbers, operators and {', '.join(VOCABULARY)}"
            raise ValueError(
                f"activation {name!r}: kernel expression {text!r} uses {ast.unparse(node)!r}, not {allowed}"
            )
        if isinstance(node, ast.Name):
            node.id = known[node.id]
    return ast.unparse(tree)


@cache
def forward(mixture: Mixture) -> str:
    """Return the source of `moa_forward`: a, b, mix -> out. Grid (rows, n); n programs share the columns of a row."""
    branches, coefficients = _operands(mixture)
    outs = ["out"]
    lines = [
        *_rows(branches + coefficients + outs),
        *_gate(mixture),
        "for start in range(tl.program_id(1) * BLOCK, columns, tl.num_programs(1) * BLOCK):",
        *_indent(_loads(branches) + _activations(mixture) + _output(mixture) + _stores(outs)),
    ]
    return _kernel("moa_forward", branches + coefficients + outs, lines)


@cache
def backward(mixture: Mixture, with_output: bool) -> str:
    """Return the source of `moa_backward`: grad, a, b, mix -> grad_a, grad_b, grad_mix [, out]. Grid (rows,)."""
    branches, coefficients = _operands(mixture)
    outs = [f"grad_{branch}" for branch in branches] + (["out"] if with_output else [])
    grad_mix = [f"grad_{name}" for name in coefficients]
    totals = [f"total{i}" for i in range(mixture.coefficients)] + [f"sum{i}" for i in range(mixture.parameters)]
    body = _loads(["grad", *branches]) + _activations(mixture, slopes=True)
    body += _output(mixture) + _gradients(mixture) + _stores(outs)
    lines = [
        *_rows(["grad", *branches, *coefficients, *outs, *grad_mix]),
        *_gate(mixture),
        *(f"{total} = tl.full([BLOCK], 0.0, tl.float32)" for total in totals),
        "for start in range(0, columns, BLOCK):",
        *_indent(body),
        *(f"{total} = tl.reduce({total}, 0, add)" for total in totals),
        *_gate_backward(mixture),
        *(f"tl.store(grad_act_ptr + {i}, sum{i})" for i in range(mixture.parameters)),
    ]
    return _kernel("moa_backward", ["grad", *branches, *coefficients, *outs, *grad_mix], lines)


def _operands(mixture: Mixture) -> tuple[list[str], list[str]]:
    shared = (["mix"] if mixture.coefficients else []) + (["act"] if mixture.parameters else [])
    return ["a", "b"] if mixture.type_two else ["a"], shared


def _kernel(name: str, operands: Sequence[str], lines: Sequence[str]) -> str:
    pointers, strides = ([f"{operand}_{suffix}" for operand in operands] for suffix in ("ptr", "stride"))
    head = f"def {name}({', '.join([*pointers, *strides, 'columns', 'BLOCK: tl.constexpr'])}):"
    return "\n".join([head, *_indent(lines), ""])


def _indent(lines: Iterable[str]) -> list[str]:
    return [textwrap.indent(line, "    ") for line in lines]


def _rows(operands: Iterable[str]) -> list[str]:
    """Move every pointer to this program's row, in 64 bits: a tensor may exceed 2^31 elements."""
    moves = [f"{operand}_ptr += row * {operand}_stride" for operand in operands]
    return ["row = tl.program_id(0).to(tl.int64)", *moves]


def _loads(operands: Iterable[str]) -> list[str]:
    loads = [f"{name} = tl.load({name}_ptr + column, mask=inside, other=0.0).to(tl.float32)" for name in operands]
    return ["column = start + tl.arange(0, BLOCK)", "inside = column < columns", *loads]


def _stores(operands: Iterable[str]) -> list[str]:
    return [f"tl.store({name}_ptr + column, {name}.to({name}_ptr.dtype.element_ty), mask=inside)" for name in operands]


def _gate(mixture: Mixture) -> list[str]:
    """Load parameters t0, t1, ... and compute the token's coefficients c0, c1, ... from its logits.

    An anchored mixture also has the gate's values p0, p1, ... before the offset.
    """
    count = mixture.coefficients
    lines = [f"t{i} = tl.load(act_ptr + {i}).to(tl.float32)" for i in range(mixture.parameters)]
    lines += [f"c{i} = tl.load(mix_ptr + {i}).to(tl.float32)" for i in range(count)]
    if mixture.gate == "softmax":
        lines += [line for number, group in enumerate(_groups(mixture)) for line in _softmax(number, group)]
    elif mixture.gate != "none":
        lines += [f"c{i} = {mixture.gate}(c{i})" for i in range(count)]
    if mixture.ones:
        ones = {int(index) for index in mixture.ones.split(",")}
        for group in _groups(mixture):
            at_zero = {"sigmoid": 0.5, "tanh": 0.0, "softmax": 1 / len(group)}[mixture.gate]
            lines += [line for i in group for line in (f"p{i} = c{i}", f"c{i} = p{i} - {at_zero} + {float(i in ones)}")]
    return lines


def _groups(mixture: Mixture) -> list[list[int]]:
    """Return the groups of coefficients that one softmax normalizes: those of a branch, or all pairs."""
    pairs = [index for row in mixture.pair_coefficients for index in row]
    return [group for group in (mixture.gate_coefficients, mixture.up_coefficients, pairs) if group]


def _softmax(number: int, group: Sequence[int]) -> list[str]:
    first, *others = group
    largest, total = f"largest{number}", f"partition{number}"
    return [
        f"{largest} = c{first}",
        *(f"{largest} = tl.maximum({largest}, c{i})" for i in others),
        *(f"c{i} = tl.exp(c{i} - {largest})" for i in group),
        f"{total} = {_sum(f'c{i}' for i in group)}",
        *(f"c{i} = c{i} / {total}" for i in group),
    ]


def _gate_backward(mixture: Mixture) -> list[str]:
    """Store the gradients of the logits, from the coefficients' gradients total0, total1, ..."""
    slopes = {
        "none": "total{0}",
        "sigmoid": "total{0} * {1}{0} * (1.0 - {1}{0})",
        "tanh": "total{0} * (1.0 - {1}{0} * {1}{0})",
    }
    gate_value = "p" if mixture.ones else "c"
    lines = []
    for number, group in enumerate(_groups(mixture)):
        slope = slopes.get(mixture.gate, f"{{1}}{{0}} * (total{{0}} - mean{number})")
        if mixture.gate == "softmax":
            lines.append(f"mean{number} = {_sum(f'{gate_value}{i} * total{i}' for i in group)}")
        lines += [
            f"tl.store(grad_mix_ptr + {i}, ({slope.format(i, gate_value)}).to(grad_mix_ptr.dtype.element_ty))"
            for i in group
        ]
    return lines


def _activations(mixture: Mixture, slopes: bool = False) -> list[str]:
    """Compute values f0, f1, ..., g0, g1, ... and, with `slopes`, derivatives df0, ... and s0, ... by parameters."""
    lines, first = [], 0
    for letter, variable, names in (("f", "a", mixture.f), ("g", "b", mixture.g)):
        for index, name in enumerate(names.split(",") if names else []):
            value, derivative, *by_parameters = expressions(name, variable, first)
            lines.append(f"{letter}{index} = {value}")
            if slopes:
                lines.append(f"d{letter}{index} = {derivative}")
                lines += [f"s{first + i} = {text}" for i, text in enumerate(by_parameters)]
            first += len(by_parameters)
    return lines


def _parameter_gradients(letter: str, mixture: Mixture, grads: Sequence[str]) -> list[str]:
    """Add the gradients of parameters to sum0, sum1, ..., given the gradient of each activation's value."""
    f, g = (
        [len(ACTIVATIONS[n].parameters) for n in text.split(",")] if text else [] for text in (mixture.f, mixture.g)
    )
    first, lines = (0 if letter == "f" else sum(f)), []
    for count, grad in zip(f if letter == "f" else g, grads, strict=True):
        lines += [f"sum{i} += {grad} * s{i}" for i in range(first, first + count)]
        first += count
    return lines


def _sum(terms: Iterable[str]) -> str:
    return " + ".join(terms)


def _blend(coefficients: Sequence[int], values: Sequence[str]) -> str:
    """Write sum_k c_k values_k, or the one value of a fixed branch."""
    if not coefficients:
        (value,) = values
        return value
    return _sum(f"c{index} * {value}" for index, value in zip(coefficients, values, strict=True))


def _values(letter: str, names: str) -> list[str]:
    return [f"{letter}{index}" for index, _ in enumerate(names.split(","))]


def _output(mixture: Mixture) -> list[str]:
    """Compute `out` from the blends u of the gate branch and v of the up branch, or v_k = sum_l C_kl g_l(b)."""
    f, g = _values("f", mixture.f), _values("g", mixture.g)
    if mixture.form == "full":
        blends = [f"v{k} = {_blend(row, g)}" for k, row in enumerate(mixture.pair_coefficients)]
        return [*blends, f"out = {_sum(f'{value} * v{k}' for k, value in enumerate(f))}"]
    gate = [f"u = {_blend(mixture.gate_coefficients, f)}"]
    up = [f"v = {_blend(mixture.up_coefficients, g)}"] if mixture.type_two else []
    return [*gate, *up, "out = u * v" if up else "out = u"]


def _gradients(mixture: Mixture) -> list[str]:
    """Compute grad_a and grad_b, and add the coefficients' gradients to total0, total1, ..."""
    f, g = _values("f", mixture.f), _values("g", mixture.g)
    if mixture.form == "full":
        return _full_gradients(mixture, f, g)
    lines = ["grad_u = grad * v" if mixture.type_two else "grad_u = grad"]
    branches = [("a", "u", mixture.gate_coefficients, f)]
    if mixture.type_two:
        lines.append("grad_v = grad * u")
        branches.append(("b", "v", mixture.up_coefficients, g))
    for variable, blend, coefficients, values in branches:
        lines.append(f"grad_{variable} = grad_{blend} * ({_blend(coefficients, [f'd{value}' for value in values])})")
        lines += [f"total{i} += grad_{blend} * {value}" for i, value in zip(coefficients, values, strict=False)]
        weights = [f"c{i} * grad_{blend}" for i in coefficients] or [f"grad_{blend}"]
        lines += _parameter_gradients("f" if variable == "a" else "g", mixture, weights)
    return lines


def _full_gradients(mixture: Mixture, f: Sequence[str], g: Sequence[str]) -> list[str]:
    pairs = mixture.pair_coefficients
    columns = [[row[index] for row in pairs] for index in range(len(g))]
    lines = [f"u{index} = {_blend(column, f)}" for index, column in enumerate(columns)]
    lines.append(f"grad_a = grad * ({_sum(f'd{value} * v{k}' for k, value in enumerate(f))})")
    lines.append(f"grad_b = grad * ({_sum(f'd{value} * u{index}' for index, value in enumerate(g))})")
    for row, value in zip(pairs, f, strict=True):
        lines.append(f"grad_{value} = grad * {value}")
        lines += [f"total{i} += grad_{value} * {other}" for i, other in zip(row, g, strict=True)]
    lines += _parameter_gradients("f", mixture, [f"grad * v{k}" for k, _ in enumerate(f)])
    return lines + _parameter_gradients("g", mixture, [f"grad * u{index}" for index, _ in enumerate(g)])
