"""Taking over a prompt takes at most one layer's keys and values above plain transformers' pass, and the index."""

import gc
from functools import cache

import pytest
import torch
from tiny import every_policy, of_each_kind, small_options, tiny_model, tokens
from torch.profiler import ProfilerActivity, profile

import kvbench
from kvbench.contract.budget import Budget
from kvbench.indexes import knn

LENGTHS = (1024, 3072)
TOKEN = 2 * 2 * 8 * 4  # bytes of a layer's keys and values
CLASSES = every_policy()
POLICIES = of_each_kind(sorted(name for name, policy in CLASSES.items() if policy.cached))


@cache
def model():
    """Proportions of a real model: four query heads a key/value head, an MLP of 3.5 times the hidden size."""
    return tiny_model(
        pad_token_id=None, hidden_size=64, num_attention_heads=8, num_key_value_heads=2, head_dim=8,
        intermediate_size=224, max_position_embeddings=8192,
    )  # fmt: skip


def peak_bytes(action):
    """The most bytes that torch's allocator had given out at a time during an action, above those before it."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        kept = action()
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    del kept
    return most


def batch(length, padded):
    ids, mask = tokens(2 if padded else 1, length), None
    if padded:
        mask = torch.ones_like(ids)
        mask[0, : length // 4] = 0
    return ids, mask


@cache
@torch.inference_mode()
def plain_peak(length, padded):
    ids, mask = batch(length, padded)
    model()(ids[:, :64], use_cache=True, logits_to_keep=1)
    return peak_bytes(lambda: model()(ids, attention_mask=mask, use_cache=True, logits_to_keep=1))


@torch.inference_mode()
def taken_over(policy, length, padded, **budget):
    """Peak bytes of the pass with a policy, and what its index holds afterwards."""
    cls = CLASSES[policy]
    options = small_options(cls) | ({"chunk": 256} if policy == "kvzip" else {})
    given = Budget(**(budget or {"ratio": 0.25})) if cls.takes_budget else None
    ids, mask = batch(length, padded)
    with kvbench.attach(model(), policy=policy, budget=given, options=options) as session:
        model()(ids[:, :300], use_cache=True, logits_to_keep=1)
        session.cache = None
        most = peak_bytes(lambda: model()(ids, attention_mask=mask, use_cache=True, logits_to_keep=1))
        return most, session.cache.bytes()["index"]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of scores as small beside these models as they are beside real ones."""
    monkeypatch.setattr(knn, "SCORES", 2**13)


@pytest.mark.parametrize("policy", POLICIES)
def test_the_peak_is_plain_transformers_and_one_layer_at_most(policy):
    for length in LENGTHS:
        peak, index = taken_over(policy, length, False)
        beyond = (peak - plain_peak(length, False) - index) / (TOKEN * length)
        assert beyond <= 1.02, f"{policy} takes {beyond:.2f} layers' copies more at {length} tokens"


@pytest.mark.parametrize(
    "policy", ["full", "streaming_llm", "snapkv", "h2o", "duo_attention", "quest", "squeezed_attention"]
)
def test_so_it_is_for_padded_rows(policy):
    length = LENGTHS[0]
    peak, index = taken_over(policy, length, True)
    beyond = (peak - plain_peak(length, True) - index) / (2 * TOKEN * length)
    assert beyond <= 1.02, f"{policy} takes {beyond:.2f} layers' copies more"


@pytest.mark.parametrize("budget", [{"ratio": 1.0}, {"ratio": 0.25, "allocator": "ada"}], ids=["covering", "ragged"])
@pytest.mark.parametrize("policy", ["snapkv", "h2o", "quest", "squeezed_attention", "snapkv compressing"])
def test_so_it_is_for_ragged_heads_and_budgets_that_cover(policy, budget):
    length, (policy, _, mode) = LENGTHS[0], policy.partition(" ")
    peak, index = taken_over(policy, length, False, **budget, **({"compress_every": 32} if mode else {}))
    beyond = (peak - plain_peak(length, False) - index) / (TOKEN * length)
    assert beyond <= 1.02, f"{policy} takes {beyond:.2f} layers' copies more"


def test_the_measure_sees_a_copy():
    size = 4 * 10**6
    assert peak_bytes(lambda: torch.zeros(size // 4).clone()) == 2 * size
    assert peak_bytes(lambda: torch.zeros(size // 4)) == size
