"""Mixing maps: held-out images whose patches are tinted by the term with the largest share."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from moa_eval.page.charts import PALETTE
from moa_eval.training.comparison import Comparison
from moa_eval.training.mixing import Mixing, sentences
from moa_eval.training.runs import Run

MAPPED_IMAGES = 4
_LONGEST_SIDE = 96  # pixels of a map, so that tens of layers fit into one page
_OPACITY = (0.3, 0.85)  # of a tint: two equal terms, a single term
_COLOURS = 128  # of a map's file

Shown = Sequence[tuple[Run, Mixing]]


def shown_mixing(comparison: Comparison) -> Shown:
    """Return the shown run of every method that recorded its mixing."""
    runs = [method.shown_run for method in comparison.methods]
    return [(run, run.mixing) for run in runs if run.mixing is not None]


def term_colours(shown: Shown) -> dict[str, str]:
    """Return a colour "#rrggbb" per term, shared by the maps and figures of all methods.

    The palette's light colours come first, each followed by its twin for dark backgrounds.
    """
    terms = dict.fromkeys(term for _, mixing in shown for term in mixing.terms)
    both = [colour for twins in zip(*PALETTE, strict=True) for colour in twins]
    return {term: both[position % len(both)] for position, term in enumerate(terms)}


def mixing_content(comparison: Comparison) -> list[dict[str, Any]]:
    """Return what the page shows of each method that mixes.

    A row has run (its index), label, legend (term and colour), layers (names), images (key, original and cells: a map
    per layer, all as data URIs) and sentences.
    """
    shown = shown_mixing(comparison)
    colours = term_colours(shown)
    return [
        {
            "run": run.index,
            "label": run.label,
            "legend": [{"term": term, "colour": colours[term]} for term in mixing.terms],
            "layers": [layer for maps in (mixing.maps or {}).values() for layer in maps.layers],
            "images": _images(run, mixing, colours),
            "sentences": sentences(run.label, mixing),
        }
        for run, mixing in shown
    ]


def overlay(
    picture: Image.Image, shares: NDArray[np.float64], grid: tuple[int, int], colours: Sequence[str]
) -> Image.Image:
    """Tint every patch of a grey picture by the term with the largest share, more strongly the larger its lead.

    `shares` is (rows * columns, K) for the `grid` (rows, columns); a patch with NaN stays grey. `colours` are K colours
    "#rrggbb". The returned RGB image has at most 96 pixels a side.
    """
    picture = picture.convert("L").convert("RGB")
    picture.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
    known = np.isfinite(shares.sum(axis=1))
    shares = np.where(known[:, None], shares, 0.0)
    ordered = np.sort(shares, axis=1)
    lead = ordered[:, -1] - ordered[:, -2] if shares.shape[1] > 1 else np.ones(len(shares))
    low, high = _OPACITY
    opacity = np.where(known, low + (high - low) * np.clip(lead, 0, 1), 0.0)
    palette = np.array([list(bytes.fromhex(colour.removeprefix("#"))) for colour in colours])
    tints = palette[np.argmax(shares, axis=1)]
    rows, columns = (np.arange(side) * cells // side for side, cells in zip(picture.size[::-1], grid, strict=True))
    patch = rows[:, None] * grid[1] + columns[None, :]  # of each pixel
    weight = opacity[patch][..., None]
    blended = (1 - weight) * np.asarray(picture, dtype=np.float64) + weight * tints[patch]
    return Image.fromarray(np.rint(blended).astype(np.uint8))


def _images(run: Run, mixing: Mixing, colours: Mapping[str, str]) -> list[dict[str, Any]]:
    originals = {image.key: image.original for image in run.reconstructions}
    mapped = [(position, key) for position, key in enumerate(mixing.keys) if key in originals][:MAPPED_IMAGES]
    images = []
    for position, key in mapped:
        with Image.open(originals[key]) as opened:
            picture = opened.convert("RGB")
        cells = [
            _data_uri(overlay(picture, shares, mixing.grid, [colours[term] for term in maps.terms]))
            for maps in (mixing.maps or {}).values()
            for shares in maps.shares[position]
        ]
        picture.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
        images.append({"key": key, "original": _data_uri(picture), "cells": cells})
    return images


def _data_uri(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.quantize(_COLOURS, dither=Image.Dither.NONE).save(file, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"
