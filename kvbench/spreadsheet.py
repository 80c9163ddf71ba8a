"""CSV files whose text stays text in a spreadsheet."""

import csv
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TextIO

FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")
"""What a cell must not begin with, or a spreadsheet takes it for a formula (OWASP, CSV Injection)."""

_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


def cell(value: Any) -> Any:
    """Give a cell's content: a text that a spreadsheet would take for a formula gets an apostrophe before it.

    Numbers stay numbers, also those given as text.
    """
    if not isinstance(value, str) or not value.startswith(FORMULA) or _NUMBER.fullmatch(value):
        return value
    return f"'{value}"


def write_rows(
    file: TextIO, rows: Iterable[Sequence[Any]], columns: Sequence[str], *, lineterminator: str = "\r\n"
) -> None:
    """Write a header and rows of cells as CSV."""
    writer = csv.writer(file, lineterminator=lineterminator)
    writer.writerow([cell(name) for name in columns])
    writer.writerows([cell(value) for value in row] for row in rows)


def write_table(
    file: TextIO,
    rows: Sequence[Mapping[str, Any]],
    columns: Sequence[str] | None = None,
    *,
    lineterminator: str = "\r\n",
) -> None:
    """Write rows by their columns' names as CSV; without `columns`, all that any row has, in order."""
    names = list(dict.fromkeys(key for row in rows for key in row)) if columns is None else columns
    content = ([row.get(name, "") for name in names] for row in rows)
    write_rows(file, content, names, lineterminator=lineterminator)
