"""Examples per minute: kvbench's batches and shared prefills against a plain transformers loop and against itself."""

import dataclasses
import os
import shutil

import pytest
import torch

from kvbench.contract.budget import Budget
from kvbench.models import load_model
from kvbench.plugins import registry
from kvbench.runs import runner
from kvbench.tasks import encode

pytestmark = pytest.mark.bench

EXAMPLES = 8


@pytest.fixture(scope="module")
def loaded():
    """The embedded model, on all cores as in a run."""
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    yield load_model("smollm2-135m")
    torch.set_num_threads(before)


def request(policy, **changes):
    budget = None if policy == "full" else Budget(ratio=0.3)
    plain = runner.Request(policy, {}, budget, "niah_single_1", {}, 512, EXAMPLES, 42, probe_examples=0)
    return dataclasses.replace(plain, **changes)


def execute(loaded, path, policies, **changes):
    shutil.rmtree(path, ignore_errors=True)
    configs = [runner.plan(request(policy, **changes), loaded) for policy in policies]
    return runner.execute(configs, loaded, path, lambda *_: None)


@pytest.mark.parametrize(
    ("name", "length", "answers"), [("niah_single_1", 512, "short answers"), ("cwe", 1024, "answers of 120 tokens")]
)
def test_a_batch_of_eight_against_a_plain_transformers_loop(ratio_gate, loaded, tmp_path, name, length, answers):
    task = registry().make("task", name)
    examples = list(task.examples(loaded.tokenizer, context_length=length, count=EXAMPLES, seed=42))
    scores, runs = [], []

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
        runs[:] = execute(loaded, tmp_path, ["full"], batch_size=EXAMPLES, task=name, context_length=length)

    title = f"full in a batch of 8 / plain transformers loop, time for 8 examples of {length} tokens with {answers}"
    ratio_gate.time(title, ours, plain, rounds=2, warm_up=False)
    assert runs[0].metrics["accuracy"]["mean"] == pytest.approx(sum(scores) / len(scores))


def test_a_shared_prefill_against_a_prefill_for_each_policy(ratio_gate, loaded, tmp_path):
    policies = ["snapkv", "streaming_llm", "quest", "full"]
    ratio_gate.time(
        "four policies with a shared prefill / each with its own, time for 8 examples of 512 tokens",
        lambda: execute(loaded, tmp_path / "shared", policies, share_prefill=True, batch_size=EXAMPLES),
        lambda: execute(loaded, tmp_path / "own", policies, batch_size=EXAMPLES),
        rounds=2,
        warm_up=False,
    )
