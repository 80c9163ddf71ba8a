"""The gate for ratios, as a third party's plugin uses it: in a project of its own, in pytest processes of its own."""

import json
import os
import random
import subprocess
import sys
from types import SimpleNamespace

import pytest

from kvbench.integrations.pytest_plugin import RatioGate

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


BASELINES = {
    "a / b": {"ratio": 1.25, "better": "lower", "processor": "Some 8086"}, "c": {"ratio": 3, "better": "higher"},
}  # fmt: skip
DAMAGED = [
    "", "[]", "null", "3", "{", '{"a / b": 3}', '{"a / b": {}}', '{"a / b": {"ratio": "1"}}',
    '{"a / b": {"ratio": NaN}}', '{"a / b": {"ratio": null}}',
    '{"a / b": {"ratio": true}}', '{"a / b": {"ratio": 0}}', '{"a / b": {"ratio": [1]}}',
    '{"a / b": {"ratio": 1e999}}', '{"a / b": {"ratio": 1, "processor": 3}}', "[" * 100_000,
    '{"\\ud800": {"ratio": 1}}',
    '{"\\n\\u001b[31m": 3}', f'{{"a / b": {{"ratio": 1{"0" * 5000}}}}}',
]  # fmt: skip


def measured(baseline, update=False):
    """A ratio's outcome against a baseline: the ratio, or the sentence that the test fails with."""
    gate = RatioGate(SimpleNamespace(extra_info={}), baseline, update)
    try:
        return gate.ratio("a / b", 1.3)
    except pytest.fail.Exception as failure:
        assert "\n" not in failure.msg and failure.msg.isprintable() and failure.msg.endswith(".")
        assert not failure.pytrace
        return failure.msg


@pytest.mark.parametrize("content", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_baseline_is_one_sentence_and_stays_as_it_is(content, tmp_path):
    file = tmp_path / "benchmarks.json"
    file.write_text(content)
    assert measured(file).startswith(f"{file} is no readable file of baselines: ")
    assert measured(file, update=True).startswith(f"{file} is no readable file of baselines: ")
    assert file.read_text() == content


def test_what_is_no_file_is_one_sentence(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    for name in ("folder", "loop"):
        assert "is no readable file of baselines" in measured(tmp_path / name)
    assert "has no baseline in" in measured(tmp_path / "absent")
    assert "cannot be written to" in measured(tmp_path / "absent" / "benchmarks.json", update=True)


def test_no_mutation_of_a_baseline_is_a_traceback(tmp_path):
    whole, file, lots = json.dumps(BASELINES, indent=2).encode(), tmp_path / "benchmarks.json", random.Random(0)
    outcomes = set()
    for _ in range(600):
        content = bytearray(whole)
        for _ in range(lots.randint(1, 4)):
            place = lots.randrange(len(content) + 1)
            match lots.randrange(4):
                case 0:
                    content[place : place + lots.randint(1, 30)] = b""
                case 1:
                    content[place:place] = bytes(lots.randrange(256) for _ in range(lots.randint(1, 3)))
                case 2:
                    content[place : place + 1] = lots.choice([b'"', b"{", b"}", b"[", b",", b"-", b"e", b"null", b"\\"])
                case _:
                    start = lots.randrange(len(content) + 1)
                    content[place:place] = content[start : start + 40]
        file.write_bytes(content)
        outcomes.add(isinstance(measured(file), str))
    assert outcomes == {True, False}


def test_what_ran_on_a_gpu_has_a_baseline_for_each_card(tmp_path):
    def measured(value, card, update=False):
        benchmark = SimpleNamespace(extra_info={})
        gate = RatioGate(benchmark, tmp_path / "benchmarks.json", update)
        return gate.ratio("mine / theirs", value, device=card)

    with pytest.raises(pytest.skip.Exception, match="has no baseline: run once on this card"):
        measured(1.0, "NVIDIA H200")
    measured(1.0, "NVIDIA H200", update=True)
    measured(2.0, "NVIDIA H100", update=True)
    assert measured(1.1, "NVIDIA H200") == 1.1
    assert measured(2.2, "NVIDIA H100") == 2.2
    with pytest.raises(pytest.fail.Exception, match=r"'mine / theirs on NVIDIA H200' measured 1\.300, more"):
        measured(1.3, "NVIDIA H200")
    with pytest.raises(pytest.fail.Exception, match="has no baseline in"):
        RatioGate(SimpleNamespace(extra_info={}), tmp_path / "benchmarks.json", False).ratio("mine / theirs", 1.0)
