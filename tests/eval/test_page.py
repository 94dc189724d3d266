"""The page in a browser: headless Chromium, driven through its DevTools protocol over a pipe."""

import base64
import fcntl
import hashlib
import io
import itertools
import json
import os
import re
import shutil
import subprocess
import time
from dataclasses import replace

import altair as alt
import numpy as np
import pytest
from PIL import Image

from moa_eval.page import charts
from moa_eval.page.writing import Section, Series, write_page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--hide-scrollbars", "--remote-debugging-pipe",
)  # fmt: skip
WIDTHS = (380, 820, 1400)
GROUPS = ("base", "mixture", "mixture", "other")  # of the four runs; run 2 is off at first
PATIENCE_S = 60

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH")


class Browser:
    """One tab at a time. Commands go through the browser's file descriptor 3, answers come from its 4."""

    def __init__(self, profile):
        # High numbers, so that the two that the browser needs are free.
        self.ends = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 20) for pipe in (os.pipe(), os.pipe()) for end in pipe]
        command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        self.process = subprocess.Popen(
            command, preexec_fn=self.wire, pass_fds=(3, 4), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(self.ends[0])
        os.close(self.ends[3])
        self.commands, self.answers = os.fdopen(self.ends[1], "wb", 0), os.fdopen(self.ends[2], "rb")
        self.numbers, self.events, self.session = itertools.count(1), [], None

    def wire(self):
        os.dup2(self.ends[0], 3)
        os.dup2(self.ends[3], 4)

    def close(self):
        self.process.kill()
        self.process.wait(PATIENCE_S)
        self.commands.close()
        self.answers.close()

    def call(self, method, **params):
        message = {"id": next(self.numbers), "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        self.commands.write(json.dumps(message).encode() + b"\0")
        while True:
            answer = json.loads(self.answer())
            if answer.get("id") == message["id"]:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def answer(self):
        found = bytearray()
        while (byte := self.answers.read(1)) != b"\0":
            assert byte, "the browser has ended"
            found += byte
        return found

    def open(self, page, width, scheme="light"):
        self.session, self.events = None, []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600
        )
        self.prefer(scheme)
        self.call("Page.navigate", url=page.as_uri())
        self.wait("document.documentElement?.dataset.ready === ''")
        return self

    def prefer(self, scheme, media=""):
        self.call(
            "Emulation.setEmulatedMedia", media=media, features=[{"name": "prefers-color-scheme", "value": scheme}]
        )

    def value(self, expression):
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait(self, expression):
        end = time.monotonic() + PATIENCE_S
        while not self.value(expression):
            assert time.monotonic() < end, f"never true: {expression}; {self.faults()}"
            time.sleep(0.05)

    def faults(self):
        """What the console would show in red, and what the page's policy refused."""
        events = [(event.get("method"), event.get("params", {})) for event in self.events]
        return [
            (method, params)
            for method, params in events
            if method in ("Runtime.exceptionThrown", "Log.entryAdded")
            or (method == "Runtime.consoleAPICalled" and params["type"] in ("error", "assert", "warning"))
        ]

    def lines(self):
        """Colours of the lines in the figure, without those of its legend."""
        return self.value(
            "[...document.querySelectorAll('.plot .mark-line.role-mark path')].map(p => getComputedStyle(p).stroke)"
        )

    def click(self, selector):
        self.value(f"document.querySelector({json.dumps(selector)}).click()")

    def picture(self):
        data = base64.b64decode(self.call("Page.captureScreenshot")["data"])
        with Image.open(io.BytesIO(data)) as image:
            return np.asarray(image.convert("RGB"))


def small_section(slug="zero-shot"):
    """A section made by hand: one table, one figure of four runs, a long command."""
    labels = [f"{group} {run}" for run, group in enumerate(GROUPS)]
    rows = [
        {"run": run, "group": GROUPS.index(group), "ffn": group, "x": x, "y": (run + 1) * x}
        for run, group in enumerate(GROUPS)
        for x in (1, 2)
    ]
    colour = alt.Color("ffn:N").scale(charts.colours([*dict.fromkeys(GROUPS)]))
    lines = alt.Chart(alt.InlineData(values=rows)).mark_line().encode(x="x:Q", y="y:Q", detail="run:N", color=colour)
    hover = lines.mark_point().encode(tooltip=["ffn:N", "y:Q"]).properties(name=charts.POINTER)
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
            "settings": [{"key": "command", **dict.fromkeys(labels, "x" * 200)}], "resamples": 1000, "seed": 0,
        },
        tables={"zero_shot": [{"task": "a task", "value": 0.5}], "settings": [{"key": "command"}]},
        charts={"accuracy": charts.draw("accuracy", "Lines", alt.layer(lines, hover), hidden=[2])},
        verdict=["No difference."],
        caveats=["Made by hand."],
        series=[Series(labels[run], group, GROUPS.index(group), run != 2) for run, group in enumerate(GROUPS)],
    )  # fmt: skip


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return write_page([small_section()], tmp_path_factory.mktemp("page"), title="One <page>", command="a script")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


