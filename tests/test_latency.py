"""Where a policy's step begins to be faster than exact attention's, and what the report's latency figure says of it."""

import csv
import json

import pytest

from kvbench.analysis.studies.latency import break_even
from kvbench.runs.published import published


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([(100, -2.0), (200, -1.0), (400, 1.0)], 300.0),
        ([(100, 1.0), (200, -1.0), (400, 3.0)], 250.0),  # a win that does not last counts for nothing
        ([(100, 1.0), (200, 2.0)], "below 100"),
        ([(100, 1.0), (200, 0.0)], "above 200"),
        ([(100, -1.0)], "above 100"),
    ],
)
def test_the_break_even_is_where_the_gain_stays(points, expected):
    value, text = break_even(points)
    assert (value == pytest.approx(expected)) if isinstance(expected, float) else (value, text) == (None, expected)


def row(policy, tokens, ms, batch=1, **more):
    budget = None if policy == "full" else 2048
    return {"policy": policy, "batch": batch, "tokens": tokens, "budget": budget, "mode": "graph", "p50_s": ms / 1e3,
            "floor_s": 0.004, **more}  # fmt: skip


@pytest.fixture
def timed(tmp_path):
    rows = [
        row("full", 8192, 7.0), row("full", 32768, 8.0), row("full", 32768, 16.0, batch=8),
        row("quest", 8192, 7.5), row("quest", 32768, 7.0), row("quest", 32768, 9.0, batch=8),
        row("snapkv", 8192, 6.0), row("snapkv", 32768, 6.0),
        {"policy": "h2o", "batch": 1, "tokens": 8192, "error": "OutOfMemoryError: too much"},
    ]  # fmt: skip
    file = tmp_path / "decode.json"
    file.write_text(json.dumps({"device": "NVIDIA H100 80GB HBM3", "layers": 32, "rows": rows}))
    return file


def test_the_command_computes_break_evens_of_a_benchmark(kvbench, tmp_path, timed):
    code, out, err = kvbench("analyze", "latency", "--benchmark", timed, "--output", tmp_path / "made", "--json")
    assert code == 0, err
    found = json.loads(out)
    contexts = {row["policy"]: row for row in found["contexts"] if row["batch"] == 1}
    assert contexts["quest"]["tokens"] == pytest.approx(8192 + 24576 / 3)
    assert contexts["quest"]["speed_up"] == pytest.approx(8 / 7)
    assert (contexts["snapkv"]["tokens"], contexts["snapkv"]["break_even"]) == (None, "below 8192")
    batches = {(row["policy"], row["tokens"]): row["break_even"] for row in found["batches"]}
    assert batches[("quest", 32768)] == "below 1" and batches[("quest", 8192)] == "above 1"
    assert found["partial"] == ["1 of 9 measurements have no time of a decoding step"]
    with (tmp_path / "made" / "latency-contexts.csv").open(newline="") as file:
        assert {row["policy"] for row in csv.DictReader(file)} == {"quest", "snapkv"}
    figure = (tmp_path / "made" / "latency.svg").read_text()
    assert "as published: 6.44 ms" in figure and "batch 8" in figure
    code, out, _ = kvbench("analyze", "latency", "--benchmark", timed, "--output", tmp_path / "made")
    assert code == 0 and "16384" in out and "below 8192" in out


def test_runs_are_compared_and_a_mode_apart_is_told(kvbench, tmp_path):
    for policy, tpot, mode in (("full", 0.02, "graph"), ("quest", 0.01, "eager")):
        folder = tmp_path / policy
        folder.mkdir()
        config = {
            "model": "m", "model_fingerprint": "f", "device": "cuda", "dtype": "bfloat16", "policy": policy,
            "policy_options": {}, "budget": None if policy == "full" else {"ratio": 0.1}, "task": "t",
            "task_options": {}, "task_data": {}, "context_length": 4096, "examples": 1, "seed": 42,
            "question": "aware", "prefill_chunk": None, "recall_k": 100, "probe_examples": 0,
        }  # fmt: skip
        metrics = {
            "accuracy": {"mean": 1.0, "ci95": [0, 1], "n": 1},
            "tpot_s": {"p50": tpot, "p95": tpot},
            "mode": mode,
        }
        environment = {"device_name": "a card"}
        (folder / "run.json").write_text(json.dumps(
            {"schema": 2, "config": config, "environment": environment, "status": "complete", "metrics": metrics}
        ))  # fmt: skip
    runs = ("--run", tmp_path / "full", "--run", tmp_path / "quest", "--output", tmp_path / "made")
    code, out, err = kvbench("analyze", "latency", *runs, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["summary"][0]["speed_up"] == pytest.approx(2.0)
    assert found["partial"] == ["quest: steps did not run in the mode of exact attention's"]
    code, _, err = kvbench("analyze", "latency", "--run", tmp_path / "quest", "--output", tmp_path / "made")
    assert code == 2 and "No policy was timed beside 'full'" in err


def test_bad_sources_are_told(kvbench, tmp_path, timed):
    (tmp_path / "other.json").write_text("{}")
    for arguments, expected in (
        (("latency",), "give a file of tests/bench/gpu/decode.py with --benchmark"),
        (("latency", "--benchmark", tmp_path / "other.json"), "is no file of tests/bench/gpu/decode.py"),
        (("latency", "--benchmark", tmp_path / "none.json"), "is no file of tests/bench/gpu/decode.py"),
        (("latency", "--benchmark", timed, "--capture", tmp_path), "leave --capture out"),
        (("ood", "--benchmark", timed), "reads no benchmark's file: leave --benchmark out"),
    ):
        code, _, err = kvbench("analyze", *arguments, "--output", tmp_path / "made")
        assert code == 2 and expected in " ".join(err.split()), err


def test_the_published_bar_is_for_one_card_and_one_model():
    given = ("meta-llama/Llama-3.1-8B-Instruct", "bfloat16", "NVIDIA H100 80GB HBM3", 1)
    bar = published(*given)
    assert bar is not None and bar.seconds(131072) == pytest.approx(12.17e-3, abs=1e-5)
    for place, other in enumerate(("Qwen/Qwen3-8B", "float16", "NVIDIA H200", 8)):
        changed = [*given]
        changed[place] = other
        assert published(*changed) is None
    assert published("meta-llama/Llama-3.1-8B", "bfloat16", None, 1) is None
