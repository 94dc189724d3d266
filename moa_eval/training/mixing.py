"""Recorded mixing coefficients of a run: its folder `mixing/`.

A coefficient whose standard deviation over tokens is below `STATIC` is a static blend: it may be learned, but it does
not depend on the token. The share of a term is the RMS over the hidden width of c_kl f_k(a) g_l(b), divided by the
sum of these over all terms.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from moa_eval.page.formatting import first_of
from moa_eval.page.writing import Row
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
class Maps:
    """Shares in one part of the model at the last recorded step, for its L layers and K terms.

    `shares` is (images, L, rows * columns, K); NaN for a token that was not computed.
    """

    layers: tuple[str, ...]
    terms: tuple[str, ...]
    shares: Values


@dataclass(frozen=True)
class Mixing:
    """Recorded mixing of a run.

    Attributes:
        rows: A row per recorded step, layer and coefficient, over all tokens of the recorded images or texts: mean,
            standard deviation, 5th and 95th percentile ("low", "high"), and the mean share of the term in the sum.
            Learned constants (LA), which are equal for all tokens, are not "token_adaptive".
        keys, grid: Keys of the mapped images (empty without maps), and their rows and columns of patches.
        maps: Maps by part of the model.
    """

    rows: Sequence[Row]
    keys: tuple[str, ...] = ()
    grid: tuple[int, int] = (0, 0)
    maps: Mapping[str, Maps] | None = None

    @property
    def last(self) -> list[Row]:
        """The rows of the last recorded step."""
        return [row for row in self.rows if row["step"] == self.rows[-1]["step"]]

    @property
    def terms(self) -> list[str]:
        """The terms of all layers at the last recorded step, such as "g·id", in order of appearance."""
        return [*dict.fromkeys(row["coefficient"] for row in self.last)]


def read_mixing(folder: Path) -> Mixing | None:
    """Read and check the folder `mixing/` of a run; return None if it has no record.

    Raises:
        DataError: A file is unusable.
    """
    rows = [row for path in folder.glob("step_*.json") for row in _read_step(path)]
    if not rows:
        return None
    mixing = Mixing(sorted(rows, key=lambda row: row["step"]))
    index = folder / "index.json"
    if not index.exists():
        return mixing
    content = read_json(index, _INDEX, _REMEDY)
    keys, grid, parts = content["keys"], content["grid"], content["parts"]
    if unknown := {term for part in parts.values() for term in part["coefficients"]} - {*mixing.terms}:
        raise bad_file(index, f"names {min(unknown)!r}, which the last step does not have", _REMEDY)
    maps = _read_maps(folder / "maps.safetensors", parts, len(keys), grid[0] * grid[1])
    return replace(mixing, keys=tuple(keys), grid=(grid[0], grid[1]), maps=maps)


def sentences(label: str, mixing: Mixing) -> list[str]:
    """Return one sentence per part of the model ("encoder" of "encoder.0") about the last recorded step of a run."""
    parts: dict[str, dict[str, list[Row]]] = {}
    for row in mixing.last:
        parts.setdefault(row["layer"].split(".")[0], {}).setdefault(row["layer"], []).append(row)
    found = []
    for part, layers in parts.items():
        counts = Counter(max(rows, key=lambda row: row["share"])["coefficient"] for rows in layers.values())
        leaders = ", ".join(f"{term} in {count}" for term, count in counts.most_common())
        variation = _variation([row for rows in layers.values() for row in rows])
        found.append(f"{label}, {part}: {variation} Largest share: {leaders} of {len(layers)} layers.")
    return found


def _variation(rows: Sequence[Row]) -> str:
    if not any(row["token_adaptive"] for row in rows):
        return "coefficients are learned constants."
    if static := [f"{row['layer']} {row['coefficient']}" for row in rows if row["static"]]:
        return f"{len(static)} of {len(rows)} coefficients static ({first_of(static)})."
    spread = [row["std"] for row in rows]
    return f"no static coefficient, standard deviations over tokens {min(spread):.2g} to {max(spread):.2g}."


def _read_step(path: Path) -> Iterator[Row]:
    content = read_json(path, _STEP, _REMEDY)
    for entry in content["layers"]:
        terms = entry["coefficients"]
        if any(len(entry[key]) != len(terms) for key in STATISTICS) or not terms:
            raise bad_file(path, f"{entry['layer']} needs one value per coefficient and statistic", _REMEDY)
        for at, term in enumerate(terms):
            where = {"step": content["step"], "layer": entry["layer"], "coefficient": term}
            values = {key: float(entry[key][at]) for key in STATISTICS}
            adaptive = {"token_adaptive": entry["token_adaptive"]}
            yield where | adaptive | values | {"static": values["std"] < STATIC}


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
