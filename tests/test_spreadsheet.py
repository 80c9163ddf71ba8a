"""CSV files whose text stays text in a spreadsheet, whoever writes them."""

import csv
import io
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvbench.report import charts, page
from kvbench.spreadsheet import cell, write_rows, write_table

FORMULAS = [
    "=1+1",
    "+cmd|' /C calc'!A0",
    "-2+3",
    "@SUM(A1)",
    "\t=1",
    "\r=1",
    "\n=1",
    "=",
    "-",
    "＝1",
    "-inf-1",
    "- 5",
    "-1,5",
    "-inf",
    "+nan",
]


@pytest.mark.parametrize("text", FORMULAS)
def test_a_formula_gets_an_apostrophe(text):
    assert cell(text) == f"'{text}"


@pytest.mark.parametrize("value", ["quest", "", "a=b", "-0.5", "+1e3", "-12", 3, -0.25, None, True, "'=1", "1-2"])
def test_other_texts_and_numbers_stay_as_they_are(value):
    assert cell(value) is value


CELLS = st.one_of(
    st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\r\n\0")),
    st.text(alphabet="=+-@1.e \t"),
    st.floats(allow_nan=False),
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # machines under load
@given(rows=st.lists(st.lists(CELLS, min_size=2, max_size=2)))
def test_no_cell_begins_like_a_formula_and_none_loses_text(rows):
    target = io.StringIO()
    write_rows(target, rows, ["=a", "b"])
    names, *found = csv.reader(io.StringIO(target.getvalue()))
    assert names == ["'=a", "b"]
    for before, after in zip(rows, found, strict=True):
        for given_, read in zip(before, after, strict=True):
            assert read in (str(given_), f"'{given_}")
            if isinstance(given_, float):
                assert float(read) == given_
            elif read[:1] in ("=", "+", "-", "@"):
                float(read)


def test_tables_have_all_columns_of_all_rows():
    target = io.StringIO()
    write_table(target, [{"a": "@x"}, {"b": -1.5, "a": None}], lineterminator="\n")
    assert target.getvalue() == "a,b\n'@x,\n,-1.5\n"


def test_reports_and_leaderboards_neutralise_the_names_in_foreign_runs(tmp_path):
    row = {"policy": "=HYPERLINK(1)", "change": -0.5}
    assert page.table([row]) == "policy,change\n'=HYPERLINK(1),-0.5\n"
    chart = charts.Chart(name="c", title="", caption="", rows=[row], paint=lambda figure: None)
    charts.write(chart, tmp_path)
    assert (tmp_path / "c.csv").read_text().splitlines() == ["policy,change", "'=HYPERLINK(1),-0.5"]


def test_every_csv_is_written_here():
    root = Path(__file__).parents[1]
    files = [file for file in root.rglob("*.py") if file.relative_to(root).parts[0] not in ("tests", "build", ".tox")]
    assert len(files) > 60
    for file in files:
        if file.name != "spreadsheet.py":
            assert not re.search(r"csv\.(\w*[wW]riter)|write_csv|to_csv", file.read_text("utf-8")), file
