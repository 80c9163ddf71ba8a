"""Every causal-LM class of the installed transformers, tiny and random: the table of docs/models.md (`tox -e models`).

`tox -e models -- --write-models` writes the table anew.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers
from zoo import CLASSES, Row, tried

TABLE = Path(__file__).parents[2] / "docs" / "models.md"
START = "<!-- made by tox -e models -- --write-models -->"

FAULTS = ("wrong", "error")


@pytest.fixture(scope="module")
def rows() -> dict[str, Row]:
    """One row for each model type."""
    transformers.logging.set_verbosity_error()
    return {kind: tried(kind, ["streaming_llm", "quest"], [(False, 1), (True, 2)]) for kind in CLASSES}


def table(rows: dict[str, Row]) -> str:
    """The table in Markdown, one line for each class and what came of it."""
    lines = {}
    for kind, row in rows.items():
        reason = row.reason.split(": choose")[0].split(", so no policy")[0].replace("|", "\\|")
        lines.setdefault(f"| {row.verdict} | {row.governed} | {reason} |", []).append(f"`{kind}`")
    kept = [f"| {', '.join(sorted(kinds))} {line}" for line, kinds in sorted(lines.items())]
    counts = {
        verdict: sum(row.verdict == verdict for row in rows.values())
        for verdict in sorted({r.verdict for r in rows.values()})
    }
    total = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    head = ["| model types | verdict | governed layers of the tiny model | why |", "|---|---|---|---|"]
    return "\n".join(
        [f"transformers {transformers.__version__}, {len(rows)} model types: {total}.", "", *head, *kept, ""]
    )


def test_no_model_is_wrong_and_none_ends_in_a_traceback(rows):
    assert {kind: row for kind, row in rows.items() if row.verdict in FAULTS} == {}


def test_the_table_is_what_was_measured(rows, request):
    before, _, kept = TABLE.read_text().partition(START)
    if request.config.getoption("--write-models"):
        TABLE.write_text(f"{before}{START}\n\n{table(rows)}")
    else:
        assert kept.strip() == table(rows).strip(), "write it anew: tox -e models -- --write-models"
