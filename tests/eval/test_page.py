"""The page, in headless Chromium where it is installed."""

import base64
import json
import re
import shutil
import subprocess
from dataclasses import replace

import altair as alt
import pytest

from moa_eval.page import charts
from moa_eval.page.writing import Section, Series, write_page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
GROUPS = ("base", "mixture", "mixture", "other")  # of the four runs; run 2 is off at first

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH")


def small_section(slug="zero-shot"):
    """Return a section with one table, one figure of four runs, and a long command."""
    labels = [f"{group} {run}" for run, group in enumerate(GROUPS)]
    rows = [
        {"run": run, "group": GROUPS.index(group), "ffn": group, "x": x, "y": (run + 1) * x}
        for run, group in enumerate(GROUPS)
        for x in (1, 2)
    ]
    colour = alt.Color("ffn:N").scale(charts.colours([*dict.fromkeys(GROUPS)]))
    lines = alt.Chart(alt.InlineData(values=rows)).mark_line().encode(x="x:Q", y="y:Q", detail="run:N", color=colour)
    cells = [
        {
            "label": "a task", "average": False, "extra": False, "size": 40, "shots": 0,
            "lines": [{"metric": "acc", "scores": [f"{50 + run}.00" for run in range(4)]}],
        }
    ]  # fmt: skip
    return Section(
        slug=slug,
        title=f"Section {slug}",
        template="zero_shot",
        content={
            "labels": labels, "cells": cells, "average_of": "", "tests": [], "differences": [],
            "resamples": 1000, "seed": 0,
        },
        tables={"zero_shot": [{"task": "a task", "value": 0.5}]},
        charts={"accuracy": charts.draw("accuracy", "Lines", alt.layer(lines), hidden=[2])},
        verdict=["No difference."],
        caveats=["Made by hand."],
        series=[Series(labels[run], group, GROUPS.index(group), run != 2) for run, group in enumerate(GROUPS)],
    )  # fmt: skip


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return write_page([small_section()], tmp_path_factory.mktemp("page"), title="One <page>", command="a script")


def files(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_a_section_is_written_as_page_summary_tables_and_figures(page):
    assert files(page.parent) == {
        "index.html", "summary.md", "tables/zero_shot.csv", "figures/accuracy.png",
    }  # fmt: skip
    assert "<title>One &lt;page&gt;</title>" in page.read_text()
    assert (page.parent / "summary.md").read_text().startswith("# One <page>\n\n**No difference.**\n\n- Made by hand.")


def test_sections_of_a_page_have_unique_ids_and_folders(tmp_path):
    section = small_section("a")
    page = write_page([section, replace(section, slug="b")], tmp_path, title="Two", command="a script")
    text = page.read_text()
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids)) and {"a", "b", "a-scores", "b-scores", "a-verdict"} <= set(ids)
    assert set(re.findall(r'href="#([^"]+)"', text)) <= set(ids)
    links = set(re.findall(r'href="([^"#]+)" download', text))
    assert {"figures/b/accuracy.png", "tables/a/zero_shot.csv"} <= links <= files(tmp_path)
    assert text.count("vegaEmbed=") == 1
    assert (tmp_path / "summary.md").read_text().count("## Section a") == 2


def test_figures_and_tables_of_an_earlier_page_are_removed(tmp_path):
    section = small_section()
    write_page([section, replace(section, slug="b")], tmp_path, title="Two", command="a script")
    (tmp_path / "figures/notes.txt").touch()
    write_page([section], tmp_path, title="One", command="a script")
    assert files(tmp_path) == {
        "index.html", "summary.md", "tables/zero_shot.csv", "figures/accuracy.png", "figures/notes.txt",
    }  # fmt: skip


SCRIPT = """
<script>
const errors = [];
addEventListener("error", (event) => errors.push(event.message));
console.error = (...words) => errors.push(words.join(" "));
async function report() {
  while (document.documentElement.dataset.ready !== "") await new Promise((next) => setTimeout(next, 20));
  const result = await (async () => { %s })();
  const place = document.createElement("pre");
  place.id = "result";
  place.textContent = btoa(JSON.stringify({ errors, result }));
  document.body.append(place);
}
addEventListener("load", report);
const lines = () => [...document.querySelectorAll(".plot .mark-line.role-mark path")];
const pause = () => new Promise((next) => setTimeout(next, 200));
const click = async (what, value) => {
  document.querySelector(`input[data-switch=${what}][value="${value}"]`).click();
  await pause();
};
</script>
</head>"""


def evaluate(page, script, *flags):
    """Return what a script returns in a copy of the page."""
    copy = page.with_name("copy.html")
    copy.write_text(page.read_text().replace("</head>", SCRIPT % script, 1))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=20000", "--dump-dom"]
    done = subprocess.run([*command, *flags, copy.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    copy.unlink()
    found = re.search(r'<pre id="result">([^<]+)<', done.stdout)
    result = json.loads(base64.b64decode(found[1]))
    assert result["errors"] == []
    return result["result"]


@needs_chromium
@pytest.mark.parametrize("width", [500, 1400])
def test_the_page_fits_the_window(page, width):
    beyond = (
        "return [innerWidth, [...document.querySelectorAll('main *')].filter(e => e.getBoundingClientRect().right > "
        "innerWidth + 1 && !e.closest('.scroll') && !e.closest('svg')).length, "
        "document.querySelector('.switches').open];"
    )
    found, overflowing, is_open = evaluate(page, beyond, f"--window-size={width},900")
    assert (found, overflowing, is_open) == (width, 0, width > 600)


@needs_chromium
def test_a_switch_hides_a_run_and_rescales_the_axes(page):
    script = """
        const labels = () => [...document.querySelectorAll(".plot .role-axis-label text")];
        const state = () => [lines().length, Math.max(...labels().map(label => Number(label.textContent)))];
        const before = state();
        await click("run", 3);
        const cells = [...document.querySelectorAll('[data-run="3"]')];
        const group = document.querySelector('input[data-switch=group][value="2"]');
        return [before, state(), cells.filter(cell => cell.getClientRects().length).length, group.checked];
    """
    before, after, visible, group = evaluate(page, script)
    assert (before, after, visible, group) == ([3, 8], [2, 4], 0, False)


@needs_chromium
def test_a_group_switch_restores_the_initial_runs(page):
    states = "[...document.querySelectorAll('input[data-switch=run]')].map(box => box.checked)"
    off, on = evaluate(
        page, f"await click('group', 1); const off = {states}; await click('group', 1); return [off, {states}];"
    )
    assert (off, on) == ([True, False, False, True], [True, True, False, True])


@needs_chromium
def test_figures_follow_the_dark_colour_scheme(page):
    flag = "--blink-settings=preferredColorScheme=0"
    strokes = evaluate(page, "return lines().map(path => getComputedStyle(path).stroke);", flag)
    found = {tuple(map(int, re.findall(r"\d+", stroke))) for stroke in strokes}
    assert found == {tuple(bytes.fromhex(pair[1][1:])) for pair in charts.PALETTE[:3]}
