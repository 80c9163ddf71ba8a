"""How decoding steps ran is stated with every run, and how far they are from the floor of their bytes."""

import json
import statistics

import pytest
import torch
from language import save_model

from kvbench.compare.leaderboard import query
from kvbench.engine.bandwidth import Bandwidth, bandwidth
from kvbench.engine.generation import Generation
from kvbench.report.charts import charts, write
from kvbench.report.collect import collect
from kvbench.report.page import compose, markdown
from kvbench.runs.results import RunConfig, read, summarise
from kvbench.runs.rows import fault, read_rows, split
from kvbench.runs.timing import step_row


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"), max_position_embeddings=4096)


def test_a_run_states_mode_floor_and_ratio(kvbench, model, tmp_path):
    command = ("run", "--policy", "quest", "--model", model, "--task", "infinitebench_passkey",
               "--context-length", 512, "--examples", 1,
               "--probe-examples", 1, "--ratio", 0.6, "--output", tmp_path)  # fmt: skip
    code, out, err = kvbench(*command, "--decoding", "fixed")
    assert code == 0, err
    assert "times the floor" in out and "fixed" in out
    found = {read(folder.parent)["config"]["policy"]: folder.parent for folder in tmp_path.glob("*/run.json")}
    for name in ("quest", "full"):
        run = read(found[name])
        assert run["config"]["decoding"] == "fixed"
        metrics, (row,) = run["metrics"], read_rows(found[name])
        assert (metrics["mode"], metrics["mode_reason"]) == ("fixed", None)
        assert "mode" in json.loads((found[name] / "timings.jsonl").read_text())
        assert "mode" not in json.loads((found[name] / "examples.jsonl").read_text())
        rates = run["environment"]["bandwidth"]
        read_bytes = row["read_bytes"]
        floor = (read_bytes["weights"] + read_bytes["device"]) / rates["device"] + read_bytes["host"] / rates["host"]
        assert metrics["floor_s"] == pytest.approx(floor)
        assert metrics["floor_ratio"] == pytest.approx(statistics.median(row["step_s"]) / floor)
        assert metrics["floor_ratio"] > 0.5 and metrics["device_tpot_s"] == {"p50": None, "p95": None}
    modes, _ = query(tmp_path, columns=["policy", "mode", "floor_ratio"], where=["mode=fixed", "floor_ratio>0"])
    assert len(modes.fetchall()) == 2
    # the report: column, figure's rows and tick, and the command that makes the run again
    collection = collect([tmp_path])
    latency = next(chart for chart in charts(collection) if chart.name == "latency")
    assert {row["mode"] for row in latency.rows} == {"fixed"} and "dashed tick is the floor" in latency.caption
    assert all(row["floor_s"] > 0 and row["published_s"] is None for row in latency.rows)
    assert write(latency, tmp_path)
    page = markdown(compose(collection, [latency], "kvbench report"))
    assert "Times the floor" in page and "--decoding fixed" in page


def test_what_cannot_run_so_is_told_before_anything_runs(kvbench, model, tmp_path):
    rest = ("--model", model, "--context-length", 512, "--examples", 1, "--output", tmp_path)
    code, _, err = kvbench("run", "--policy", "quest", "--decoding", "graph", *rest, "--device", "cpu")
    assert code == 2 and "A CUDA graph needs a GPU" in err
    code, _, err = kvbench("run", "--policy", "quest", "--decoding", "captured", *rest)
    assert code == 2 and "--decoding captured is none of auto, graph, fixed, eager" in err
    code, _, err = kvbench("run", "--policy", "full_no_cache", "--decoding", "fixed", *rest)
    assert code == 2 and "keeps no cache" in err
    assert not list(tmp_path.glob("*/examples.jsonl"))


def config(**changes):
    given = {
        "model": "m", "model_fingerprint": "f", "device": "cpu", "dtype": "float32", "policy": "quest",
        "policy_options": {}, "budget": None, "task": "t", "task_options": {}, "task_data": {}, "context_length": 64,
        "examples": 1, "seed": 42, "question": "aware", "prefill_chunk": None, "recall_k": 100, "probe_examples": 0,
    }  # fmt: skip
    return RunConfig(**{**given, **changes})


def test_the_default_leaves_the_names_of_earlier_folders():
    assert config().hash == config(decoding="auto").hash == "59b250c367d7"
    assert len({config(decoding=way).hash for way in ("auto", "graph", "fixed", "eager")}) == 4


def row(**changes):
    found = {
        "id": "a", "score": 1.0, "step_s": [0.2, 0.3, 0.4], "prefill_s": 1.0, "index_s": 0.0, "prompt_tokens": 9,
        "bytes": {"resident": 1, "offloaded": 0, "index": 0}, "peak_memory_bytes": None, "generated_tokens": 4,
    }  # fmt: skip
    return {**found, **changes}


def test_metrics_sum_up_modes_reasons_and_floors():
    graph = row(mode="graph", device_step_s=[0.1, 0.1, 0.3], floor_s=0.05, capture_s=2.0)
    hooks = row(id="b", mode="eager", mode_reason="policy 'x' has no step of fixed shapes")
    both = summarise([graph, hooks])
    assert (both["mode"], both["mode_reason"]) == ("eager, graph", "policy 'x' has no step of fixed shapes")
    assert both["device_tpot_s"]["p50"] == pytest.approx(0.1)
    assert (both["floor_s"], both["capture_s"], both["floor_ratio"]) == pytest.approx((0.05, 2.0, 2.0))
    wall = summarise([row(mode="fixed", floor_s=0.1)])
    assert wall["floor_ratio"] == pytest.approx(3.0)
    earlier = summarise([row()])
    assert all(earlier[name] is None for name in ("mode", "mode_reason", "floor_s", "floor_ratio", "capture_s"))
    assert fault(graph) is None and fault(row(mode="turbo")) and fault(row(floor_s=0.0)) and fault(row(floor_s="1"))
    assert {"mode", "floor_s", "device_step_s", "capture_s"} <= split(graph)[1].keys()


def test_a_row_states_what_was_measured_alone():
    held = {"resident": 1, "offloaded": 0, "index": 0}
    device = torch.device("cpu")
    hooks = Generation([1, 2], 1.0, 0.0, [0.2], held, mode_reason="because")
    assert step_row(hooks, device) == {"step_s": [0.2], "mode": "eager", "mode_reason": "because"}
    assert step_row(Generation([1], 1.0, 0.0, [], held), device) == {"step_s": []}
    reads = {"weights": 10**9, "device": 10**6, "host": 0}
    fixed = Generation([1, 2], 1.0, 0.0, [0.2], held, mode="fixed", capture_s=0.1, reads=reads)
    found = step_row(fixed, device)
    assert found["floor_s"] == pytest.approx((10**9 + 10**6) / bandwidth(device).device)
    assert found["read_bytes"] == reads


def test_bandwidth_is_measured_once_and_host_bytes_have_their_own():
    assert bandwidth(torch.device("cpu")) is bandwidth(torch.device("cpu"))
    assert 1e8 < bandwidth(torch.device("cpu")).device < 1e13
    assert Bandwidth(100.0, 10.0).floor_s({"weights": 150, "device": 50, "host": 20}) == 4.0
