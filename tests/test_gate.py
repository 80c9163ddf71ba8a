"""The gate for ratios, as a third party's plugin uses it: in a project of its own, in pytest processes of its own."""

import json
import os
import subprocess
import sys

import pytest

MODULE = """
def test_mine(ratio_gate):
    ratio_gate.ratio("mine / theirs", {value}, better="{better}")
"""


def run_pytest(folder, *arguments):
    """Run pytest there, as if no other pytest were running: pytest-benchmark measures nothing in xdist's workers."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(command, cwd=folder, env=own, capture_output=True, text=True, check=False)
    return done.returncode, " ".join(done.stdout.split())


@pytest.fixture
def gate(tmp_path):
    """Run a benchmark that measures `value`; gives the exit code and what pytest printed."""
    (tmp_path / "pytest.ini").write_text("[pytest]\n")

    def run(value, *arguments, better="lower"):
        (tmp_path / "test_mine.py").write_text(MODULE.format(value=value, better=better))
        return run_pytest(tmp_path, *arguments)

    return run


def test_a_ratio_more_than_a_fifth_worse_fails_and_names_both_figures(gate, tmp_path):
    code, out = gate(1.0)
    assert code == 1
    assert "'mine / theirs' has no baseline" in out
    assert gate(1.0, "--kvbench-update-baseline")[0] == 0
    assert gate(1.19)[0] == 0
    code, out = gate(1.21)
    assert code == 1
    assert "'mine / theirs' measured 1.210, more than 20% worse than its baseline of 1.000 (lower is better)" in out
    assert "another processor" not in out
    gate(1.0, "--kvbench-update-baseline", better="higher")
    assert gate(0.81, better="higher")[0] == 0
    assert gate(0.79, better="higher")[0] == 1
    known = json.loads((tmp_path / "benchmarks.json").read_text())
    known["mine / theirs"]["processor"] = "Some 8086"
    (tmp_path / "benchmarks.json").write_text(json.dumps(known))
    assert "The baseline is of another processor, Some 8086" in gate(0.79, better="higher")[1]


def test_times_are_compared_within_a_run(gate, tmp_path):
    (tmp_path / "test_mine.py").write_text(
        "import time\n\ndef test_mine(ratio_gate):\n"
        "    ratio = ratio_gate.time('half', lambda: time.sleep(0.1), lambda: time.sleep(0.2), rounds=3, scale=2)\n"
        "    assert 0.6 < ratio < 1.9\n"
    )
    code, out = run_pytest(tmp_path, "--kvbench-update-baseline")
    assert code == 0, out
    assert set(json.loads((tmp_path / "benchmarks.json").read_text())["half"]) == {"ratio", "better", "processor"}
