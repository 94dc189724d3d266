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


def dots(runs=(0, 1)):
    rows = [
        {"run": run, "group": run, "label": LABELS[run], "x": x, "y": x * (run + 1)} for run in runs for x in (1, 2, 3)
    ]
    base = alt.Chart(alt.InlineData(values=rows)).encode(
        x="x:Q", y="y:Q", color=alt.Color("label:N").scale(charts.colours(LABELS))
    )
    pointed = base.mark_point(clip=True).properties(name=f"{charts.POINTER}_all")
    return alt.layer(base.mark_line(clip=True), pointed)


@pytest.fixture(scope="module")
def chart():
    return charts.draw("dots", 'Dots, "quoted" <&>', dots())


def lines(svg):
    """The colours of the lines in an SVG, legend left out."""
    root = ElementTree.fromstring(svg)
    return [
        path.get("stroke")
        for group in root.iter(f"{SVG}g")
        if "mark-line" in group.get("class", "") and "role-mark" in group.get("class", "")
        for path in group.iter(f"{SVG}path")
    ]


def test_svg_and_png_are_complete_files(chart):
    with Image.open(io.BytesIO(chart.png)) as image:
        size = image.size
        corner = image.convert("RGB").getpixel((0, 0))
    root = ElementTree.fromstring(chart.svg)
    assert size == tuple(2 * round(float(root.get(side))) for side in ("width", "height"))
    assert corner == tuple(bytes.fromhex(charts.PAPER[1:]))
    assert 'Dots, "quoted" <&>' in "".join(root.itertext())
    assert lines(chart.svg) == [charts.PALETTE[0][0], charts.PALETTE[1][0]]


def test_files_omit_the_layers_of_the_pointer(chart):
    assert len(chart.spec["layer"]) == 2
    assert "mark-symbol role-mark" not in chart.svg


def test_hidden_runs_do_not_set_the_scale(chart):
    one = charts.draw("dots", "One", dots(), hidden=[1])
    assert lines(one.svg) == [charts.PALETTE[0][0]]
    pattern = re.compile(r"Y-axis titled 'y' for a linear scale with values from [\d.]+ to ([\d.]+)")
    tops = [pattern.search(own.svg) for own in (chart, one)]
    assert [float(top[1]) for top in tops] == [6, 3]


def test_drawing_is_reproducible(chart):
    again = charts.draw("dots", chart.title, dots())
    assert (again.svg, again.png, again.spec) == (chart.svg, chart.png, chart.spec)


def test_colours_in_the_page_are_css_variables(chart):
    for text in (charts.live(chart), charts.still(chart, "p-")):
        assert not re.search(r"#[0-9a-f]{6}\b", text), "a colour that the page cannot change"
        assert {f"var(--{token})" for token in ("ink", "muted", "paper", "series-0", "series-1")} <= set(
            re.findall(r"var\(--[a-z0-9-]+\)", text)
        )


def test_live_charts_are_safe_inside_a_script_element(chart):
    text = charts.live(chart)
    assert "<" not in text
    spec = json.loads(text)
    (values,) = spec["datasets"].values()
    assert {row["label"] for row in values} == set(LABELS)
    assert "title" not in spec, "the page shows the title, since Vega cannot wrap it"


def test_still_charts_have_unique_ids(chart):
    root = ElementTree.fromstring(charts.still(chart, "p-"))
    ids = {element.get("id") for element in root.iter() if element.get("id")}
    assert ids and all(name.startswith("p-") for name in ids)
    assert set(re.findall(r"url\(#([^)]+)\)", charts.still(chart, "p-"))) <= ids
    assert root.get("aria-label") == chart.title


def test_the_bundle_is_safe_inside_a_script_element():
    bundle = charts.javascript()
    assert "vegaEmbed" in bundle
    assert "</script" not in bundle.lower() and "<!--" not in bundle
    assert charts.javascript() is bundle


def luminance(colour):
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return np.dot(linear, [0.2126, 0.7152, 0.0722])


@pytest.mark.parametrize(("ground", "theme"), [("#fffefc", 0), ("#15181d", 1)])
def test_lines_have_enough_contrast(ground, theme):
    """WCAG 2.1, 1.4.11: graphics have a contrast of at least 3 to 1."""
    for colours in charts.PALETTE:
        low, high = sorted([luminance(ground), luminance(colours[theme])])
        assert (high + 0.05) / (low + 0.05) >= 3


def test_colours_and_shapes_repeat_beyond_the_palette():
    many = [str(index) for index in range(len(charts.PALETTE) + 1)]
    colours, shapes = charts.colours(many).to_dict()["range"], charts.shapes(many).to_dict()["range"]
    assert len(set(colours[:-1])) == len(many) - 1 and colours[-1] == colours[0]
    assert len(set(shapes[:-1])) == len(many) - 1 and shapes[-1] == shapes[0]
