"""Examples per minute: kvbench's batches and shared prefills against a plain transformers loop and against itself."""

import dataclasses
import shutil

import pytest
import torch

from kvbench import runner
from kvbench.budget import Budget
from kvbench.models import load_model
from kvbench.plugins import registry
from kvbench.tasks import encode

pytestmark = pytest.mark.bench

LENGTH, EXAMPLES = 512, 8


@pytest.fixture(scope="module")
def loaded():
    return load_model("smollm2-135m")


def request(policy, **changes):
    budget = None if policy == "full" else Budget(ratio=0.3)
    plain = runner.Request(policy, {}, budget, "niah_single_1", {}, LENGTH, EXAMPLES, 42, probe_examples=0)
    return dataclasses.replace(plain, **changes)


def execute(loaded, path, policies, **changes):
    shutil.rmtree(path, ignore_errors=True)
    configs = [runner.plan(request(policy, **changes), loaded) for policy in policies]
    return runner.execute(configs, loaded, path, lambda *_: None)


def test_a_batch_of_eight_against_a_plain_transformers_loop(ratio_gate, loaded, tmp_path):
    task = registry().make("task", "niah_single_1")
    examples = list(task.examples(loaded.tokenizer, context_length=LENGTH, count=EXAMPLES, seed=42))
    scores = []

    def plain():
        scores.clear()
        for example in examples:
            ids = torch.tensor([encode(loaded.tokenizer, example).input_ids], device=loaded.device)
            out = loaded.model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=example.max_new_tokens, do_sample=False
            )
            answer = loaded.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
            scores.append(task.score(answer, example))

    def ours():
        return execute(loaded, tmp_path, ["full"], batch_size=EXAMPLES)

    (done,) = ours()
    plain()
    assert done.metrics["accuracy"]["mean"] == pytest.approx(sum(scores) / len(scores))
    ratio_gate.time("full in a batch of 8 / plain transformers loop, time for 8 examples", ours, plain, rounds=5)


def test_a_shared_prefill_against_a_prefill_for_each_policy(ratio_gate, loaded, tmp_path):
    policies = ["snapkv", "streaming_llm", "quest", "full"]
    ratio_gate.time(
        "four policies with a shared prefill / each with its own, time for 8 examples",
        lambda: execute(loaded, tmp_path / "shared", policies, share_prefill=True, batch_size=EXAMPLES),
        lambda: execute(loaded, tmp_path / "own", policies, batch_size=EXAMPLES),
        rounds=3,
    )