def test_a_section_is_written_as_page_summary_tables_and_figures(page):
    names = {str(path.relative_to(page.parent)) for path in page.parent.rglob("*") if path.is_file()}
    assert names == {
        "index.html", "summary.md", "files.json", "tables/zero_shot.csv", "tables/settings.csv",
        "figures/accuracy.svg", "figures/accuracy.png",
    }  # fmt: skip
    assert "<title>One &lt;page&gt;</title>" in page.read_text()
    assert (page.parent / "summary.md").read_text().startswith("# One <page>\n\n**No difference.**\n\n- Made by")


def test_sections_of_a_page_have_unique_ids_and_folders(tmp_path):
    page = write_page([small_section("a"), small_section("b")], tmp_path, title="Two", command="a script")
    text = page.read_text()
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids)) and {"a", "b", "a-scores", "b-scores", "a-verdict"} <= set(ids)
    for target in re.findall(r'href="#([^"]+)"', text):
        assert target in ids
    links = re.findall(r'href="([^"#]+)" download', text)
    assert {"figures/b/accuracy.svg", "tables/a/zero_shot.csv"} <= set(links)
    for link in links:
        assert (tmp_path / link).is_file(), link
    assert text.count("vegaEmbed=") == 1
    assert (tmp_path / "summary.md").read_text().count("## Section ") == 2


def test_stale_files_of_an_earlier_page_are_removed_unless_edited(tmp_path):
    section = small_section()
    more = {"old": [{"x": 1}], "edited": [{"x": 1}], "empty": []}
    earlier = replace(section, tables=section.tables | more, charts={})
    write_page([earlier], tmp_path, title="x", command="y")
    assert (tmp_path / "tables/old.csv").is_file() and not (tmp_path / "tables/empty.csv").exists()
    (tmp_path / "tables/edited.csv").write_text("mine")
    (tmp_path / "tables/mine.csv").write_text("mine")
    outside = tmp_path.parent / f"{tmp_path.name}.outside"
    outside.write_text("x")
    listed = json.loads((tmp_path / "files.json").read_text())
    listed[f"../{outside.name}"] = hashlib.sha256(b"x").hexdigest()
    (tmp_path / "files.json").write_text(json.dumps(listed))
    write_page([replace(section, charts={})], tmp_path, title="x", command="y")
    assert outside.read_text() == "x"
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")} == {
        "index.html", "summary.md", "files.json", "tables", "tables/zero_shot.csv", "tables/settings.csv",
        "tables/edited.csv", "tables/mine.csv",
    }  # fmt: skip


@needs_chromium
@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_has_no_errors_and_fits_the_window(browser, page, width):
    browser.open(page, width)
    assert browser.faults() == []
    assert browser.value("document.documentElement.scrollWidth") <= width
    # What lies beyond the edge lies in a box that scrolls.
    assert (
        browser.value(
            "[...document.querySelectorAll('main *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1"
            " && !e.closest('.scroll') && !e.closest('svg')).map(e => e.outerHTML.slice(0, 80))"
        )
        == []
    )
    svg = browser.value("document.querySelector('.plot svg').getBoundingClientRect().width")
    assert 0.8 * min(width - 40, 640) <= svg <= min(width, 640)
    assert browser.value("document.querySelector('.switches').open") == (width > 600)


