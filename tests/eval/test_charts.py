"""Drawing of figures as files and for the page."""

import io
import json
import re
from xml.etree import ElementTree

import altair as alt
import numpy as np
import pytest
from PIL import Image

from moa_eval.page import charts

LABELS = ["a <b>", 'c "d" & e']
SVG = "{http://www.w3.org/2000/svg}"


def dots():
    rows = [{"run": run, "label": LABELS[run], "x": x, "y": x * (run + 1)} for run in (0, 1) for x in (1, 2, 3)]
    colour = alt.Color("label:N").scale(charts.colours(LABELS))
    base = alt.Chart(alt.InlineData(values=rows)).encode(x="x:Q", y="y:Q", color=colour)
    return alt.layer(base.mark_line(clip=True), base.mark_point().properties(name=f"{charts.POINTER}_all"))


@pytest.fixture(scope="module")
def chart():
    return charts.draw("dots", 'Dots, "quoted" <&>', dots())


def lines(svg):
    """Return the colours of the lines in an SVG, without the legend."""
    groups = [group for group in ElementTree.fromstring(svg).iter(f"{SVG}g") if "role-mark" in group.get("class", "")]
    return [
        path.get("stroke") for group in groups if "mark-line" in group.get("class") for path in group.iter(f"{SVG}path")
    ]


def test_svg_and_png_are_complete_files_without_the_layers_of_the_pointer(chart):
    image, root = Image.open(io.BytesIO(chart.png)), ElementTree.fromstring(chart.svg)
    assert image.size == tuple(2 * round(float(root.get(side))) for side in ("width", "height"))
    assert image.convert("RGB").getpixel((0, 0)) == tuple(bytes.fromhex(charts.PAPER[1:]))
    assert 'Dots, "quoted" <&>' in "".join(root.itertext())
    assert lines(chart.svg) == [charts.PALETTE[0][0], charts.PALETTE[1][0]]
    assert len(chart.spec["layer"]) == 2 and "mark-symbol role-mark" not in chart.svg


def test_hidden_runs_do_not_set_the_scale(chart):
    one = charts.draw("dots", "One", dots(), hidden=[1])
    assert lines(one.svg) == [charts.PALETTE[0][0]]
    pattern = re.compile(r"Y-axis titled 'y' for a linear scale with values from [\d.]+ to ([\d.]+)")
    assert [float(pattern.search(own.svg)[1]) for own in (chart, one)] == [6, 3]


def test_drawing_is_reproducible(chart):
    again = charts.draw("dots", chart.title, dots())
    assert (again.svg, again.png, again.spec) == (chart.svg, chart.png, chart.spec)


def test_colours_in_the_page_are_css_variables(chart):
    for text in (charts.live(chart), charts.still(chart, "p-")):
        assert not re.search(r"#[0-9a-f]{6}\b", text)
        assert {"var(--ink)", "var(--paper)", "var(--series-0)"} <= set(re.findall(r"var\(--[a-z0-9-]+\)", text))


def test_scripts_are_safe_inside_a_script_element(chart):
    text, bundle = charts.live(chart), charts.javascript()
    (values,) = json.loads(text)["datasets"].values()
    assert "<" not in text and {row["label"] for row in values} == set(LABELS)
    assert "vegaEmbed" in bundle and "</script" not in bundle.lower() and "<!--" not in bundle


def test_still_charts_have_unique_ids(chart):
    still = charts.still(chart, "p-")
    root = ElementTree.fromstring(still)
    ids = {element.get("id") for element in root.iter() if element.get("id")}
    assert ids and all(name.startswith("p-") for name in ids)
    assert set(re.findall(r"url\(#([^)]+)\)", still)) <= ids
    assert root.get("aria-label") == chart.title


def luminance(colour):
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return np.dot(linear, [0.2126, 0.7152, 0.0722])


@pytest.mark.parametrize(("ground", "theme"), [("#fffefc", 0), ("#15181d", 1)])
def test_lines_have_the_contrast_of_wcag(ground, theme):
    """WCAG 2.1, 1.4.11: graphics have a contrast of at least 3 to 1."""
    for colours in charts.PALETTE:
        low, high = sorted([luminance(ground), luminance(colours[theme])])
        assert (high + 0.05) / (low + 0.05) >= 3


def test_colours_and_shapes_repeat_beyond_the_palette():
    many = [str(index) for index in range(len(charts.PALETTE) + 1)]
    for scale in (charts.colours(many), charts.shapes(many)):
        values = scale.to_dict()["range"]
        assert len(set(values[:-1])) == len(many) - 1 and values[-1] == values[0]
