"""Tables and templates -> files: CSV, and pages from `templates/` with the same numbers in the same style."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from moa_eval.page import charts, formatting

Row = dict[str, Any]

FILTERS = (
    formatting.loss, formatting.signed, formatting.percent, formatting.change, formatting.deviation, formatting.share,
    formatting.ratio, formatting.count, formatting.grouped, formatting.memory, formatting.duration,
    formatting.accuracy, formatting.points, formatting.probability,
)  # fmt: skip


def as_csv(rows: Sequence[Row]) -> str:
    """Rows with the same keys as CSV with a header, floats in full precision, unknown values (NaN) as "nan"."""
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return text.getvalue()


def render(templates: Mapping[str, str], content: Mapping[str, Any]) -> dict[str, str]:
    """Fill templates of `templates/` with the same content: file name -> template gives file name -> text.

    HTML is escaped; a name that is not in the content is an error.
    """
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
    shared = {"palette": charts.PALETTE}
    return {page: environment.get_template(name).render(shared | dict(content)) for page, name in templates.items()}


def write(out: Path, files: Mapping[str, str | bytes]) -> None:
    """Write files into a folder by their relative path, making folders where they lack."""
    for name, content in files.items():
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content, encoding="utf-8")


def figure_files(plots: Mapping[str, charts.Plot]) -> dict[str, str | bytes]:
    """Both files of every figure, for `write`."""
    files: dict[str, str | bytes] = {}
    for name, plot in plots.items():
        files |= {f"figures/{name}.svg": plot.svg, f"figures/{name}.png": plot.png}
    return files
