"""How the tokens of a run mix: what its folder `mixing/` holds, which coefficients never vary, and maps over images.

A coefficient whose standard deviation over the tokens is below `STATIC` is a static blend: it may be learned, but no
token chooses it. A term's share is its part of the sum c_kl f_k(a) g_l(b): the RMS over the hidden width of the term,
divided by the sum of these over all terms.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError
from safetensors.numpy import load_file

from moa_eval.page.charts import PALETTE
from moa_eval.training.comparison import Comparison
from moa_eval.training.reading import broken, read_json
from moa_eval.training.runs import Reconstruction

STATIC = 0.01  # a gate lies between 0 and 1 (-1 and 1 for tanh): below a hundredth no token departs from the blend
MAPPED_IMAGES = 4
_LONGEST_SIDE = 96  # pixels of a map: 20 layers of 4 images of 5 contenders have to fit into one page
_OPACITY = (0.3, 0.85)  # of a patch's colour: when two terms are equal, and when one is all there is
_COLOURS = 128  # of a map's file
_NAMED = 4  # static blends named in a sentence; tables/mixing.csv has all
_REMEDY = "delete the folder or leave this run out"

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Layer:
    """One layer's coefficients over all tokens of the shown images at one step.

    Attributes:
        name: Such as "encoder.0".
        terms: K names, such as "g·id".
        token_adaptive: False for learned constants (LA), which are the same for all tokens.
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
        """What the layer belongs to: "encoder", "decoder" or "model"."""
        return self.name.split(".")[0]

    @property
    def static(self) -> list[str]:
        """The coefficients that are static blends."""
        return [term for term, deviation in zip(self.terms, self.std, strict=True) if deviation < STATIC]


@dataclass(frozen=True)
class Maps:
    """Shares of one part on the shown images, at the last recorded step.

    Attributes:
        layers, terms: As `Layer` has them.
        shares: (N, layers, rows * columns, K); NaN where a token was not computed.
    """

    layers: tuple[str, ...]
    terms: tuple[str, ...]
    shares: Values


@dataclass(frozen=True)
class Mixing:
    """What a run recorded of its mixing.

    Attributes:
        steps: Its layers by training step, in rising order.
        keys: Names of the N shown images; empty where there are no maps.
        grid: Rows and columns of patches.
        maps: By part.
    """

    steps: dict[int, tuple[Layer, ...]]
    keys: tuple[str, ...]
    grid: tuple[int, int]
    maps: dict[str, Maps]

    @property
    def last(self) -> tuple[Layer, ...]:
        """The layers at the last recorded step."""
        return self.steps[max(self.steps)]

    @property
    def terms(self) -> list[str]:
        """What is mixed anywhere at the last recorded step, in the order of appearance."""
        return [*dict.fromkeys(term for layer in self.last for term in layer.terms)]


def read_all(comparison: Comparison) -> dict[int, Mixing]:
    """What the runs recorded, by their position; runs without mixing are left out.

    Raises:
        RunFolderError: A file is broken.
    """
    read = {index: read_mixing(run.folder / "mixing") for index, run in enumerate(comparison.runs)}
    return {index: mixing for index, mixing in read.items() if mixing is not None}


def read_mixing(folder: Path) -> Mixing | None:
    """Read and check a run's folder `mixing/`; None if it has none.

    Raises:
        RunFolderError: A file is broken.
    """
    steps = dict(sorted((_read_step(path) for path in folder.glob("step_*.json")), key=lambda entry: entry[0]))
    if not any(steps.values()):
        return None
    index = folder / "index.json"
    if not index.exists():
        return Mixing(steps, (), (0, 0), {})
    content = read_json(index)
    try:
        keys, (rows, columns) = tuple(map(str, content["keys"])), map(int, content["grid"])
        parts = {
            str(part): (_names(own["layers"]), _names(own["coefficients"])) for part, own in content["parts"].items()
        }
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise broken(index, f"not the index of a mixing folder ({error!r})", _REMEDY) from None
    known = {term for layer in steps[max(steps)] for term in layer.terms}
    if strange := {term for _, terms in parts.values() for term in terms} - known:
        raise broken(index, f"names {min(strange)!r}, which the last step does not have", _REMEDY)
    maps = _read_maps(folder / "maps.safetensors", parts, (len(keys), rows * columns))
    return Mixing(steps, keys, (rows, columns), maps)


