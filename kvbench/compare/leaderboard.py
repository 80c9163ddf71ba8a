"""Queries all runs below a folder: DuckDB over what their `run.json` files hold, no server.

DuckDB opens no file: it would take a folder's name with `*`, `?` or `[` for a pattern.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvbench import spreadsheet
from kvbench.compare.wording import budget_text
from kvbench.contract.errors import KVBenchError
from kvbench.contract.extras import need
from kvbench.contract.reading import shown
from kvbench.runs.results import find_runs, read

if TYPE_CHECKING:
    import duckdb

COLUMNS: dict[str, tuple[str, str]] = {
    "model": ("VARCHAR", "config.model"),
    "policy": ("VARCHAR", "config.policy"),
    "policy_options": ("VARCHAR", "config.policy_options"),
    "allocator": ("VARCHAR", "config.budget.allocator"),
    "ratio": ("DOUBLE", "config.budget.ratio"),
    "tokens": ("BIGINT", "config.budget.tokens"),
    "budget_bytes": ("BIGINT", "config.budget.bytes"),
    "budget": ("VARCHAR", "derived.budget"),
    "task": ("VARCHAR", "config.task"),
    "context_length": ("BIGINT", "config.context_length"),
    "question": ("VARCHAR", "config.question"),
    "seed": ("BIGINT", "config.seed"),
    "examples": ("BIGINT", "metrics.accuracy.n"),
    "accuracy": ("DOUBLE", "metrics.accuracy.mean"),
    "accuracy_low": ("DOUBLE", "metrics.accuracy.ci95[0]"),
    "accuracy_high": ("DOUBLE", "metrics.accuracy.ci95[1]"),
    "recall_at_k": ("DOUBLE", "metrics.recall_at_k"),
    "recovered_mass": ("DOUBLE", "metrics.recovered_mass"),
    "output_error": ("DOUBLE", "metrics.output_error"),
    "scanned_fraction": ("DOUBLE", "metrics.scanned_fraction"),
    "density": ("DOUBLE", "metrics.density"),
    "budget_tokens": ("DOUBLE", "metrics.budget_tokens"),
    "attended_tokens": ("DOUBLE", "metrics.attended_tokens"),
    "over_budget": ("VARCHAR", "metrics.over_budget"),
    "resident_bytes": ("DOUBLE", "metrics.bytes.resident"),
    "offloaded_bytes": ("DOUBLE", "metrics.bytes.offloaded"),
    "index_bytes": ("DOUBLE", "metrics.bytes.index"),
    "total_bytes": ("DOUBLE", "derived.total_bytes"),
    "ttft_s": ("DOUBLE", "metrics.ttft_s.total"),
    "prefill_s": ("DOUBLE", "metrics.ttft_s.prefill"),
    "index_s": ("DOUBLE", "metrics.ttft_s.index"),
    "tpot_p50_s": ("DOUBLE", "metrics.tpot_s.p50"),
    "tpot_p95_s": ("DOUBLE", "metrics.tpot_s.p95"),
    "mode": ("VARCHAR", "metrics.mode"),
    "mode_reason": ("VARCHAR", "metrics.mode_reason"),
    "device_tpot_p50_s": ("DOUBLE", "metrics.device_tpot_s.p50"),
    "device_tpot_p95_s": ("DOUBLE", "metrics.device_tpot_s.p95"),
    "floor_s": ("DOUBLE", "metrics.floor_s"),
    "floor_ratio": ("DOUBLE", "metrics.floor_ratio"),
    "hot_hit_rate": ("DOUBLE", "metrics.hot_hit_rate"),
    "peak_memory_bytes": ("BIGINT", "metrics.peak_memory_bytes"),
    "device": ("VARCHAR", "environment.device_name"),
    "dtype": ("VARCHAR", "config.dtype"),
    "distribution": ("VARCHAR", "config.plugins.policy.distribution"),
    "version": ("VARCHAR", "config.plugins.policy.version"),
    "source": ("VARCHAR", "config.plugins.policy.source"),
    "status": ("VARCHAR", "status"),
    "folder": ("VARCHAR", "folder"),
}
"""Name -> type, and place in `run.json` or, for the folder and what is derived, beside what it holds."""

SETTING = ("model", "task", "context_length", "question", "seed", "device", "dtype")
"""Columns that say what was run, on what, not with which policy, nor what came of it."""

SHOWN = (
    "model", "policy", "allocator", "ratio", "tokens", "budget_bytes", "task", "context_length", "seed", "examples",
    "accuracy", "accuracy_low", "accuracy_high", "recall_at_k", "density", "over_budget", "ttft_s", "tpot_p50_s",
    "mode",
)  # fmt: skip
"""Columns of the table where none are asked for."""

VIEW = (
    "policy", "budget", "seed", "accuracy", "accuracy_low", "accuracy_high", "examples", "total_bytes",
    "resident_bytes", "tpot_p50_s", "ttft_s", "recall_at_k", "density", "over_budget", "mode",
)  # fmt: skip
"""Columns of the printed table where none are asked for, those that decide first."""
GROUP = ("model", "task", "context_length", "question")
"""What runs that are ranked together have in common."""
OPERATORS = {"=": "=", "!=": "<>", "<=": "<=", ">=": ">=", "<": "<", ">": ">", "~": "GLOB"}
_CONDITION = re.compile(r"\s*(\w+)\s*(<=|>=|!=|=|<|>|~)\s*(.*?)\s*", re.DOTALL)


def query(
    root: Path,
    *,
    where: Sequence[str] = (),
    sort: Sequence[str] = (),
    columns: Sequence[str] = (),
    limit: int | None = None,
    mixed: bool = False,
) -> tuple[duckdb.DuckDBPyRelation, list[str]]:
    """Select runs at or below `root`; also gives a sentence for each folder that could not be read.

    `where`: conditions that all hold, such as `policy=quest`, `context_length>=4096` or `task~niah_*`. `sort`: columns,
    descending after a minus. Runs are ranked by a result, such as the accuracy, only within the same model, task,
    length and question mode, and `limit` holds for each of these groups, unless `mixed`; sorted by their configuration
    they come as one list. Column names are checked against COLUMNS, and values are bound, never part of the SQL.
    Raises KVBenchError for an unknown column, a condition without an operator and a value of another type.
    """
    database = need("duckdb", "kvbench leaderboard")
    documents, skipped = [], []
    for folder in find_runs(root):
        try:
            documents.append(json.dumps(_document(folder)))
        except KVBenchError as error:
            skipped.append(f"Left out: {error}")
    if not documents:
        raise KVBenchError(f"No run below {root} can be read: {skipped[0]}")
    parameters: list[Any] = [documents]
    conditions = []
    for text in where:
        column, operator, value = _condition(text)
        kind = "VARCHAR" if operator == "GLOB" else COLUMNS[column][0]
        conditions.append(f'CAST("{column}" AS {kind}) {operator} ?')
        parameters.append(_value(text, value, kind))
    order = [(_column(name.removeprefix("-")), "DESC" if name.startswith("-") else "ASC") for name in sort]
    selected = ", ".join(f'"{_column(name)}"' for name in columns or SHOWN)
    # Only names out of COLUMNS and OPERATORS enter the text; whatever a user wrote is bound.
    sql = f"SELECT {selected} FROM ({_RUNS})"  # noqa: S608
    if conditions:
        sql += " WHERE " + " AND ".join(conditions)
    ranked = [*(f'"{name}" {way} NULLS LAST' for name, way in order), '"folder"']
    apart = ", ".join(f'"{name}"' for name in GROUP)
    if is_grouped(sort, mixed=mixed):
        if limit is not None:
            sql += f" QUALIFY row_number() OVER (PARTITION BY {apart} ORDER BY {', '.join(ranked)}) <= ?"
            parameters.append(limit)
        sql += f" ORDER BY {', '.join([apart, *ranked])}"
    else:
        sql += " ORDER BY " + ", ".join(ranked)
        if limit is not None:
            sql += " LIMIT ?"
            parameters.append(limit)
    connection = database.connect(":memory:", config={"threads": 1, "autoinstall_known_extensions": False})
    selection: duckdb.DuckDBPyRelation = connection.sql(sql, params=parameters)
    return selection, skipped


def is_grouped(sort: Sequence[str], *, mixed: bool) -> bool:
    """Whether an order ranks runs by a result, and so each model, task and length by itself."""
    first = sort[0].removeprefix("-") if sort else ""
    return not mixed and first in COLUMNS and COLUMNS[first][1].split(".")[0] in ("metrics", "derived")


def select(root: Path, where: Sequence[str], *, beside: str | None = None) -> list[Path]:
    """The folders of the runs at or below `root` for which all conditions hold; see `query`.

    Runs of the policy `beside` come, too: of the conditions they need meet those alone that say what was run.
    """
    if not where:
        return find_runs(root)
    places = {shown(folder): folder for folder in find_runs(root)}
    wanted = [list(where)]
    if beside is not None:
        wanted.append([*(text for text in where if _condition(text)[0] in SETTING), f"policy={beside}"])
    found = [query(root, where=part, columns=["folder"])[0].fetchall() for part in wanted]
    if not found[0]:
        raise KVBenchError(f"No run below {root} meets {' and '.join(where)}.")
    return [places[name] for name in dict.fromkeys(name for part in found for (name,) in part)]


def _document(folder: Path) -> dict[str, Any]:
    run = read(folder)
    tiers = (run["metrics"].get("bytes") or {}).values()
    derived = {
        "budget": budget_text(run["config"]["budget"], options=True),
        "total_bytes": sum(tiers) if tiers else None,
    }
    return {**run, "derived": derived, "folder": shown(folder)}


def export(found: duckdb.DuckDBPyRelation, file: Path) -> None:
    """Write a selection as CSV, Parquet or Markdown, by the file's ending; raises KVBenchError for another one."""
    database = need("duckdb", "kvbench leaderboard")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        match file.suffix:
            case ".csv":
                with file.open("w", encoding="utf-8", newline="") as opened:
                    spreadsheet.write_rows(opened, found.fetchall(), found.columns, lineterminator="\n")
            case ".parquet":
                found.write_parquet(str(file))
            case ".md":
                file.write_text(markdown(found.columns, found.fetchall()), encoding="utf-8")
            case _:
                raise KVBenchError(f"{file} does not say its format: end it in .csv, .parquet or .md.")
    except (OSError, database.IOException) as error:
        raise KVBenchError(f"Cannot write to {file}: {error}.") from None


