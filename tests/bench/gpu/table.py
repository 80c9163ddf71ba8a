"""Writes the tables of docs/gpu.md from the benchmark's files in docs/measurements.

`python tests/bench/gpu/table.py` after a file of `decode.py` was added there; `--check` only says whether it is needed.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[3] / "docs"
PAGE, MEASUREMENTS = DOCS / "gpu.md", DOCS / "measurements"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
NONE = "Nothing has been committed yet."
HEADINGS = (
    "context", "batch", "policy", "budget", "steps", "ms a step", "p95", "wall clock", "floor", "× floor",
    "× faster than `full`", "hook by hook", "construction, s", "peak above the prompt, GiB",
)  # fmt: skip


def tables(files: list[Path]) -> str:
    """The tables of all files, as Markdown."""
    return "\n\n".join(table(json.loads(file.read_text("utf-8")), file.name) for file in files) or NONE


def table(found: dict[str, Any], name: str) -> str:
    """One file's table, with what it was measured on and what could not be measured."""
    rate = found["bandwidth"]
    compiled = ", the model's own code compiled" if found.get("compiled") else ""
    lines = [
        f"### {found['device']}: [{name}](measurements/{name})",
        "",
        f"{found['layers']} layers of Llama-3-8B's shape with random weights{compiled}; commit {found['commit']}, "
        f"torch {found['torch']}, transformers {found['transformers']}; measured: {rate['device'] / 1e12:.2f} TB/s "
        f"on the device, {rate['host'] / 1e9:.0f} GB/s from pinned host memory. Times in milliseconds.",
        "",
        f"| {' | '.join(HEADINGS)} |",
        f"|{'|'.join(['--:', '--:', '---', '--:', '---', *['--:'] * (len(HEADINGS) - 5)])}|",
    ]
    exact = {(row["tokens"], row["batch"]): row["p50_s"] for row in found["rows"]
             if row["policy"] == "full" and "p50_s" in row}  # fmt: skip
    missing = []
    for row in found["rows"]:
        if "p50_s" not in row:
            why = row.get("error") or row.get("reason") or "not measured"
            missing.append(f"- {row['policy']} at {row['tokens']} tokens, batch {row['batch']}: {_one_line(why)}")
            continue
        base = exact.get((row["tokens"], row["batch"]))
        cells = [
            _length(row), str(row["batch"]), f"`{row['policy']}`", str(row.get("budget") or "–"), row["mode"],
            *(_ms(row.get(key)) for key in ("p50_s", "p95_s", "wall_s", "floor_s")), f"{row['floor_ratio']:.2f}",
            "–" if base is None else f"{base / row['p50_s']:.2f}", _ms(row.get("eager_s")),
            f"{row['construction_s']:.2f}", _gib(row.get("construction_peak_gib")),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "Not measured:", "", *missing] if missing else []
    return "\n".join([*lines, *_profiles(found["rows"])])


def _profiles(rows: list[dict[str, Any]], most: int = 4) -> list[str]:
    """Where the time of a step goes, for the rows that were profiled."""
    rows = [row for row in rows if row.get("kernels")]
    if not rows:
        return []
    lines = ["", "Where a step's time goes, kernel by kernel:", ""]
    lines += ["| context | batch | policy | kernels: milliseconds (launches) a step |", "|--:|--:|---|---|"]
    for row in rows:
        products = [each for each in row["kernels"] if _is_product(each["name"])]
        others = [each for each in row["kernels"] if not _is_product(each["name"])]
        cells = [f"matrix products {_time(products)}"]
        cells += [f"`{_kernel(each['name'])}` {_time([each])}" for each in others[:most]]
        cells.append(f"others {_time(others[most:])}")
        lines.append(f"| {_length(row)} | {row['batch']} | `{row['policy']}` | {', '.join(cells)} |")
    return lines


def _is_product(name: str) -> bool:
    """Whether a kernel is of cuBLAS, so one of the model's linear layers."""
    return name.startswith("nvjet") or any(part in name for part in ("splitKreduce", "gemm", "gemv"))


def _time(kernels: list[dict[str, Any]]) -> str:
    return f"{sum(each['ms'] for each in kernels):.2f} ({sum(each['launches'] for each in kernels):.0f})"


def _kernel(name: str) -> str:
    """A kernel's name without its return type and arguments."""
    name = name.removeprefix("void ").split("<")[0].split("(")[0].strip()
    return _one_line(name.rsplit("::", 1)[-1] or name)[:40]


def _length(row: dict[str, Any]) -> str:
    return f"{row['tokens']}, mean {row['mean_tokens']}" if "mean_tokens" in row else str(row["tokens"])


def _ms(seconds: float | None) -> str:
    return "–" if seconds is None else f"{1e3 * seconds:.2f}"


def _gib(size: float | None) -> str:
    return "–" if size is None else f"{size:.1f}"


def _one_line(text: str) -> str:
    return " ".join(str(text).replace("|", "/").replace("<", "(").replace(">", ")").split())[:160]


def filled(page: str, content: str) -> str:
    """The page with the content between its two marks."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{content}\n\n{END}{after}"


def main() -> int:
    """Write the page, or check it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 where the page is old")
    arguments = parser.parse_args()
    page = PAGE.read_text("utf-8")
    new = filled(page, tables(sorted(MEASUREMENTS.glob("decode*.json"))))
    if not arguments.check:
        PAGE.write_text(new, "utf-8")
    elif new != page:
        print("docs/gpu.md is older than docs/measurements: run python tests/bench/gpu/table.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