def sentences(label: str, mixing: Mixing) -> list[str]:
    """What a run's mixing comes to at its last recorded step, one sentence a part."""
    found = []
    for part in dict.fromkeys(layer.part for layer in mixing.last):
        layers = [layer for layer in mixing.last if layer.part == part]
        found.append(f"{label}, {part}: {_variation(layers)} {_leaders(layers)}")
    return found


def term_colours(mixings: Mapping[int, Mixing]) -> dict[str, str]:
    """A colour "#rrggbb" a term, the same wherever it occurs, so that maps and figures of all FFNs can be compared.

    The palette's light colours, from the ninth term on their twins for dark ground, then both again.
    """
    terms = dict.fromkeys(term for mixing in mixings.values() for term in mixing.terms)
    both = [own for twins in zip(*PALETTE, strict=True) for own in twins]
    return {term: both[position % len(both)] for position, term in enumerate(terms)}


def sections(comparison: Comparison, mixings: Mapping[int, Mixing]) -> list[dict[str, Any]]:
    """For the best run of every contender that mixes: its maps over the first images, with legend and sentences.

    Returns:
        Dictionaries with run, label, legend (term and colour), layers (names), images (key, original and cells: one
        map per layer, all of them data URIs) and sentences.
    """
    shown = comparison.of_best_runs(mixings)
    colours = term_colours(shown)
    return [
        {
            "run": run,
            "label": comparison.labels[run],
            "legend": [{"term": term, "colour": colours[term]} for term in mixing.terms],
            "layers": [layer for maps in mixing.maps.values() for layer in maps.layers],
            "images": _images(mixing, comparison.runs[run].reconstructions, colours),
            "sentences": sentences(comparison.labels[run], mixing),
        }
        for run, mixing in shown.items()
    ]


