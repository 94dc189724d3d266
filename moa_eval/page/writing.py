"""Sections -> files: one page, its summary in Markdown, and every table and figure beside them."""

import base64
import csv
import hashlib
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from moa_eval.page import charts, formatting
from moa_eval.page.charts import Chart

Row = dict[str, Any]
Files = dict[str, str | bytes]

FILTERS = (
    formatting.loss, formatting.signed, formatting.percent, formatting.change, formatting.deviation, formatting.share,
    formatting.ratio, formatting.count, formatting.grouped, formatting.memory, formatting.duration, formatting.rate,
    formatting.accuracy, formatting.points, formatting.probability,
)  # fmt: skip


_LIST = "files.json"  # what a page consists of: file -> SHA-256


class Series(NamedTuple):
    """One run as the page's switches see it; its position is "run" in charts and data-run in the page.

    Attributes:
        label: What the page calls it.
        group: Heading under which its switch stands; a group has a switch of its own.
        colour: Position of its colour in `PALETTE`, counted on beyond the end.
        shown: False if it is switched off at first.
    """

    label: str
    group: str
    colour: int
    shown: bool = True


@dataclass(frozen=True)
class Section:
    """One part of a page: what a set of runs, or a set of harness results, says.

    Attributes:
        slug: Short name of lower-case letters, digits and hyphens; unique on the page.
        title: Its heading.
        template: "training" or "zero_shot": which of `templates/` shows it.
        content: What the template shows beside the fields below.
        tables, charts: By name.
        pictures: PNG files by name that are written beside the figures.
        verdict, caveats: Sentences for the top of the page; the first one carries the verdict.
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
    pictures: dict[str, bytes] = field(default_factory=dict)


class Group(NamedTuple):
    """Runs with one heading: its position, label, the first one's colour, and the runs' positions."""

    position: int
    label: str
    colour: int
    runs: tuple[int, ...]


@dataclass(frozen=True)
class _Place:
    """Where a section stands: what its ids begin with, its folder, and the level of its headings."""

    prefix: str
    folder: str
    level: int


def as_csv(rows: Sequence[Row]) -> str:
    """Rows with the same keys as CSV with a header, floats in full precision, unknown values (NaN) as "nan"."""
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return text.getvalue()


def groups(series: Sequence[Series]) -> list[Group]:
    """The groups of some series in the order of their first runs."""
    members: dict[str, list[int]] = {}
    for run, own in enumerate(series):
        members.setdefault(own.group, []).append(run)
    return [Group(i, label, series[runs[0]].colour, tuple(runs)) for i, (label, runs) in enumerate(members.items())]


def write_page(sections: Sequence[Section], out: str | Path, *, title: str, command: str) -> Path:
    """Write `out`/index.html (self-contained), summary.md, figures/*.{svg,png}, tables/*.csv and the list of these.

    The files of several sections lie in figures/SLUG and tables/SLUG, and their ids on the page begin with "SLUG-".

    Args:
        sections: What the page shows, in this order.
        out: The folder; made where it lacks. Files that are there are replaced one by one, and what an earlier page
            left there and this one has not is removed, unless it was changed since. All else stays.
        title: Title of the page.
        command: What wrote it, such as "scripts/compare_runs.py".

    Returns:
        The path of index.html.

    Raises:
        ValueError: There is no section, or two have the same slug.
    """
    slugs = [section.slug for section in sections]
    if not slugs or len(set(slugs)) < len(slugs):
        raise ValueError(f"sections are {slugs}; give at least one, each with a slug of its own")
    alone = len(sections) == 1
    places = [_Place("" if alone else f"{slug}-", "" if alone else f"{slug}/", 2 if alone else 3) for slug in slugs]
    files: Files = {}
    for section, place in zip(sections, places, strict=True):
        files |= _files(section, place)
    out = Path(out)
    files |= _pages(sections, places, title, command)
    earlier = _listed(out)
    for name, content in files.items():
        _write(out / name, content)
    digests = {name: _digest(content) for name, content in files.items()}
    _write(out / _LIST, json.dumps(digests, indent=1) + "\n")
    _remove(out, {name: digest for name, digest in earlier.items() if name not in digests})
    return out / "index.html"


def _files(section: Section, place: _Place) -> Files:
    files: Files = {f"tables/{place.folder}{name}.csv": as_csv(rows) for name, rows in section.tables.items() if rows}
    for name, chart in section.charts.items():
        files |= {f"figures/{place.folder}{name}.svg": chart.svg, f"figures/{place.folder}{name}.png": chart.png}
    return files | {f"figures/{place.folder}{name}.png": content for name, content in section.pictures.items()}


def _pages(sections: Sequence[Section], places: Sequence[_Place], title: str, command: str) -> Files:
    environment = _environment()
    # With one section the page's title is the section's.
    shown = [replace(section, title=title) for section in sections] if len(sections) == 1 else list(sections)
    common = {"title": title, "command": command, "alone": len(sections) == 1}
    pages: Files = {}
    for page, ending in (("index.html", "html"), ("summary.md", "md")):
        parts = []
        for section, place in zip(shown, places, strict=True):
            fields = {name: value for name, value in vars(section).items() if name != "content"}
            content = section.content | fields | common | {"title": section.title, "place": place}
            content["groups"] = groups(section.series)
            parts.append(Markup(environment.get_template(f"{section.template}.{ending}").render(content)))
        scripts = _scripts(environment) if ending == "html" and any(section.charts for section in sections) else []
        entries = list(zip(shown, places, parts, strict=True))
        pages[page] = environment.get_template(f"page.{ending}").render(
            common, entries=entries, scripts=scripts, hashes=[_hash(script) for script in scripts]
        )
    return pages


def _environment() -> Environment:
    """Templates in which HTML is escaped and a name that is not in the content is an error."""
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
    environment.filters["still"] = lambda chart, prefix: Markup(charts.still(chart, prefix))
    environment.globals["palette"] = charts.PALETTE
    return environment


def _scripts(environment: Environment) -> list[Markup]:
    return [Markup(charts.javascript()), Markup(environment.get_template("page.js").render())]


def _hash(script: str) -> str:
    """The source expression of a Content Security Policy that allows this script and no other."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode('ascii')}'"


def _digest(content: str | bytes) -> str:
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()


def _listed(out: Path) -> dict[str, str]:
    """The files of the page that was written to a folder before; none if there is no list that can be read."""
    try:
        listed = json.loads((out / _LIST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return {str(name): str(digest) for name, digest in listed.items()} if isinstance(listed, dict) else {}


def _remove(out: Path, files: Mapping[str, str]) -> None:
    """Remove files of a folder whose content is still that of their digests, and folders that this leaves empty."""
    for name, digest in files.items():
        path = out / name
        try:
            if not path.resolve().is_relative_to(out.resolve()) or path.is_symlink() or not path.is_file():
                continue
        except (OSError, ValueError):  # no name that a file can have: not of our list
            continue
        if _digest(path.read_bytes()) == digest:
            path.unlink()
            for parent in path.relative_to(out).parents[:-1]:
                if not any((out / parent).iterdir()):
                    (out / parent).rmdir()


def _write(path: Path, content: str | bytes) -> None:
    """Write a file that is whole or absent: under another name first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_bytes(content.encode() if isinstance(content, str) else content)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
