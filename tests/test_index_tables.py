"""The tables of docs/indexes.md are those of the committed measurements."""

import importlib.util
import json
from pathlib import Path

ROOT = Path(__file__).parent.parent
spec = importlib.util.spec_from_file_location("index_tables", ROOT / "tests/bench/index_tables.py")
tables = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tables)


def test_the_page_holds_the_tables_of_the_committed_files():
    page = tables.PAGE.read_text("utf-8")
    assert tables.filled(page) == page, "run python tests/bench/index_tables.py"


def test_files_become_tables(tmp_path):
    point = {"effort": 100, "recall": 0.9, "scanned": 0.1}
    layers = {
        "2": {"ivf": {"default": point, "target": {"effort": 7, "recall": 0.95, "scanned": 0.2}, "auto": point,
                      "bytes": 0.05, "grown": 0.8, "time": 2.0}},
        "4": {"ivf": {"default": {**point, "recall": 0.8}, "target": {"effort": 9, "recall": 0.96, "scanned": 0.4},
                      "auto": point, "bytes": 0.15, "grown": 0.9, "time": 4.0}},
    }  # fmt: skip
    document = {"model": "m", "commit": "abc", "text": "a text", "context_length": 4096, "keys": 3772, "queries": 64,
                "heads": 4, "kv_heads": 2, "head_dim": 8, "target": 0.95, "layers": layers}  # fmt: skip
    (tmp_path / "indexes-a.json").write_text(json.dumps(document))
    row = {"effort": 5, "recall": 0.96, "scanned": 0.25, "time": 0.5}
    wide = {"2": {"flat": {"100": {**row, "effort": None}}, "ivf": {"100": {**row, "recall": 0.94}}}}
    (tmp_path / "wide-a.json").write_text(json.dumps({**document, "layers": wide}))
    marks = (tables.BEGIN, tables.END, tables.WIDE_BEGIN, tables.WIDE_END)
    page = tables.filled("\n".join(marks), tmp_path)
    cells = "`ivf` | 100 | 0.850 (0.800) | 10.0% | 7–9 | 30.0% | 3.00 | 0.900 (0.900) | 10.0% | 0.850 | 0.10"
    assert f"| {cells} |" in page and "layers 2, 4; 3772 keys" in page
    assert "| [m, 3772](measurements/wide-a.json) | `flat` | 100 | – | 25% | 0.50 |" in page
    assert "| `ivf` | 100 | 5 | not reached | – |" in page
    assert tables.filled(page, tmp_path) == page
