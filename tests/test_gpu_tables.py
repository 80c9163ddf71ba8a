"""The tables of docs/gpu.md are those of the committed measurements."""

import importlib.util
import json
from pathlib import Path

ROOT = Path(__file__).parent.parent
spec = importlib.util.spec_from_file_location("gpu_table", ROOT / "tests/bench/gpu/table.py")
table = importlib.util.module_from_spec(spec)
spec.loader.exec_module(table)


def test_the_page_holds_the_tables_of_the_committed_files():
    page = table.PAGE.read_text("utf-8")
    made = table.filled(page, table.tables(sorted(table.MEASUREMENTS.glob("decode*.json"))))
    assert made == page, "run python tests/bench/gpu/table.py"


def test_a_file_becomes_a_table(tmp_path):
    row = {"policy": "full", "batch": 1, "tokens": 8192, "budget": None, "mode": "graph", "p50_s": 0.00728,
           "p95_s": 0.0073, "wall_s": 0.0074, "floor_s": 0.00375, "floor_ratio": 1.94,
           "construction_s": 0.001}  # fmt: skip
    rows = [row, {**row, "policy": "quest", "budget": 2048, "p50_s": 0.00364, "eager_s": 0.06},
            {"policy": "h2o", "batch": 1, "tokens": 8192, "error": "OutOfMemoryError: too\nmuch"}]  # fmt: skip
    file = tmp_path / "decode-a.json"
    file.write_text(json.dumps({
        "device": "A card", "torch": "2", "transformers": "5", "commit": "abc", "layers": 32, "compiled": True,
        "bandwidth": {"device": 4.28e12, "host": 5.5e10}, "rows": rows,
    }))  # fmt: skip
    text = table.tables([file])
    assert "### A card: [decode-a.json]" in text and "4.28 TB/s" in text and "code compiled; commit abc" in text
    assert "| 8192 | 1 | `full` | – | graph | 7.28 | 7.30 | 7.40 | 3.75 | 1.94 | 1.00 | – | 0.00 |" in text
    assert "| 8192 | 1 | `quest` | 2048 | graph | 3.64 |" in text and " | 2.00 | 60.00 |" in text
    assert "- h2o at 8192 tokens, batch 1: OutOfMemoryError: too much" in text
    assert table.filled(table.filled("a BEGIN".replace("BEGIN", table.BEGIN) + table.END, "x"), text).count(text) == 1
    assert table.tables([]) == table.NONE
