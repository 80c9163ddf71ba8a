"""Fixed steps of policies with stores of their own: heads of two kinds, codes, thinner keys, blocks at a distance."""

import pytest
import torch
from test_fixed import PROMPTS, logits
from tiny import small_options, tiny_model

import kvbench
from kvbench.contract.budget import Budget
from kvbench.plugins import registry

CASES = [
    ("duo_attention", {}, "uniform"),
    ("duo_attention", {}, "ada"),
    ("duo_attention", {"sinks": 0, "recent": 1}, "uniform"),
    ("duo_attention", {"budget": 40}, "uniform"),
    ("kvzip", {}, "uniform"),
    ("kvzip", {}, "ada"),
    ("kvzip", {}, "squeeze"),
    ("expected_attention", {}, "ada"),
    ("expected_attention", {}, "squeeze"),
    ("snapkv", {}, "squeeze"),
    ("h2o", {}, "squeeze"),
    ("think", {"window": 8}, None),
    ("think", {"window": 45}, None),  # the prompt of 40 tokens has nothing to prune
    ("infllm", {}, "uniform"),
    ("infllm", {}, "ada"),
    ("infllm", {}, "pyramid"),
    ("infllm", {"init": 0, "local": 5, "block_size": 3, "representatives": 1}, "uniform"),
    ("infllm", {"budget": 40}, "uniform"),  # covers the prompt of 40 tokens, which has no block
    ("kivi", {"residual": 16, "group": 8}, None),
    ("kivi", {"residual": 24, "group": 8, "bits": 4}, None),
    ("kivi", {"residual": 64, "group": 32}, None),
]


def attach(model, policy, options, allocator):
    options = dict(options)
    budget = options.pop("budget", 24)
    found = registry().find("policy", policy)
    given = Budget(tokens=budget, allocator=allocator) if allocator else None
    return kvbench.attach(model, policy=policy, budget=given, options={**small_options(found), **options})


@pytest.mark.parametrize(("policy", "options", "allocator"), CASES)
@pytest.mark.parametrize("batch", [PROMPTS[:1], PROMPTS], ids=["one", "unequal"])
@torch.inference_mode()
def test_fixed_steps_give_the_logits_of_the_hooks(policy, options, allocator, batch):
    model = tiny_model(pad_token_id=None)
    with attach(model, policy, options, allocator) as session:
        hooks, expected = logits(session, None, 20, "eager", batch)
        fixed, found = logits(session, None, 20, "fixed", batch)
    assert [one.tokens for one in fixed] == [one.tokens for one in hooks]
    assert {one.mode for one in fixed} == {"fixed"}
    for step, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        torch.testing.assert_close(ours, theirs, rtol=3e-4, atol=3e-4, msg=lambda text, step=step: f"{step}: {text}")


def decoder(policy, options, allocator=None):
    with attach(tiny_model(pad_token_id=None), policy, options, allocator) as session, torch.inference_mode():
        session.model(torch.tensor([PROMPTS[1]]))
        found = session.fixed(torch.tensor([5]), 8, graph=False)
    assert not isinstance(found, str)
    return found.bytes(), found.reads(61)


TOKEN = 2 * 8 * 4
"""Bytes of a token's key and value in one layer and head."""


def test_duo_attention_holds_what_its_heads_keep():
    held, reads = decoder("duo_attention", {}, "uniform")
    whole = 3 * 2 * (24 - 10) // (61 - 10)  # retrieval heads; the others keep 2 sinks and 8 recent tokens
    assert whole == 1
    assert reads["device"] == (whole * 61 + (6 - whole) * 10) * TOKEN
    assert held == {"resident": (whole * 69 + (6 - whole) * 10) * TOKEN, "offloaded": 0, "index": 0}


def test_think_reads_fewer_channels_of_old_tokens():
    held, reads = decoder("think", {"window": 8})
    kept, channels = 8 - 3, 2 * 3 * 8 * 8  # int64 channel ids of each head
    pruned = 3 * 2 * 53 * (kept + 8) * 4
    assert reads["device"] == pruned + 3 * 2 * 8 * TOKEN
    assert held["resident"] >= pruned + 3 * 2 * 16 * TOKEN
    assert held["resident"] <= pruned + 3 * 2 * 16 * TOKEN + channels


def test_kivi_reads_codes_and_late_tokens():
    _, reads = decoder("kivi", {"residual": 16, "group": 8})
    keys = 48 // 8 * (8 * 8 * 2 // 8 + 2 * 8 * 2)  # groups of codes, scales and minima
    values = 45 * (8 * 2 // 8 + 2 * 2)
    late = (61 - 48 + 16) * 8 * 4
    assert reads["device"] == 3 * 2 * (keys + values + late)


def test_infllm_reads_its_blocks_from_the_host():
    held, reads = decoder("infllm", {}, "uniform")
    blocks = (61 - 8 - 2) // 4  # of 4 tokens, behind 2 initial and before 8 recent ones
    static = 61 - blocks * 4
    landmarks = 8 * 4
    assert reads["device"] == 3 * 2 * (static * TOKEN + blocks * landmarks)
    assert reads["host"] == 3 * 2 * ((24 - static) // 4 * 4) * TOKEN
    assert held["offloaded"] == 3 * 2 * ((69 - 8 - 2) // 4 * 4) * TOKEN
    assert held["resident"] == 3 * 2 * (2 + 8 + 4) * TOKEN
