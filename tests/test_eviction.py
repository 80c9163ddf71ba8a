"""Eviction policies against slow, obvious float64 references of their papers' formulas."""

import pytest
import torch
from drive import drive, random_vectors

from kvbench.contract.errors import KVBenchError


@pytest.fixture(params=["random", pytest.param("real", marks=pytest.mark.real)], scope="module")
def vectors(request):
    return request.getfixturevalue("real_vectors") if request.param == "real" else random_vectors()


def causal_weights(vectors, row, head, query):
    """Softmax weights of prompt query `query` over the tokens up to it."""
    q, keys, _ = vectors.of(row, head, query + 1)
    return (keys @ q / q.shape[0] ** 0.5).softmax(0)


def heads_of(vectors, group):
    share = vectors.queries.shape[1] // vectors.keys.shape[1]
    return range(group * share, (group + 1) * share)


def attention(vectors, row, head, now, ids):
    """Exact attention over the tokens `ids`, and its weights."""
    q, keys, values = vectors.of(row, head, now)
    weights = (keys[ids] @ q / q.shape[0] ** 0.5).softmax(0)
    return weights @ values[ids], weights


def check_outputs(vectors, step, row, head):
    output, _ = attention(vectors, row, head, step.now, step.static(row, head))
    torch.testing.assert_close(step.output[row, head, 0].double(), output, atol=1e-4, rtol=1e-4)


def test_h2o_keeps_heavy_hitters_and_recent_tokens_through_prompt_and_decoding(vectors):
    budget, recent = 24, 12
    rows, groups = vectors.keys.shape[:2]
    sums, held = {}, {}
    for row in range(rows):
        for group in range(groups):
            total = torch.zeros(vectors.prompt, dtype=torch.float64)
            for head in heads_of(vectors, group):
                for query in range(vectors.prompt):
                    total[: query + 1] += causal_weights(vectors, row, head, query)
            old = vectors.prompt - recent
            heavy = total[:old].topk(budget - recent).indices.tolist()
            held[row, group] = heavy + list(range(old, vectors.prompt))
            sums[row, group] = {token: float(total[token]) for token in held[row, group]}
    for step in drive("h2o", vectors, budget):
        new = step.now - 1
        for (row, group), kept in held.items():
            mine = sums[row, group]
            worst = min((t for t in kept if t < step.now - recent), key=lambda t: mine[t])
            kept.remove(worst)
            kept.append(new)
            mine[new] = 0.0
            for head in heads_of(vectors, group):
                assert sorted(step.static(row, head)) == sorted(kept)
                check_outputs(vectors, step, row, head)
                _, weights = attention(vectors, row, head, step.now, kept)
                for token, weight in zip(kept, weights.tolist(), strict=True):
                    mine[token] += weight


def test_h2o_sums_the_same_in_blocks(monkeypatch):
    from kvbench.kernels import columns

    vectors = random_vectors(prompt=70, steps=0)
    whole = columns.column_sums(vectors.queries, vectors.keys, 0.3)
    monkeypatch.setattr(columns, "BLOCK", 2 * 6 * 70 * 11)
    torch.testing.assert_close(columns.column_sums(vectors.queries, vectors.keys, 0.3), whole)
    torch.testing.assert_close(whole.sum(-1), torch.full((2, 2), 3 * 70.0))


def test_tova_drops_the_token_that_the_latest_query_attends_to_least(vectors):
    budget = 24
    rows = vectors.keys.shape[0]
    heads = range(vectors.queries.shape[1])
    held = {}
    for row in range(rows):
        last = torch.stack([causal_weights(vectors, row, head, vectors.prompt - 1) for head in heads]).mean(0)
        held[row] = [*last[:-1].topk(budget - 1).indices.tolist(), vectors.prompt - 1]
    latest = {
        row: torch.stack([causal_weights(vectors, row, head, vectors.prompt - 1)[held[row]] for head in heads]).mean(0)
        for row in range(rows)
    }
    for step in drive("tova", vectors, budget):
        for row, kept in held.items():
            kept.pop(int(latest[row].argmin()))
            kept.append(step.now - 1)
            for head in heads:
                assert sorted(step.static(row, head)) == sorted(kept)
                check_outputs(vectors, step, row, head)
            latest[row] = torch.stack(
                [attention(vectors, row, head, step.now, kept)[1] for head in heads]
            ).mean(0)  # fmt: skip


def evict_by(vectors, policy, budget, options, score):
    """Run a policy whose scores depend on the keys held alone: `score(keys [t, d])` gives [t], the best are kept."""
    window = options.get("window", 1)
    held = {}
    for row in range(vectors.keys.shape[0]):
        for group in range(vectors.keys.shape[1]):
            keys = vectors.keys[row, group, : vectors.prompt].double()
            old = vectors.prompt - window
            best = score(keys)[:old].topk(budget - window).indices.tolist()
            held[row, group] = best + list(range(old, vectors.prompt))
    for step in drive(policy, vectors, budget, options):
        for (row, group), kept in held.items():
            kept.append(step.now - 1)
            scores = score(vectors.keys[row, group, kept].double())
            worst = min((i for i, t in enumerate(kept) if t < step.now - window), key=lambda i: float(scores[i]))
            kept.pop(worst)
            for head in heads_of(vectors, group):
                assert sorted(step.static(row, head)) == sorted(kept)
                check_outputs(vectors, step, row, head)


