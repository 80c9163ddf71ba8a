"""A table of texts that shows itself on a terminal, in a notebook and as plain text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING, Any

from kvbench.contract.errors import KVBenchError

if TYPE_CHECKING:
    from rich.table import Table as RichTable

WIDTH = 140
"""Columns of a table as plain text."""
_CELL = "padding:2px 10px;white-space:pre;"


@dataclass(frozen=True)
class Column:
    """A column's heading, which may have several lines, and whether it holds numbers."""

    heading: str
    numeric: bool = True


@dataclass(frozen=True)
class Table:
    """Cells as texts. `boxed` draws lines between the columns; `sections` are rows that a gap follows."""

    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[str]]
    boxed: bool = True
    sections: frozenset[int] = field(default_factory=frozenset)

    def __rich__(self) -> RichTable:
        """The table for rich's console."""
        from rich import box  # noqa: PLC0415  --help stays quick
        from rich.table import Table as RichTable  # noqa: PLC0415
        from rich.text import Text  # noqa: PLC0415

        look: dict[str, Any] = (
            {} if self.boxed else {"box": box.SIMPLE_HEAD, "pad_edge": False, "padding": (0, 1, 0, 0)}
        )
        table = RichTable(title=Text(self.title, "italic"), title_justify="left", **look)
        for place, column in enumerate(self.columns):
            table.add_column(
                Text(column.heading), justify="right" if column.numeric else "left",
                no_wrap=place == 0 or column.numeric, style="bold" if place == 0 and not self.boxed else None,
            )  # fmt: skip
        for number, row in enumerate(self.rows):
            table.add_row(*(Text(cell) for cell in row), end_section=number in self.sections)
        return table

    def __str__(self) -> str:
        """The table as plain text."""
        from rich.console import Console  # noqa: PLC0415

        console = Console(width=WIDTH, no_color=True, force_terminal=False, force_jupyter=False)
        with console.capture() as captured:
            console.print(self)
        return captured.get().rstrip("\n")

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """The table for a notebook; every text is escaped."""
        heads = "".join(
            f'<th style="{_CELL}text-align:{_side(column)}">{escape(column.heading)}</th>' for column in self.columns
        )
        body = "".join(
            "<tr>"
            + "".join(
                f'<td style="{_CELL}text-align:{_side(column)}">{escape(cell)}</td>'
                for column, cell in zip(self.columns, row, strict=True)
            )
            + "</tr>"
            for row in self.rows
        )
        return (
            f'<table><caption style="text-align:left;caption-side:top">{escape(self.title)}</caption>'
            f"<thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>"
        )


def _side(column: Column) -> str:
    return "right" if column.numeric else "left"


def html(parts: Iterable[Any], notes: Iterable[str] = (), warnings: Iterable[str] = ()) -> str:
    """Tables and lines of text under each other for a notebook, all escaped."""
    lines = [f'<div style="opacity:.7;max-width:60em">{escape(note)}</div>' for note in notes]
    told = [f'<div style="color:#b3261e;max-width:60em">{escape(warning)}</div>' for warning in warnings]
    return f"<div>{''.join([*(part._repr_html_() for part in parts), *told, *lines])}</div>"


def frame(rows: Sequence[Mapping[str, Any]]) -> Any:
    """A pandas.DataFrame of the rows; KVBenchError where pandas is not installed."""
    try:
        import pandas as pd  # noqa: PLC0415  an extra
    except ImportError:
        raise KVBenchError("pandas is not installed, and to_pandas() needs it: pip install pandas.") from None
    return pd.DataFrame([dict(row) for row in rows])


def flat(values: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Nested mappings as one, with names joined by underscores; an interval becomes `…_low` and `…_high`."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{before}{name}_")
        elif name == "ci95":
            found[f"{before}low"], found[f"{before}high"] = value or (None, None)
        else:
            found[before + name] = value
    return found
