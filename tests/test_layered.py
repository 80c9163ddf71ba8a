"""Policies by layer: every layer does what its own policy does."""

import pytest
import torch
from test_fixed import PROMPTS
from tiny import tiny_model, tokens

import kvbench
from kvbench.contract.budget import Budget
from kvbench.contract.errors import KVBenchError
from kvbench.engine.generation import generate_batch
from kvbench.plugins import registry

WINDOW, PAGE = {"window": 8}, {"page_size": 4}


def answers(policy, options, allocator="uniform", budget=24, dense_layers=0, **how):
    with kvbench.attach(
        tiny_model(pad_token_id=None), policy=policy, options=options, dense_layers=dense_layers,
        budget=Budget(tokens=budget, allocator=allocator),
    ) as session:  # fmt: skip
        found = generate_batch(session, PROMPTS, max_new_tokens=[20] * len(PROMPTS), **how)
        return [one.tokens for one in found], session.cache.governed


@pytest.mark.parametrize("allocator", ["uniform", "pyramid", "ada"])
def test_one_policy_in_all_layers_is_that_policy(allocator):
    for one, name in (("snapkv", "snapkv@0-2~quest"), ("quest", "snapkv@7~quest"), ("h2o", "tova@5~h2o")):
        options = {"snapkv": WINDOW, "quest": PAGE}.get(one, {})
        both = {"snapkv": WINDOW, "quest": PAGE} if "quest" in name else {}
        if allocator != "uniform" and one == "quest":
            continue  # snapkv's static set is larger than quest's, so a pyramid leaves other shares
        assert answers(name, both, allocator)[0] == answers(one, options, allocator)[0]


@pytest.mark.parametrize("allocator", ["uniform", "ada"])
def test_each_layer_holds_what_its_policy_keeps(allocator):
    _, layers = answers("snapkv@0~knorm@2~quest", {"snapkv": WINDOW, "quest": PAGE, "knorm": WINDOW}, allocator)
    first, second, third = (cached.by_lane[0] for cached in layers)
    assert not first.store.holds_aside and first.store.static_tokens == 24 + 19
    assert second.store.holds_aside and "low" in second.state
    assert not third.store.holds_aside and third.store.static_tokens == 24
    assert (first.static, second.static, third.static) == ((0, 8), (0, 4), (0, 8))


def test_full_layers_are_those_left_exact():
    assert answers("full@0~snapkv", {"snapkv": WINDOW})[0] == answers("snapkv", WINDOW, dense_layers=1)[0]


def test_a_covering_budget_is_exact_and_steps_run_hook_by_hook():
    model, ids = tiny_model(pad_token_id=None), tokens(1, 60)
    exact = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)[0, 60:]
    with kvbench.attach(model, policy="snapkv@0~quest", budget=1.0) as session:
        assert generate_batch(session, [ids[0].tolist()], max_new_tokens=[12])[0].tokens == exact.tolist()
        with pytest.raises(KVBenchError, match="layers have policies of their own"):
            generate_batch(session, [ids[0].tolist()], max_new_tokens=[12], decoding="fixed")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("snapkv~quest", "must say which layers each policy has"),
        ("snapkv@0~quest@1", "must say which layers each policy has"),
        ("snapkv@3-1~quest", "end before they begin"),
        ("snapkv@x~quest", "is no policy and its layers"),
        ("snapkv@0~snapkv", "names a policy twice"),
        ("full@0~full", "'full' takes no budget"),
        ("kvzip@0~quest", "'kvzip' takes no budget or looks at all layers at once"),
        ("kivi@0~quest", "'kivi' takes no budget"),
        ("nothing@0~quest", "Unknown policy 'nothing'"),
    ],
)
def test_what_does_not_fit_is_told_in_one_sentence(name, told):
    with pytest.raises(KVBenchError, match=told):
        registry().find("policy", name)
