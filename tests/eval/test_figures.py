import io
import re
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
import pytest
from PIL import Image

from moa_eval.training import figures as plots
from moa_eval.training.comparison import compare
from moa_eval.training.runs import read_run

MOA = "vit_tiny_patch4_qdmoa"


@pytest.fixture(scope="module")
def drawn(tmp_path_factory, write_run_into):
    root = tmp_path_factory.mktemp("plots")
    folders = [write_run_into(root, "a", steps=120), write_run_into(root, "b", steps=120, encoder=MOA, nan_from=95)]
    before = dict(mpl.rcParams)
    result = plots.draw(compare([read_run(folder) for folder in folders]))
    assert dict(mpl.rcParams) == before
    return result


def test_every_figure_is_drawn_as_svg_and_png(drawn):
    assert list(drawn) == [
        "validation_loss", "validation_difference", "validation_loss_pixel", "train_loss",
        "validation_loss_time", "train_loss_time",
    ]  # fmt: skip
    for plot in drawn.values():
        assert ElementTree.fromstring(plot.svg).tag == "{http://www.w3.org/2000/svg}svg"
        with Image.open(io.BytesIO(plot.png)) as image:
            assert image.size == (860, 600)


def test_a_page_can_hold_all_figures_and_retint_them(drawn):
    ids = []
    for plot in drawn.values():
        assert not re.search(r"#[0-9a-f]{6}\b", plot.inline), "a colour that the page cannot change"
        assert "xmlns" not in plot.inline and "<style" not in plot.inline
        root = ElementTree.fromstring(plot.inline)
        own = [element.get("id") for element in root.iter() if element.get("id")]
        references = re.findall(r"url\(#([^)]+)\)", plot.inline) + re.findall(r'href="#([^"]+)"', plot.inline)
        assert references and set(references) <= set(own)
        ids += own
        assert {element.get("data-run") for element in root.iter()} - {None} <= {"0", "1"}
        assert root.get("aria-label") == plot.title
    assert len(ids) == len(set(ids))


def test_a_curve_passes_through_its_values(tmp_path, write_run_into):
    """Both coordinates of the path's vertices are linear in the values; the first one lies above the frame."""
    run = read_run(write_run_into(tmp_path, "a", steps=120))
    root = ElementTree.fromstring(plots.draw(compare([run]))["validation_loss"].inline)
    (line,) = [element for element in root.iter() if element.get("data-run") == "0"]
    path = next(element for element in line.iter() if element.tag == "path").get("d", "")
    points = np.array([[float(number) for number in pair] for pair in re.findall(r"[ML] (\S+) (\S+)", path)])[1:]
    for axis, column, direction in ((0, "samples", 1), (1, "loss_norm", -1)):
        values = run.validation[column][1:]
        slope, offset = np.polyfit(values, points[:, axis], 1)
        assert np.sign(slope) == direction
        np.testing.assert_allclose(points[:, axis], slope * values + offset, atol=1e-4)


def test_one_run_has_no_difference_and_a_run_without_rows_has_no_figure(make_run):
    assert "validation_difference" not in plots.draw(compare([read_run(make_run("a"))]))
    folder = make_run("empty", status=None)
    (folder / "metrics.jsonl").write_text("")
    assert plots.draw(compare([read_run(folder)])) == {}


@pytest.mark.parametrize("size", [1, 49, 50, 99, 100, 333])
def test_smoothing_is_the_mean_of_the_window(size):
    values = np.random.default_rng(size).normal(size=size)
    values[size // 2] = np.nan
    half = size // 50
    expected = [
        np.nan if np.isnan(values[i]) else np.nanmean(values[max(0, i - half) : i + half + 1]) for i in range(size)
    ]
    np.testing.assert_allclose(plots.smooth(values), expected, atol=1e-12)


def luminance(colour):
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return np.dot(linear, [0.2126, 0.7152, 0.0722])


@pytest.mark.parametrize(("ground", "theme"), [("#fffefc", 0), ("#15181d", 1)])
def test_lines_stand_out_from_the_page(ground, theme):
    """WCAG 2.1, 1.4.11: graphics have a contrast of at least 3 to 1."""
    for colours in plots.PALETTE:
        low, high = sorted([luminance(ground), luminance(colours[theme])])
        assert (high + 0.05) / (low + 0.05) >= 3
