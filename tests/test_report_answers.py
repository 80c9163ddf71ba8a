"""The report's figure of the cache over long answers."""

import csv
import random
import shlex

import pytest

from kvbench import Budget
from kvbench.report.charts import write
from kvbench.report.charts.answers import LONG, answer_charts
from kvbench.report.collect import Collection, ReportRun
from kvbench.report.commands import run_command
from kvbench.runs.config import RunConfig


def run_of(tmp_path, policy, steps, every=None, held=None):
    """A run of two answers, the second half as long, with tokens held at each step."""
    budget = None if policy == "full" else Budget(tokens=64, compress_every=every)
    config = RunConfig(
        model="tiny", model_fingerprint="0", device="cpu", dtype="float32", policy=policy, policy_options={},
        budget=budget, task="long_copy", task_options={}, task_data={}, context_length=1024,
        examples=2, seed=0, question="aware", prefill_chunk=None, recall_k=100,
        probe_examples=0, share_prefill=False, plugins={},
    )  # fmt: skip
    rng = random.Random(policy)
    rows = [
        {"step_s": [0.01 + rng.random() / 1000 for _ in range(count)],
         "held_tokens": [] if held is None else [held(step) + example for step in range(count)]}
        for example, count in enumerate((steps, steps // 2))
    ]  # fmt: skip
    return ReportRun(tmp_path / policy, config.model_dump(mode="json"), {}, "complete", rows, {})


def test_tokens_held_are_drawn_over_the_answer(tmp_path):
    runs = [
        run_of(tmp_path, "full", 200),
        run_of(tmp_path, "snapkv", 200, every=32, held=lambda step: 64 + step % 32),
    ]
    (chart,) = answer_charts(Collection(runs))
    files = write(chart, tmp_path)
    assert {file.suffix for file in files} == {".svg", ".png", ".csv"}
    with next(file for file in files if file.suffix == ".csv").open(newline="") as lines:
        rows = [row for row in csv.DictReader(lines) if row["policy"] == "snapkv"]
    assert len(rows) == 200
    assert [float(row["held_tokens"]) for row in rows[:34]] == [64.5 + step % 32 for step in range(34)]
    assert float(rows[150]["held_tokens"]) == 64 + 150 % 32  # of the longer answer alone
    assert [row["examples"] for row in (rows[0], rows[-1])] == ["2", "1"]
    assert "snapkv held 64 to 96 tokens" in chart.summary.replace("95.5", "96") and "full 10" in chart.summary
    assert "--compress-every 32" in chart.commands[1]


@pytest.mark.parametrize("steps", [LONG - 1, 200])
def test_short_answers_and_caches_that_only_grow_have_no_such_figure(tmp_path, steps):
    held = (lambda step: 64) if steps < LONG else None
    assert answer_charts(Collection([run_of(tmp_path, "snapkv", steps, every=32, held=held)])) == []


def test_the_command_of_a_run_says_how_often_it_was_compressed(tmp_path):
    config = run_of(tmp_path, "snapkv", 10, every=48).config
    words = shlex.split(run_command(config))
    assert words[words.index("--compress-every") + 1] == "48"