def overlay(picture: Image.Image, shares: Values, grid: tuple[int, int], colours: Sequence[str]) -> Image.Image:
    """A picture in grey, every patch tinted by the term with the largest share: the stronger, the further it leads.

    Args:
        picture: Any mode; made smaller if a side is longer than 96 pixels.
        shares: (rows * columns, K); a patch with NaN is left grey.
        grid: Rows and columns of patches.
        colours: K colours as "#rrggbb".

    Returns:
        An RGB image.
    """
    picture = picture.convert("L").convert("RGB")
    picture.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
    known = np.isfinite(shares.sum(axis=1))
    shares = np.where(known[:, None], shares, 0.0)
    ordered = np.sort(shares, axis=1)
    lead = ordered[:, -1] - ordered[:, -2] if shares.shape[1] > 1 else np.ones(len(shares))
    low, high = _OPACITY
    opacity = np.where(known, low + (high - low) * np.clip(lead, 0, 1), 0.0)
    palette = np.array([_rgb(colour) for colour in colours])
    tints = palette[np.argmax(shares, axis=1)]
    # Position of the patch that each pixel belongs to.
    at_y, at_x = (np.arange(side) * cells // side for side, cells in zip(picture.size[::-1], grid, strict=True))
    patch = at_y[:, None] * grid[1] + at_x[None, :]
    weight = opacity[patch][..., None]
    blended = (1 - weight) * np.asarray(picture, dtype=np.float64) + weight * tints[patch]
    return Image.fromarray(np.rint(blended).astype(np.uint8))


def _read_step(path: Path) -> tuple[int, tuple[Layer, ...]]:
    content = read_json(path)
    try:
        return int(content["step"]), tuple(_layer(entry) for entry in content["layers"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise broken(path, f"not a record of mixing ({error!r})", _REMEDY) from None


def _names(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise TypeError(f"{value!r} is no list of names")
    return tuple(value)


def _layer(entry: Mapping[str, Any]) -> Layer:
    terms = tuple(map(str, entry["coefficients"]))
    columns = {key: np.array(entry[key], dtype=np.float64) for key in ("mean", "std", "low", "high", "share")}
    for key, values in columns.items():
        if values.shape != (len(terms),):
            raise ValueError(f"{key} of {entry['layer']} has {values.size} values for {len(terms)} coefficients")
    return Layer(str(entry["layer"]), terms, bool(entry["token_adaptive"]), **columns)


def _read_maps(
    path: Path, parts: Mapping[str, tuple[Sequence[str], Sequence[str]]], size: tuple[int, int]
) -> dict[str, Maps]:
    try:
        tensors = load_file(path)
    except FileNotFoundError:
        raise broken(path, "missing, but index.json describes it", _REMEDY) from None
    except (OSError, SafetensorError) as error:
        raise broken(path, f"not a safetensors file ({error})", _REMEDY) from None
    except (AttributeError, TypeError) as error:  # a type that NumPy has not
        raise broken(path, f"not a file of float16 ({error})", _REMEDY) from None
    maps = {}
    for part, (layers, terms) in parts.items():
        shares = tensors.get(f"{part}.shares")
        images, patches = size
        if shares is None or shares.shape != (images, len(layers), patches, len(terms)):
            found = "nothing" if shares is None else shares.shape
            wanted = (images, len(layers), patches, len(terms))
            raise broken(path, f"{part}.shares should have the shape {wanted} (found {found})", _REMEDY)
        if not np.issubdtype(shares.dtype, np.floating):
            raise broken(path, f"{part}.shares should be float16 (found {shares.dtype})", _REMEDY)
        maps[part] = Maps(tuple(layers), tuple(terms), shares.astype(np.float64))
    return maps


def _variation(layers: Sequence[Layer]) -> str:
    if not any(layer.token_adaptive for layer in layers):
        return "the coefficients are learned constants, the same for all tokens."
    total = sum(len(layer.terms) for layer in layers)
    static = [f"{layer.name} {term}" for layer in layers for term in layer.static]
    if not static:
        spread = np.concatenate([layer.std for layer in layers])
        return (
            f"all {total} coefficients vary from token to token "
            f"(standard deviations {spread.min():.2g} to {spread.max():.2g})."
        )
    more = f" and {len(static) - _NAMED} more" if len(static) > _NAMED else ""
    verb = "is a static blend" if len(static) == 1 else "are static blends"
    return f"{len(static)} of {total} coefficients {verb} ({', '.join(static[:_NAMED])}{more})."


def _leaders(layers: Sequence[Layer]) -> str:
    leaders = [layer.terms[int(np.argmax(layer.share))] for layer in layers]
    counted = {term: leaders.count(term) for term in sorted(set(leaders), key=lambda term: -leaders.count(term))}
    parts = [f"{term} in {number}" for term, number in counted.items()]
    return f"Largest share: {', '.join(parts)} of {len(layers)} {'layer' if len(layers) == 1 else 'layers'}."


def _images(
    mixing: Mixing, reconstructions: Sequence[Reconstruction], colours: Mapping[str, str]
) -> list[dict[str, Any]]:
    originals = {image.key: image.original for image in reconstructions}
    images = []
    for position, key in enumerate(mixing.keys):
        if key not in originals or len(images) == MAPPED_IMAGES:
            continue
        with Image.open(originals[key]) as opened:
            picture = opened.convert("RGB")
        cells = [
            _data_uri(overlay(picture, shares, mixing.grid, [colours[term] for term in maps.terms]))
            for maps in mixing.maps.values()
            for shares in maps.shares[position]
        ]
        picture.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
        images.append({"key": key, "original": _data_uri(picture), "cells": cells})
    return images


def _data_uri(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.quantize(_COLOURS, dither=Image.Dither.NONE).save(file, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"


def _rgb(colour: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(colour.removeprefix("#")))
