"""Runs whose contexts are read and saved once: the same answers, and what a hit takes beside a miss."""

import json

import pytest
from language import save_model
from typer.testing import CliRunner

from kvbench.cli import app
from kvbench.contract.budget import Budget
from kvbench.contract.errors import KVBenchError
from kvbench.models import load_model
from kvbench.runs.prefix_costs import prefix_metrics
from kvbench.runs.prefixed import recall_around
from kvbench.runs.runner import Request, execute, plan

ASKED = {
    "budget": Budget(tokens=60), "task": "shared_needles", "task_options": {"requests": 2}, "context_length": 400,
    "examples": 3, "seed": 7, "policy_options": {}, "probe_examples": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"), max_position_embeddings=4096)


@pytest.fixture(scope="module")
def loaded(place):
    return load_model(str(place))


def run(loaded, output, policy, **more):
    config = plan(Request(policy=policy, **{**ASKED, **more}), loaded)
    (done,) = execute([config], loaded, output, lambda *_: None)
    return done


@pytest.mark.parametrize("policy", ["full", "ivf", "h2o"])
def test_hits_answer_as_questions_after_their_context_do(loaded, tmp_path, policy):
    options = {"sinks": 2, "window": 8} if policy == "ivf" else {}
    ours = run(loaded, tmp_path, policy, prefix="cached", policy_options=options)
    plain = run(loaded, tmp_path, policy, question="agnostic", policy_options=options)
    assert [row["prediction"] for row in ours.rows] == [row["prediction"] for row in plain.rows]
    if policy != "full":  # which reads a question with its context where it can
        assert [row["bytes"] for row in ours.rows] == [row["bytes"] for row in plain.rows]
    found = ours.metrics["prefix"]
    assert (found["constructions"], found["requests"]) == (2, 3)  # contexts of two requests and of one
    assert ours.metrics["ttft_s"]["total"] == pytest.approx(found["ttft_hit_s"])
    assert found["ttft_miss_s"] > 0
    assert found["state_bytes"] > 1000
    assert not (ours.path / "prefix").exists()


def test_new_tokens_of_the_context_come_after_the_prefix(loaded, tmp_path):
    more = {"probe_examples": 1, "examples": 1, "policy_options": {"sinks": 2, "window": 8}}
    done = run(loaded, tmp_path, "flat", prefix="cached", new_tokens=100, **more)
    for row in done.rows:
        assert row["prefix_tokens"] + row["new_tokens"] == row["prompt_tokens"]
        assert 100 < row["new_tokens"] < 200
    assert done.metrics["prefix"]["recall_before"] == done.metrics["prefix"]["recall_after"] == 1.0
    with pytest.raises(KVBenchError, match="400 new tokens leave no prefix of a context of 400"):
        run(loaded, tmp_path, "flat", prefix="cached", new_tokens=400)
    with pytest.raises(KVBenchError, match="5 new tokens come after a cached prefix: give --prefix cached"):
        run(loaded, tmp_path, "flat", new_tokens=5)
    with pytest.raises(KVBenchError, match="'full_no_cache' keeps no cache"):
        run(loaded, tmp_path, "full_no_cache", prefix="cached")
    with pytest.raises(KVBenchError, match="is for tasks of questions, one request at a time"):
        run(loaded, tmp_path, "flat", prefix="cached", batch_size=2)
    with pytest.raises(KVBenchError, match="is for tasks of questions, one request at a time"):
        run(loaded, tmp_path, "flat", prefix="cached", task="fidelity", task_options={})


def test_the_command_line_shows_both_times_and_says_what_was_chosen_without_the_question(place, tmp_path):
    arguments = [
        "run", "--policy", "snapkv", "--model", str(place), "--context-length", "400", "--no-baseline",
        "--task", "shared_needles", "--examples", "1", "--tokens", "80", "--prefix", "cached", "--new-tokens", "32",
        "--output", str(tmp_path),
    ]  # fmt: skip
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0, shown.output
    for label in ("without the hit", "break-even requests", "recall before the new tokens", "saved state, MiB"):
        assert label in shown.output
    assert "snapkv keeps what the prompt's last queries attend to" in " ".join(shown.output.split())
    document = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    mine = next(one for one in document["runs"] if one["policy"] == "snapkv")
    assert (mine["config"]["prefix"], mine["config"]["new_tokens"]) == ("cached", 32)
    assert set(mine["metrics"]["amortised_ttft_s"]) == {"1", "2", "4", "16", "64", "256"}
    refused = CliRunner().invoke(app, [*arguments, "--prefix", "warm"])
    assert isinstance(refused.exception, KVBenchError)
    assert "--prefix warm is neither 'none' nor 'cached'" in str(refused.exception)


def test_a_stopped_run_goes_on_and_a_failed_one_leaves_no_prefix(loaded, tmp_path, monkeypatch):
    from kvbench.runs import prefixed

    whole, calls = prefixed.generate_batch, []

    def failing(*arguments, **more):
        calls.append(1)
        if len(calls) == 6:  # in the second example's hit or miss
            raise KeyboardInterrupt
        return whole(*arguments, **more)

    monkeypatch.setattr(prefixed, "generate_batch", failing)
    with pytest.raises(KeyboardInterrupt):
        run(loaded, tmp_path, "quest", prefix="cached")
    (folder,) = tmp_path.iterdir()
    assert not (folder / "prefix").exists()
    before = (folder / "examples.jsonl").read_text()
    done = run(loaded, tmp_path, "quest", prefix="cached")
    assert (folder / "examples.jsonl").read_text().startswith(before)
    assert len(done.rows) == 3


def test_costs_are_shared_out_over_requests():
    row = {
        "prefix_tokens": 90, "new_tokens": 10, "load_s": 1.0, "extend_s": 2.0, "miss_prefill_s": 6.0,
        "miss_index_s": 2.0, "miss_score": 0.5,
    }  # fmt: skip
    built = {"construct_prefill_s": 5.0, "construct_index_s": 3.0, "save_s": 2.0, "state_bytes": 100}
    found = prefix_metrics([row | built, row])
    assert found["prefix"]["break_even_requests"] == 2.0  # 10 s once, 5 s gained by each hit
    assert found["amortised_ttft_s"]["1"] == 13.0
    assert found["amortised_ttft_s"]["4"] == 5.5
    assert prefix_metrics([row | built | {"load_s": 7.0}])["prefix"]["break_even_requests"] is None
    assert prefix_metrics([{"score": 1.0}]) == {}


def test_recall_is_told_apart_by_the_tokens_of_a_step():
    trace = {"recall_at_k": {(tokens, 0): [tokens / 100, float("nan")] for tokens in (91, 100, 110, 200, 201, 203)}}
    assert recall_around(trace, 90, 200) == {"recall_before": (0.91 + 1.0) / 2, "recall_after": (2.01 + 2.03) / 2}
    assert recall_around({}, 90, 200) == {}