def markdown(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table in GitHub's Markdown; numbers with four significant digits."""
    lines = [list(columns), ["---"] * len(columns), *([_cell(value) for value in row] for row in rows)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _cell(value: Any) -> str:
    text = "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def _column(name: str) -> str:
    if name not in COLUMNS:
        near = difflib.get_close_matches(name, COLUMNS, n=3) or COLUMNS
        raise KVBenchError(f"Unknown column '{name}': choose {' or '.join(near)}.")
    return name


def _condition(text: str) -> tuple[str, str, str]:
    match = _CONDITION.fullmatch(text)
    if match is None:
        raise KVBenchError(f"The condition '{text}' is not of the form column=value; operators: {' '.join(OPERATORS)}.")
    return _column(match[1]), OPERATORS[match[2]], match[3]


def _value(text: str, value: str, kind: str) -> str | float:
    if kind == "VARCHAR":
        return value
    try:
        return float(value)
    except ValueError:
        raise KVBenchError(f"The condition '{text}' compares a number with '{value}': give a number.") from None


def _extract(name: str, kind: str, place: str) -> str:
    if name == "over_budget":
        asked, attended = (
            f"round(TRY_CAST(json_extract_string(run, '$.{place}.{part}') AS DOUBLE))::BIGINT"
            for part in ("asked", "attended")
        )
        return f"'asked ' || {asked} || ', attended ' || {attended} AS \"{name}\""
    return f"TRY_CAST(json_extract_string(run, '$.{place}') AS {kind}) AS \"{name}\""


_RUNS = (
    f"SELECT {', '.join(_extract(name, *where) for name, where in COLUMNS.items())} "  # noqa: S608  constants
    "FROM (SELECT unnest(CAST(? AS VARCHAR[])) AS run)"
)
