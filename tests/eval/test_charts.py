"""Drawing of figures as files and for the page."""

import io
import json
import re

import altair as alt
import numpy as np
import pytest
from PIL import Image

from moa_eval.page import charts

LABELS = ["a <b>", 'c "d" & e']


def dots():
    rows = [{"run": run, "label": LABELS[run], "x": x, "y": x * (run + 1)} for run in (0, 1) for x in (1, 2, 3)]
    colour = alt.Color("label:N").scale(charts.colours(LABELS))
    base = alt.Chart(alt.InlineData(values=rows)).encode(x="x:Q", y="y:Q", color=colour)
    return alt.layer(base.mark_line(clip=True), base.mark_point())


@pytest.fixture(scope="module")
def chart():
    return charts.draw("dots", 'Dots, "quoted" <&>', dots())


def test_png_shows_the_runs_that_are_on_at_first(chart):
    image = Image.open(io.BytesIO(chart.png)).convert("RGB")
    assert image.getpixel((0, 0)) == tuple(bytes.fromhex(charts.PAPER[1:]))
    for hidden in ([], [1]):
        drawn = charts.draw("dots", "One", dots(), hidden=hidden)
        pixels = np.asarray(Image.open(io.BytesIO(drawn.png)).convert("RGB"))
        second = (pixels == tuple(bytes.fromhex(charts.PALETTE[1][0][1:]))).all(-1)
        assert second.any(), "the legend names both runs"
        assert second[150:].any() == (not hidden)  # below the legend


def test_more_labels_than_colours_differ_in_shape():
    labels = [str(index) for index in range(20)]
    looks = zip(charts.colours(labels).to_dict()["range"], charts.shapes(labels).to_dict()["range"], strict=True)
    assert len(set(looks)) == 20


def test_colours_in_the_page_are_css_variables(chart):
    text = charts.live(chart)
    assert not re.search(r"#[0-9a-f]{6}\b", text)
    assert {"var(--ink)", "var(--paper)", "var(--series-0)"} <= set(re.findall(r"var\(--[a-z0-9-]+\)", text))


def test_scripts_are_safe_inside_a_script_element(chart):
    text, bundle = charts.live(chart), charts.javascript()
    (values,) = json.loads(text)["datasets"].values()
    assert "<" not in text and {row["label"] for row in values} == set(LABELS)
    assert "vegaEmbed" in bundle and "</script" not in bundle.lower() and "<!--" not in bundle
