"""Captured decoding steps on a GPU against captured exact attention's, as ratios with a baseline for each card."""

import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "gpu"))

pytestmark = [
    pytest.mark.bench,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
POLICIES = ("streaming_llm", "snapkv", "quest", "pqcache", "retroinfer", "kivi")
TOKENS, BUDGET, STEPS, LAYERS = 32_768, 2_048, 50, 8


@pytest.fixture(scope="module")
def exact():
    """The model of Llama-3-8B's shape with a few layers, a made-up prompt, and exact attention's step."""
    import decode

    model = decode.llama_shaped(LAYERS)
    prompt = decode.made_up(model, 1, TOKENS, whole=True)
    return model, prompt, decode.measure(model, prompt, "full", BUDGET, STEPS, Namespace(eager=False, compile=False,
                                                                                      profile=False))  # fmt: skip


@pytest.mark.parametrize("policy", POLICIES)
def test_a_captured_step_of_a_policy(policy, exact, ratio_gate):
    import decode

    model, prompt, full = exact
    row = decode.measure(model, prompt, policy, BUDGET, STEPS, Namespace(eager=False, compile=False, profile=False))
    ratio_gate.ratio(
        f"{policy} / captured exact attention, time of a step at 32K", row["p50_s"] / full["p50_s"],
        device=torch.cuda.get_device_name(),
    )  # fmt: skip
    ratio_gate.benchmark(lambda: None)
