"""What attaching a policy costs, as ratios against plain transformers in the same run."""

import gc
import sys
from pathlib import Path

import pytest
import torch

import kvbench
from kvbench.models import load_model
from kvbench.runs.memory import PeakMemory

sys.path.insert(0, str(Path(__file__).parent.parent))
from tiny import tiny_model, tokens

pytestmark = pytest.mark.bench


@pytest.fixture(scope="module")
def model():
    return load_model("smollm2-135m").model


def generate(model, ids, new_tokens):
    mask = torch.ones_like(ids)
    return model.generate(
        ids, attention_mask=mask, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False
    )


def attached(model, ids, new_tokens, policy="full", budget=None):
    with kvbench.attach(model, policy=policy, budget=budget):
        return generate(model, ids, new_tokens)


def test_full_against_plain_generate_at_2k(model, ratio_gate):
    """Tokens per second of policy `full` over plain generate's: 1/ratio; the aim is a ratio of at most 1/0.95."""
    ids = tokens(1, 2048)
    torch.testing.assert_close(attached(model, ids, 8), generate(model, ids, 8))
    ratio_gate.time(
        "full / plain generate, time for 2K prompt + 32 tokens",
        lambda: attached(model, ids, 32), lambda: generate(model, ids, 32), rounds=7,
    )  # fmt: skip


def test_full_peak_memory_against_plain_generate_at_2k(model, ratio_gate, benchmark):
    """Peak memory above the model at rest; the aim is at most 1.05."""
    ids = tokens(1, 2048)
    peaks = {}
    for name, call in [("plain", generate), ("full", attached)] * 2:
        gc.collect()
        with PeakMemory(model.device) as peak:
            call(model, ids, 8)
        peaks.setdefault(name, []).append(peak.bytes)
    benchmark.pedantic(lambda: None, rounds=1)
    ratio_gate.ratio("full / plain generate, peak memory at 2K", min(peaks["full"]) / min(peaks["plain"]))


def test_hook_overhead_per_layer_and_step(ratio_gate, benchmark):
    """A model with next to no arithmetic, so that the time per step is overhead; seconds are in `extra_info`."""
    tiny, ids, steps = tiny_model(num_hidden_layers=8), tokens(1, 32), 100
    ratio = ratio_gate.time(
        "full / plain generate, time of 100 steps of a tiny model",
        lambda: attached(tiny, ids, steps), lambda: generate(tiny, ids, steps), rounds=9,
    )  # fmt: skip
    per_step = benchmark.stats.stats.median / steps / 8
    benchmark.extra_info["hook overhead per layer and step, s"] = per_step * (1 - 1 / ratio)
