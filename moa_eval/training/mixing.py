"""Recorded mixing coefficients of a run: its folder `mixing/`.

A coefficient whose standard deviation over tokens is below `STATIC` is a static blend: it may be learned, but it does
not depend on the token. The share of a term is the RMS over the hidden width of c_kl f_k(a) g_l(b), divided by the
sum of these over all terms.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from moa_eval.page.formatting import first_of
from moa_eval.training.files import bad_file, fields, list_of, read_json

STATIC = 0.01
"""Standard deviation below which a coefficient is a static blend; gates lie in (0, 1), with tanh in (-1, 1)."""

STATISTICS = ("mean", "std", "low", "high", "share")

_REMEDY = "delete the folder or leave this run out"
_LAYER = fields(
    layer="string",
    coefficients=list_of("string"),
    token_adaptive="boolean",
    **dict.fromkeys(STATISTICS, list_of("number")),
)
_STEP = fields(step="integer", layers=list_of(_LAYER))
_PART = fields(layers=list_of("string"), coefficients=list_of("string"))
_INDEX = fields(
    keys=list_of("string"),
    grid=list_of("integer") | {"minItems": 2, "maxItems": 2},
    parts={"type": "object", "additionalProperties": _PART},
)

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Layer:
    """Coefficients of one layer, such as "encoder.0", over all tokens of the recorded images or texts, at one step.

    Attributes:
        terms: Names of the K terms, such as "g·id".
        token_adaptive: False for learned constants (LA), which are equal for all tokens.
        mean, std, low, high: Mean, standard deviation, 5th and 95th percentile of each coefficient, (K,).
        share: Mean share of each term in the sum, (K,).
    """

    name: str
    terms: tuple[str, ...]
    token_adaptive: bool
    mean: Values
    std: Values
    low: Values
    high: Values
    share: Values

    @property
    def part(self) -> str:
        """The part of the model: "encoder", "decoder" or "model"."""
        return self.name.split(".")[0]


@dataclass(frozen=True)
class Maps:
    """Shares in one part of the model at the last recorded step, for its L layers and K terms.

    `shares` is (images, L, rows * columns, K); NaN for a token that was not computed.
    """

    layers: tuple[str, ...]
    terms: tuple[str, ...]
    shares: Values


@dataclass(frozen=True)
class Mixing:
    """Recorded mixing of a run: layers by rising step, and maps of the images `keys` by part of the model.

    `grid` is the number of rows and columns of patches. Without maps, `keys` is empty.
    """

    steps: dict[int, tuple[Layer, ...]]
    keys: tuple[str, ...] = ()
    grid: tuple[int, int] = (0, 0)
    maps: Mapping[str, Maps] | None = None

    @property
    def last(self) -> tuple[Layer, ...]:
        """The layers at the last recorded step."""
        return self.steps[max(self.steps)]

    @property
    def terms(self) -> list[str]:
        """The terms of all layers at the last recorded step, in order of appearance."""
        return [*dict.fromkeys(term for layer in self.last for term in layer.terms)]


def read_mixing(folder: Path) -> Mixing | None:
    """Read and check the folder `mixing/` of a run; return None if it has no record.

    Raises:
        DataError: A file is unusable.
    """
    steps = dict(sorted(map(_read_step, folder.glob("step_*.json")), key=lambda record: record[0]))
    if not any(steps.values()):
        return None
    index = folder / "index.json"
    if not index.exists():
        return Mixing(steps)
    content = read_json(index, _INDEX, _REMEDY)
    keys, grid, parts = content["keys"], content["grid"], content["parts"]
    known = {term for layer in steps[max(steps)] for term in layer.terms}
    if unknown := {term for part in parts.values() for term in part["coefficients"]} - known:
        raise bad_file(index, f"names {min(unknown)!r}, which the last step does not have", _REMEDY)
    maps = _read_maps(folder / "maps.safetensors", parts, len(keys), grid[0] * grid[1])
    return Mixing(steps, tuple(keys), (grid[0], grid[1]), maps)


def sentences(label: str, mixing: Mixing) -> list[str]:
    """Return one sentence per part of the model about a run's coefficients at its last recorded step."""
    found = []
    for part in dict.fromkeys(layer.part for layer in mixing.last):
        layers = [layer for layer in mixing.last if layer.part == part]
        counts = Counter(layer.terms[int(np.argmax(layer.share))] for layer in layers).most_common()
        leaders = ", ".join(f"{term} in {count}" for term, count in counts)
        found.append(f"{label}, {part}: {_variation(layers)} Largest share: {leaders} of {len(layers)} layers.")
    return found


def _variation(layers: Sequence[Layer]) -> str:
    if not any(layer.token_adaptive for layer in layers):
        return "coefficients are learned constants."
    total = sum(len(layer.terms) for layer in layers)
    static = [
        f"{layer.name} {term}" for layer in layers for term, std in zip(layer.terms, layer.std, strict=True)
        if std < STATIC
    ]  # fmt: skip
    if static:
        return f"{len(static)} of {total} coefficients static ({first_of(static)})."
    spread = np.concatenate([layer.std for layer in layers])
    return f"no static coefficient, standard deviations over tokens {spread.min():.2g} to {spread.max():.2g}."


def _read_step(path: Path) -> tuple[int, tuple[Layer, ...]]:
    content = read_json(path, _STEP, _REMEDY)
    return content["step"], tuple(_layer(path, entry) for entry in content["layers"])


def _layer(path: Path, entry: Mapping[str, Any]) -> Layer:
    terms = tuple(entry["coefficients"])
    if any(len(entry[key]) != len(terms) for key in STATISTICS) or not terms:
        raise bad_file(path, f"{entry['layer']} needs one value per coefficient and statistic", _REMEDY)
    columns = {key: np.array(entry[key], dtype=np.float64) for key in STATISTICS}
    return Layer(entry["layer"], terms, entry["token_adaptive"], **columns)


def _read_maps(path: Path, parts: Mapping[str, Any], images: int, patches: int) -> dict[str, Maps]:
    try:
        tensors = load_file(path)
    except Exception as error:  # safetensors raises many types for a missing or broken file
        raise bad_file(path, f"cannot be read as float16 ({error})", _REMEDY) from error
    maps = {}
    for part, names in parts.items():
        layers, terms = tuple(names["layers"]), tuple(names["coefficients"])
        shares, wanted = tensors.get(f"{part}.shares"), (images, len(layers), patches, len(terms))
        if shares is None or shares.shape != wanted or shares.dtype.kind != "f":
            found = "nothing" if shares is None else f"{shares.dtype} {shares.shape}"
            raise bad_file(path, f"{part}.shares is {found}, expected float16 {wanted}", _REMEDY)
        maps[part] = Maps(layers, terms, shares.astype(np.float64))
    return maps