@pytest.mark.parametrize("window", [1, 8])
def test_knorm_keeps_the_smallest_keys(vectors, window):
    evict_by(vectors, "knorm", 24, {"window": window}, lambda keys: -(keys**2).sum(-1).sqrt())


@pytest.mark.parametrize("window", [1, 8])
def test_keydiff_keeps_the_keys_least_like_their_mean_direction(vectors, window):
    def score(keys):
        directions = keys / (keys**2).sum(-1, keepdim=True).sqrt()
        anchor = directions.mean(0)
        return -(directions @ anchor) / (anchor @ anchor).sqrt()

    evict_by(vectors, "keydiff", 24, {"window": window}, score)


@pytest.mark.parametrize(
    "options", [{"window": 8, "kernel": 5}, {"window": 8, "kernel": 7, "pooling": "max"}], ids=["avg", "longbench"]
)
def test_snapkv_keeps_what_the_observation_window_votes_for(vectors, options):
    """The second case is the LongBench setting: window 8, kernel 7, max pooling."""
    window, kernel, budget = 8, options["kernel"], 24
    before, half = vectors.prompt - window, kernel // 2
    steps = list(drive("snapkv", vectors, budget, options))
    for row in range(vectors.keys.shape[0]):
        for group in range(vectors.keys.shape[1]):
            votes = []
            for head in heads_of(vectors, group):
                sums = torch.zeros(before, dtype=torch.float64)
                for query in range(before, vectors.prompt):
                    sums += causal_weights(vectors, row, head, query)[:before]
                pooled = []
                for token in range(before):
                    near = sums[max(token - half, 0) : token + half + 1]
                    pooled.append(near.max() if options.get("pooling") == "max" else near.sum() / kernel)
                votes.append(torch.stack(pooled))
            mean = torch.stack(votes).mean(0)
            kept = set(steps[0].layer.store.static_ids[row, group, : budget - window].tolist())
            # Max pooling gives neighbours equal votes, so compare the votes of what is kept.
            best = mean.topk(budget - window).values.sum()
            assert float(mean[list(kept)].sum()) == pytest.approx(float(best), rel=1e-5)
            assert len(kept) == budget - window
            for head in heads_of(vectors, group):
                generated = list(range(vectors.prompt, steps[-1].now))
                expected = sorted(kept) + list(range(before, vectors.prompt)) + generated
                assert sorted(steps[-1].static(row, head)) == expected
                check_outputs(vectors, steps[-1], row, head)


def test_streaming_llm_attends_to_sinks_and_window(vectors):
    for step in drive("streaming_llm", vectors, 20, {"sinks": 3}):
        for row in range(vectors.keys.shape[0]):
            for head in range(vectors.queries.shape[1]):
                assert sorted(step.static(row, head)) == [0, 1, 2, *range(step.now - 17, step.now)]
                check_outputs(vectors, step, row, head)


def test_slots_are_evicted_from_ragged_storage_too():
    """Heads that keep different numbers of tokens: the ragged part and the tail lose a token each, chosen per head."""
    from kvbench.contract.storage import KVStore

    torch.manual_seed(0)
    keys, values = torch.randn(2, 2, 40, 4), torch.randn(2, 2, 40, 4)
    store = KVStore(keys[:, :, :30].clone(), values[:, :, :30].clone())
    kept = torch.rand(2, 2, 30) < 0.4
    store.keep(kept)
    held = {(b, g): kept[b, g].nonzero().squeeze(-1).tolist() for b in range(2) for g in range(2)}
    random = torch.Generator().manual_seed(1)
    for new in range(30, 40):
        store.append(keys[:, :, new : new + 1], values[:, :, new : new + 1])
        ids = store.static_ids
        lots = torch.rand(ids.shape, generator=random).masked_fill(ids < 0, -1)
        slots = lots.argmax(-1)
        for (b, g), mine in held.items():
            mine.append(new)
            mine.remove(int(ids[b, g, slots[b, g]]))
        store.evict_slots(slots)
        found = torch.cat([part[0] for part in store.static_parts()], dim=2)
        for (b, g), mine in held.items():
            row_ids = store.static_ids[b, g]
            assert sorted(row_ids[row_ids >= 0].tolist()) == sorted(mine)
            for slot, token in enumerate(row_ids.tolist()):
                if token >= 0:
                    assert torch.equal(found[b, g, slot], keys[b, g, token])


def test_a_window_larger_than_the_budget_is_refused():
    from tiny import tiny_model, tokens

    import kvbench

    model = tiny_model()
    with (
        kvbench.attach(model, policy="knorm", budget=10, options={"window": 16}),
        pytest.raises(KVBenchError, match="smaller than the policy's static set of 16"),
    ):
        model(tokens(1, 60))
