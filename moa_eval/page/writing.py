"""Sections -> files: a self-contained page, a summary in Markdown, and all tables and figures."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from moa_eval.page import charts, formatting
from moa_eval.page.charts import Chart

Row = dict[str, Any]

FILTERS = (
    formatting.loss, formatting.signed, formatting.percent, formatting.change, formatting.deviation, formatting.share,
    formatting.ratio, formatting.count, formatting.grouped, formatting.memory, formatting.duration, formatting.rate,
    formatting.accuracy, formatting.points, formatting.probability, formatting.first_of, formatting.show,
)  # fmt: skip


class Series(NamedTuple):
    """A run in the page's switches; its position is "run" in charts and data-run in the page.

    `group` is the heading above its switch, which has a switch too. `colour` is a position in `PALETTE`, modulo its
    length. A run that is not `shown` is switched off at first.
    """

    label: str
    group: str
    colour: int
    shown: bool = True


@dataclass(frozen=True)
class Section:
    """One part of a page: a comparison of training runs or of harness results.

    Attributes:
        slug: Short name of lower-case letters, digits and hyphens; unique on the page.
        title: Heading.
        template: "training" or "zero_shot", a template of the page.
        content: Values for the template, in addition to the fields below.
        tables, charts: Rows and charts by name.
        verdict: Sentences for the top of the page; the first one carries the verdict.
        caveats: Sentences below the verdict.
        series: The runs that can be switched on and off, by position.
    """

    slug: str
    title: str
    template: str
    content: dict[str, Any]
    tables: dict[str, list[Row]]
    charts: dict[str, Chart]
    verdict: list[str]
    caveats: list[str] = field(default_factory=list)
    series: list[Series] = field(default_factory=list)


class Group(NamedTuple):
    """Runs with one heading: position, label, the first run's colour, and the positions of the runs."""

    position: int
    label: str
    colour: int
    runs: tuple[int, ...]


class _Place(NamedTuple):
    """Place of a section: prefix of its ids, its folder, and the level of its headings."""

    prefix: str
    folder: str
    level: int


def as_csv(rows: Sequence[Row]) -> str:
    """Return rows with equal keys as CSV with a header; floats keep full precision, NaN is "nan"."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0] if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def groups(series: Sequence[Series]) -> list[Group]:
    """Return the groups of some series in the order of their first runs."""
    members: dict[str, list[int]] = {}
    for run, own in enumerate(series):
        members.setdefault(own.group, []).append(run)
    return [Group(i, label, series[runs[0]].colour, tuple(runs)) for i, (label, runs) in enumerate(members.items())]


def render(template: str, content: Mapping[str, Any]) -> str:
    """Return a template of the page, filled."""
    return _environment().get_template(template).render(content)


def sentences(template: str, **content: Any) -> list[str]:
    """Return the lines of a filled template as a list of sentences, without empty lines."""
    return [line.strip() for line in render(template, content).splitlines() if line.strip()]


def write_page(sections: Sequence[Section], out: str | Path, *, title: str, command: str) -> Path:
    """Write index.html (self-contained), summary.md, figures/*.png and tables/*.csv; return the path of index.html.

    With several sections, files go to figures/SLUG and tables/SLUG, and ids on the page begin with "SLUG-".

    Args:
        sections: Sections in the order of the page, at least one, with unique slugs.
        out: Output folder, created if missing. Figures and tables of an earlier page in it are removed.
        title: Title of the page.
        command: Command that the page names as its source, such as "scripts/compare_runs.py".
    """
    out = Path(out)
    places = [_place(section, alone=len(sections) == 1) for section in sections]
    files = {name: text.encode(errors="replace") for name, text in _pages(sections, places, title, command).items()}
    for section, place in zip(sections, places, strict=True):
        files |= _files(section, place)
    if (out / "index.html").exists():  # files of an earlier page must not stay beside the new one
        for file in (*out.glob("figures/**/*.png"), *out.glob("tables/**/*.csv")):
            file.unlink()
    for name, content in files.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(content)
    return out / "index.html"


def _place(section: Section, *, alone: bool) -> _Place:
    return _Place("", "", 2) if alone else _Place(f"{section.slug}-", f"{section.slug}/", 3)


def _files(section: Section, place: _Place) -> dict[str, bytes]:
    files = {
        f"tables/{place.folder}{name}.csv": as_csv(rows).encode(errors="replace")
        for name, rows in section.tables.items()
        if rows
    }
    for name, chart in section.charts.items():
        files[f"figures/{place.folder}{name}.png"] = chart.png
    return files


def _pages(sections: Sequence[Section], places: Sequence[_Place], title: str, command: str) -> dict[str, str]:
    # A single section has the title of the page.
    shown = [replace(section, title=title) for section in sections] if len(sections) == 1 else sections
    common = {"title": title, "command": command, "alone": len(sections) == 1}
    pages = {}
    for page, ending in (("index.html", "html"), ("summary.md", "md")):
        parts = []
        for section, place in zip(shown, places, strict=True):
            content = section.content | common | vars(section) | {"place": place, "groups": groups(section.series)}
            parts.append(Markup(render(f"{section.template}.{ending}", content)))
        scripts = _scripts() if ending == "html" and any(section.charts for section in sections) else []
        entries = list(zip(shown, places, parts, strict=True))
        pages[page] = render(f"page.{ending}", common | {"entries": entries, "scripts": scripts})
    return pages


@cache
def _environment() -> Environment:
    """Return the templates' environment; HTML is escaped and an undefined name is an error."""
    environment = Environment(
        loader=PackageLoader("moa_eval.page"),
        autoescape=select_autoescape(["html"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for text in FILTERS:
        environment.filters[text.__name__] = text
    environment.filters["cell"] = lambda value: " ".join(str(value).split()).replace("|", "\\|")
    environment.filters["live"] = lambda chart: Markup(charts.live(chart))
    environment.globals["palette"] = charts.PALETTE
    return environment


def _scripts() -> list[Markup]:
    return [Markup(charts.javascript()), Markup(render("page.js", {}))]