@needs_chromium
def test_a_switch_hides_a_run_and_rescales_the_axes(browser, page):
    browser.open(page, 1400)
    assert len(browser.lines()) == 3
    top = "Math.max(...[...document.querySelectorAll('.plot .role-axis-label text')].map(t => Number(t.textContent)))"
    assert browser.value(top) == 8
    column = "[...document.querySelectorAll('[data-run=\"3\"]')].map(e => e.getClientRects().length > 0)"
    assert set(browser.value(column)) == {True}
    browser.click("input[data-switch=run][value='3']")
    browser.wait("document.querySelectorAll('.plot .mark-line.role-mark path').length === 2")
    assert set(browser.value(column)) == {False}
    assert browser.value(top) == 4
    assert browser.value("document.querySelector('input[data-switch=group][value=\"2\"]').checked") is False
    assert browser.faults() == []


@needs_chromium
def test_a_group_switch_restores_the_initial_runs(browser, page):
    browser.open(page, 1400)
    states = "[...document.querySelectorAll('input[data-switch=run]')].map(box => box.checked)"
    assert browser.value(states) == [True, True, False, True]
    browser.click("input[data-switch=group][value='1']")
    browser.wait("document.querySelectorAll('.plot .mark-line.role-mark path').length === 2")
    assert browser.value(states) == [True, False, False, True]
    browser.click("input[data-switch=group][value='1']")
    browser.wait("document.querySelectorAll('.plot .mark-line.role-mark path').length === 3")
    assert browser.value(states) == [True, True, False, True]
    browser.click("input[data-switch=run][value='2']")
    browser.wait("document.querySelectorAll('.plot .mark-line.role-mark path').length === 4")


@needs_chromium
def test_figures_follow_the_colour_scheme_and_print_in_light(browser, page):
    light, dark = ({tuple(bytes.fromhex(pair[theme][1:])) for pair in charts.PALETTE[:3]} for theme in (0, 1))

    def seen():
        return {tuple(map(int, re.findall(r"\d+", colour))) for colour in browser.lines()}

    browser.open(page, 820, "dark")
    assert seen() <= dark and browser.picture()[0, 0].max() < 64
    browser.prefer("light")
    assert seen() <= light and browser.picture()[0, 0].min() > 192
    browser.prefer("dark", media="print")
    assert seen() <= light


@needs_chromium
def test_the_pointer_shows_values(browser, page):
    browser.open(page, 1400)
    mark = "document.querySelector('.plot .mark-symbol.role-mark path')"
    browser.value(f"scrollTo({{top: {mark}.getBoundingClientRect().y + scrollY - 300, behavior: 'instant'}})")
    x, y, w, h = browser.value(f"(({{x, y, width, height}}) => [x, y, width, height])({mark}.getBoundingClientRect())")
    for step in (3, 0):
        browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=x + w / 2 + step, y=y + h / 2)
    browser.wait("document.querySelector('#vg-tooltip-element.visible') !== null")
    assert browser.value("document.querySelector('#vg-tooltip-element').innerText").split() == [
        "ffn",
        "base",
        "y",
        "1",
    ]
    assert browser.faults() == []


@needs_chromium
def test_figures_are_shown_without_scripts(browser, page, tmp_path):
    still = tmp_path / "still.html"
    text = re.sub(r"script-src [^\"]+", "script-src 'none'", page.read_text())
    still.write_text(text.replace("<html", '<html data-ready=""'))
    browser.open(still, 820)
    browser.call("Emulation.setScriptExecutionDisabled", value=True)
    browser.events.clear()
    browser.call("Page.reload")
    while not any(event.get("method") == "Page.loadEventFired" for event in browser.events):
        browser.events.append(json.loads(browser.answer()))
    browser.wait("document.querySelectorAll('noscript svg .mark-line.role-mark path').length === 3")
    assert browser.value("document.querySelector('.switches').getClientRects().length") == 0
