"""The report rendered by jinja2: a self-contained HTML page, Markdown, and CSV."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from kvbench import spreadsheet
from kvbench.report.board import board_rows
from kvbench.report.charts import Chart, Row
from kvbench.report.content import Content, compose
from kvbench.report.decision import HEADINGS
from kvbench.report.words import count

__all__ = ["Content", "board_rows", "compose", "count", "html", "markdown", "table"]


def _markdown(text: object) -> str:
    """Escape what Markdown would read as markup, in text and table cells alike."""
    return re.sub(r"([\\`*_{}\[\]<>|#])", r"\\\1", " ".join(str(text).split()))


def _environment(*, html: bool) -> Environment:
    found = Environment(
        loader=PackageLoader("kvbench.report"), autoescape=html,  # noqa: S701 - Markdown has escapes of its own
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    found.filters["md"] = _markdown
    return found


def html(content: Content, folder: Path) -> str:
    """The page, self-contained: style, script, figures and data are inside it. `folder` holds the drawn figures."""
    template = _environment(html=True).get_template("page.html.j2")
    parts = files("kvbench.report") / "templates"
    script = (parts / "page.js").read_text(encoding="utf-8")
    content.board.csv = _data("text/csv", _read(folder / "leaderboard.csv")) if content.board.rows else ""
    shown = [
        {
            **{name: getattr(chart, name) for name in ("name", "title", "caption", "summary", "missing", "remedy",
                                                       "commands")},
            "svg": _shown(chart, folder / f"{chart.name}.svg") if chart.paint else "",
            "csv": _data("text/csv", _read(folder / f"{chart.name}.csv")) if chart.paint else "",
        }
        for chart in content.charts
    ]  # fmt: skip
    # The script's hash is the only script that the page's policy lets run.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return template.render({
        **vars(content), "charts": shown, "decision_headings": HEADINGS, "examples_json": _json(content.examples),
        "script_hash": digest,
        "script": Markup(script),  # noqa: S704 - a file of this package
        "css": Markup((parts / "page.css").read_text(encoding="utf-8")),  # noqa: S704 - a file of this package
    })  # fmt: skip


def _json(value: object) -> Markup:
    """JSON that a page can hold in a block of data: nothing in it ends the block or begins markup."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"))
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return Markup(text)  # noqa: S704 - no sign of markup is left


def markdown(content: Content) -> str:
    """The same as Markdown, with the figures beside it in `figures/`."""
    template = _environment(html=False).get_template("page.md.j2")
    shown = [{**vars(chart), "svg": bool(chart.paint)} for chart in content.charts]
    text = template.render({**vars(content), "charts": shown, "decision_headings": HEADINGS})
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def table(rows: Sequence[Row]) -> str:
    """Rows as CSV."""
    target = io.StringIO()
    spreadsheet.write_table(target, rows, lineterminator="\n")
    return target.getvalue()


def _read(file: Path) -> bytes:
    return file.read_bytes()


def _data(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _shown(chart: Chart, file: Path) -> Markup:
    """A figure in the page: of the page where this report drew it, else a picture, which cannot reach the page."""
    if chart.picture is None:
        return _inline(chart, file.read_text(encoding="utf-8"))
    return Markup('<img class="chart" alt="{}. {}" src="{}">').format(
        chart.title, chart.summary, _data("image/svg+xml", _read(file))
    )


_INKS = {"#000000": "currentColor", "#ffffff": "var(--paper)", "#dddddd": "var(--grid)", "#555555": "var(--muted)"}


def _inline(chart: Chart, svg: str) -> Markup:
    """A drawn SVG as part of the page: ids of its own, the page's inks, a name and a description for screen readers."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>", "", svg, flags=re.DOTALL)
    head, body = svg.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', head)
    assert box is not None
    body = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{chart.name}-", body)
    body = re.sub("|".join(_INKS), lambda ink: _INKS[ink[0]], body)
    title = Markup("<title id='{0}-title'>{1}</title><desc id='{0}-desc'>{2}</desc>").format(
        chart.name, chart.title, chart.summary
    )
    return Markup(  # noqa: S704 - matplotlib escapes the texts that it writes into the SVG
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" class="chart" {box[0]} '
        f'role="img" aria-labelledby="{chart.name}-title {chart.name}-desc">{title}{body}'
    )
