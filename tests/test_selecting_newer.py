"""Double Sparsity, vAttention and MInference against slow, obvious float64 references of their papers."""

import math
from types import SimpleNamespace

import pytest
import torch
from drive import Driven, drive, random_vectors
from test_fixed import PROMPTS, attach, logits
from tiny import shared_model, tiny_model, tokens

import kvbench
from kvbench.engine.generation import generate_batch

VECTORS = random_vectors(prompt=90, steps=20)


def logits_of(row, head, now):
    query, keys, _ = VECTORS.of(row, head, now)
    return keys @ query / keys.shape[1] ** 0.5


def test_double_sparsity_takes_the_best_scores_on_the_heaviest_channels():
    options = {"sinks": 2, "window": 8, "channels": 0.5, "calibration": 16}
    for step in drive("double_sparsity", VECTORS, 30, options):
        for row in range(2):
            for head in range(6):
                group, last = head // 3, VECTORS.prompt
                asked = VECTORS.queries[row, group * 3 : group * 3 + 3, last - 16 : last].double()
                prompt = VECTORS.keys[row, group, 2 : last - 8].double()
                heavy = (asked.abs().mean((0, 1)) * prompt.abs().mean(0)).topk(4).indices
                low, high = prompt[:, heavy].min(0).values, prompt[:, heavy].max(0).values
                aside = range(step.layer.store.aside_start, step.layer.store.aside_stop)
                query, keys, _ = VECTORS.of(row, head, step.now)
                codes = ((keys[list(aside)][:, heavy] - low) / (high - low) * 15).round().clamp(0, 15)
                scores = (low + codes / 15 * (high - low)) @ query[heavy]
                wanted = 30 - len(step.static(row, head))
                mine = [i - aside.start for i in step.selected(row, head)]
                # tokens of equal codes may stand for each other
                torch.testing.assert_close(scores[mine].sort().values, scores.topk(wanted).values.sort().values)


def denominators(epsilon, delta, budget, seeds):
    """How far the estimated softmax denominators are off, and how many tokens they took."""
    off, taken = [], []
    vectors = random_vectors(batch=1, prompt=900, steps=1, seed=4)
    vectors.queries.mul_(0.4)  # spread over many tokens
    for seed in range(seeds):
        options = {"sinks": 2, "window": 8, "top": 0.1, "base": 0.05, "epsilon": epsilon, "delta": delta, "seed": seed}
        step = Driven("vattention", vectors, budget, options).step()
        for head in range(6):
            query, keys, _ = vectors.of(0, head, step.now)
            exact = (keys @ query / math.sqrt(8)).exp()
            ids, weights = step.selection.ids[0, head], step.selection.log_weights[0, head].double()
            real = ids >= 0
            assert len(set(ids[real].tolist())) == int(real.sum())
            found = exact[step.static(0, head)].sum() + (exact[ids[real]] * weights[real].exp()).sum()
            off.append(float((found / exact.sum() - 1).abs()))
            taken.append(int(real.sum()))
    return torch.tensor(off), torch.tensor(taken)


@pytest.mark.parametrize(("epsilon", "delta"), [(0.1, 0.1), (0.05, 0.2)])
def test_vattention_keeps_its_promise(epsilon, delta):
    """The softmax's denominator is within epsilon with probability 1 − delta at least, by fewer tokens than all."""
    off, taken = denominators(epsilon, delta, 700, 50)
    assert float((off > epsilon).double().mean()) <= delta
    assert off.max() > epsilon / 10  # it is an estimate
    assert taken.max() <= 690


def test_vattention_samples_more_for_a_smaller_error_and_never_beyond_the_budget():
    wide, narrow, cut = (
        denominators(epsilon, 0.1, budget, 5)[1] for epsilon, budget in ((0.3, 700), (0.1, 700), (0.01, 100))
    )
    assert wide.double().mean() < narrow.double().mean()
    assert cut.max() <= 90


def test_vattention_estimates_the_output_without_bias():
    vectors = random_vectors(batch=1, prompt=300, steps=1, seed=2)
    vectors.queries.mul_(0.3)
    outputs = []
    for seed in range(200):
        options = {"sinks": 2, "window": 8, "top": 0.2, "epsilon": 0.2, "seed": seed}
        outputs.append(Driven("vattention", vectors, 120, options).step().output[0, :, 0].double())
    for head in range(6):
        query, keys, values = vectors.of(0, head, 301)
        exact = (keys @ query / math.sqrt(8)).softmax(0) @ values
        found = torch.stack(outputs)[:, head]
        error = found.std(0) / math.sqrt(len(outputs))
        assert ((found.mean(0) - exact).abs() < 5 * error + 0.01).all()


@pytest.mark.parametrize("policy", ["double_sparsity", "vattention"])
@pytest.mark.parametrize("allocator", ["uniform", "ada"])
@torch.inference_mode()
def test_fixed_steps_give_the_logits_of_the_hooks(policy, allocator):
    model = tiny_model(pad_token_id=None)
    with attach(model, policy, allocator=allocator) as session:
        hooks, expected = logits(session, None, 20, "eager", PROMPTS)
        fixed, found = logits(session, None, 20, "fixed", PROMPTS)
    assert [one.tokens for one in fixed] == [one.tokens for one in hooks]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-4)


def test_minference_attends_along_the_lines_that_its_last_queries_choose():
    options = {"vertical": 9, "slash": 11, "last": 7, "first": 2, "nearest": 3}
    vectors = random_vectors(batch=2, prompt=60, steps=0)
    policy = kvbench.plugins.registry().make("policy", "minference", options)
    view = SimpleNamespace(heads=6, kv_heads=2, scaling=8**-0.5)
    found = policy.attend_prompt(view, vectors.queries, vectors.keys, vectors.values).double()
    for row in range(2):
        for head in range(6):
            queries = vectors.queries[row, head].double()
            keys, values = vectors.keys[row, head // 3].double(), vectors.values[row, head // 3].double()
            columns, lines = torch.zeros(60).double(), torch.zeros(60).double()
            for query in range(53, 60):
                weights = (keys[: query + 1] @ queries[query] / math.sqrt(8)).softmax(0)
                columns[: query + 1] += weights
                for token, weight in enumerate(weights):
                    lines[query - token] += weight
            columns[:2], lines[:3] = math.inf, math.inf
            vertical, slash = (set(x.topk(k).indices.tolist()) for x, k in ((columns, 9), (lines, 11)))
            for query in range(60):
                seen = [token for token in range(query + 1) if token in vertical or query - token in slash]
                weights = (keys[seen] @ queries[query] / math.sqrt(8)).softmax(0)
                torch.testing.assert_close(found[row, head, query], weights @ values[seen], rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_minference_changes_the_prompt_alone_and_is_exact_where_its_lines_cover_it():
    model, prompt = shared_model(), tokens(1, 80, seed=1)[0].tolist()
    answers = {}
    for name, options in (
        ("full", {}),
        ("wide", {}),
        ("narrow", {"vertical": 4, "slash": 4, "first": 1, "nearest": 1}),
    ):
        with kvbench.attach(model, policy="full" if name == "full" else "minference", options=options) as session:
            (answers[name],) = generate_batch(session, [prompt], max_new_tokens=[8])
            stores = session.cache.stores() if name != "full" else []
            assert all(store.static_tokens == 87 for store in stores)
    assert answers["wide"].tokens == answers["full"].tokens
    assert answers["narrow"].tokens != answers["full"].tokens
