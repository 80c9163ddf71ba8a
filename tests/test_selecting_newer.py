"""Double Sparsity, vAttention and MInference against slow, obvious float64 references of their papers."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from drive import Driven, drive, random_vectors
from test_fixed import PROMPTS, attach, logits
from test_strategies import watch
from tiny import shared_model, tiny_model, tokens

import kvbench
from kvbench.engine.generation import generate_batch
from kvbench.plugins import registry
from kvbench.strategies.selecting.kascade import segments

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


@pytest.mark.parametrize("policy", ["double_sparsity", "kascade", "twilight", "vattention"])
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
    policy = registry().make("policy", "minference", options)
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


def test_twilight_prunes_quests_pages_to_the_share_p_of_the_estimated_mass():
    size, candidates, budget, p = 4, 40, 36, 0.7
    sizes = set()
    for step in drive("twilight", VECTORS, budget, {"page_size": size, "candidates": candidates, "p": p}):
        pages = (step.now - 1) // size
        for row in range(2):
            for head in range(6):
                query, keys, _ = VECTORS.of(row, head, step.now)
                bounds = []
                for page in range(pages):
                    chunk = keys[page * size : page * size + size]
                    bounds.append(torch.maximum(query * chunk.amin(0), query * chunk.amax(0)).sum())
                best = torch.stack(bounds).topk(candidates // size).indices.tolist()
                known = {token: float(keys[token] @ query) / math.sqrt(8) for token in step.static(row, head)}
                found = {}
                for page in best:
                    for token in range(page * size, page * size + size):
                        low = keys[token].min().half().double()
                        unit = ((keys[token].max() - keys[token].min()) / 15).half().double()
                        codes = ((keys[token] - low) / unit).round().clamp(0, 15)
                        found[token] = float((low + codes * unit) @ query) / math.sqrt(8)
                total = sum(math.exp(x) for x in (*known.values(), *found.values()))
                mass, expected = sum(math.exp(x) for x in known.values()) / total, []
                for token in sorted(found, key=lambda token: -found[token]):
                    if mass >= p or len(expected) == budget - len(known):
                        break
                    expected.append(token)
                    mass += math.exp(found[token]) / total
                assert sorted(step.selected(row, head)) == sorted(expected)
                sizes.add(len(expected))
    assert len(sizes) > 5 and max(sizes) <= budget - 1


def test_the_best_runs_of_layers_are_found():
    torch.manual_seed(0)
    for layers, count in ((1, 1), (5, 2), (6, 3), (4, 9)):
        gain = torch.rand(layers, layers).double()

        def worth(firsts, gain=gain, layers=layers):
            return sum(float(gain[max(first for first in firsts if first <= layer), layer]) for layer in range(layers))

        several = itertools.combinations(range(1, layers), min(count, layers) - 1)
        best = max(([0, *rest] for rest in several), key=worth)
        assert segments(gain, count) == best


@torch.inference_mode()
def test_kascade_takes_the_anchors_tokens_in_the_layers_after_it():
    """In every step and layer: the exact top of the anchor's own queries and keys, for the head that was mapped."""
    model, anchors = tiny_model(pad_token_id=None, num_hidden_layers=4), 2
    probe, _ = watch("kascade", 20, tokens(2, 60, seed=8), steps=6, options={"anchors": anchors}, model=model)
    chosen, seen = {}, set()
    for layer, queries, static, selection, _, now in probe.steps:
        assert static.tolist() == [now - 1]
        for row in range(2):
            anchor = int(layer.state["anchor"][row])
            seen.add((row, anchor))
            assert anchor <= layer.ordinal and (anchor == layer.ordinal or layer.ordinal)
            for group in range(2):
                if anchor == layer.ordinal:
                    keys = probe.keys[layer.ordinal][row, group, : now - 1].double()
                    weights = sum(
                        (keys @ queries[row, head, 0].double() / math.sqrt(8)).softmax(0)
                        for head in range(group * 3, group * 3 + 3)
                    )
                    chosen[now, layer.ordinal, row, group] = set(weights.topk(19).indices.tolist())
                head = group if anchor == layer.ordinal else int(layer.state["heads"][row, group])
                assert set(selection.ids[row, group].tolist()) == chosen[now, anchor, row, head]
    assert {row for row, anchor in seen if anchor == 0} == {0, 1} and len(seen) == 2 * anchors


def test_kascade_maps_each_head_to_the_one_whose_tokens_hold_most_of_its_mass():
    policy = registry().make("policy", "kascade", {"anchors": 1, "sample": 2})
    torch.manual_seed(5)
    samples = [torch.rand(1, 2, 2, 30).double().pow(4) for _ in range(3)]
    samples = [sample / sample.sum(-1, keepdim=True) for sample in samples]
    layers = [
        SimpleNamespace(ordinal=i, rows=1, kv_heads=2, budget=SimpleNamespace(most=6), state={"sample": sample},
                        store=SimpleNamespace(device="cpu"))
        for i, sample in enumerate(samples)
    ]  # fmt: skip
    policy.after_prompt(layers, None, None)
    for layer, sample in zip(layers, samples, strict=True):
        for head in range(2):
            mass = [
                sum(float(sample[0, head, query, token]) for query in range(2)
                    for token in samples[0][0, theirs, query].topk(6).indices.tolist())
                for theirs in range(2)
            ]  # fmt: skip
            assert int(layer.state["heads"][0, head]) == mass.index(max(mass))
