"""Policies of 2024 to 2026 that select, against slow, obvious float64 references of their papers."""

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
from kvbench.strategies.compressing.turboquant import rotation
from kvbench.strategies.selecting.kascade import segments
from kvbench.strategies.selecting.pariskv import TIERS, magnitudes
from kvbench.strategies.selecting.rocketkv import split

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


@pytest.mark.parametrize(
    ("policy", "allocator"),
    [
        *itertools.product(("double_sparsity", "kascade", "pariskv", "twilight", "vattention"), ("uniform", "ada")),
        ("rocketkv", "pyramid"),
    ],
)
@torch.inference_mode()
def test_fixed_steps_give_the_logits_of_the_hooks(policy, allocator):
    model = tiny_model(pad_token_id=None)
    with attach(model, policy, allocator=allocator) as session:
        hooks, expected = logits(session, None, 20, "eager", PROMPTS)
        fixed, found = logits(session, None, 20, "fixed", PROMPTS)
    assert [one.tokens for one in fixed] == [one.tokens for one in hooks]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-4)


def test_pariskv_has_the_published_magnitudes():
    """The levels that the authors' repository lists for blocks of eight, but for what more rounds of Lloyd's give."""
    published = torch.tensor([0.042, 0.127, 0.213, 0.303, 0.397, 0.500, 0.617, 0.763])
    assert (magnitudes(8) - published).abs().max() < 4e-3
    torch.manual_seed(0)
    drawn = torch.nn.functional.normalize(torch.randn(400_000, 8), dim=1)[:, 0].abs()
    ours, theirs = ((drawn[:, None] - levels).square().amin(1).mean() for levels in (magnitudes(8), published))
    assert 0.99 * theirs < ours < theirs


def test_pariskv_ranks_the_keys_with_most_votes_by_their_four_bit_estimates():
    """Slowly: pattern by pattern, tier by tier, channel by channel."""
    block, candidates, collisions, budget = 4, 0.4, 0.3, 24
    options = {"sinks": 2, "window": 8, "block": block, "candidates": candidates, "collisions": collisions, "update": 3}
    turn, levels, seen = rotation(8, 0).double(), magnitudes(block).double(), set()
    edges = (levels[1:] + levels[:-1]) / 2
    for step in drive("pariskv", VECTORS, budget, options):
        store = step.layer.store
        first, count = store.aside_start, store.aside_stop - store.aside_start
        seen.add(count)
        for row, group in itertools.product(range(2), range(2)):
            queries = torch.stack([VECTORS.of(row, head, step.now)[0] for head in range(group * 3, group * 3 + 3)])
            _, keys, _ = VECTORS.of(row, group * 3, step.now)
            asked, keys = queries @ turn, keys[first : first + count] @ turn
            votes, coded = [0] * count, torch.zeros(count, 8).double()
            for start in range(0, 8, block):
                mine, asking = keys[:, start : start + block], asked.mean(0)[start : start + block]
                patterns = [tuple(bool(x >= 0) for x in key) for key in mine]
                worth = {p: sum(float(q) * (1 if positive else -1) for q, positive in zip(asking, p, strict=True))
                         for p in itertools.product((False, True), repeat=block)}  # fmt: skip
                for tier in TIERS:
                    taken = 0
                    for pattern in sorted(worth, key=lambda p: -worth[p]):
                        if taken >= math.ceil(count * collisions * tier):
                            break
                        inside = [place for place, other in enumerate(patterns) if other == pattern]
                        taken += len(inside)
                        for place in inside:
                            votes[place] += 1
                for place, key in enumerate(mine):
                    unit = key / key.norm()
                    code = levels[torch.bucketize(unit.abs(), edges)] * torch.where(unit >= 0, 1.0, -1.0).double()
                    coded[place, start : start + block] = code * (key.norm() / (code @ unit)).half().double()
            wanted = budget - len(step.static(row, group * 3))
            ranked = sorted(range(count), key=lambda place: (-votes[place], place))
            ranked = ranked[: max(math.ceil(count * candidates), wanted)]
            weights = ((asked @ coded[ranked].T) / math.sqrt(8)).softmax(-1).sum(0)
            best = [ranked[place] + first for place in weights.topk(wanted).indices.tolist()]
            assert sorted(step.selected(row, group * 3)) == sorted(best)
    assert len(seen) > 3  # tokens left the window, several at a time


def test_rocketkv_keeps_what_the_window_attends_to_and_selects_pages_of_it_on_the_heaviest_channels():
    window, kernel, size, channels, budget = 8, 5, 3, 4, 24
    options = {"window": window, "kernel": kernel, "page_size": size, "channels": channels / 8}
    prompt, old, kept = VECTORS.prompt, VECTORS.prompt - window, {}
    ratio = prompt / budget
    count = math.ceil(prompt / ratio ** min(0.2 + 0.06 * math.log2(ratio), 0.8))
    assert budget < count < prompt
    full = (count - 1) // size * size
    for row, group in itertools.product(range(2), range(2)):
        votes = torch.zeros(old).double()
        for head in range(group * 3, group * 3 + 3):
            mine = torch.zeros(old).double()
            for query in range(old, prompt):
                asked, keys, _ = VECTORS.of(row, head, query + 1)
                mine += (keys @ asked / math.sqrt(8)).softmax(0)[:old]
            votes += torch.stack([mine[max(at - 2, 0) : at + 3].max() for at in range(old)])
        best = sorted(range(old), key=lambda at: (-float(votes[at]), at))[: count - window]
        kept[row, group] = float(votes[best[-1]]), votes, best
    for step in drive("rocketkv", VECTORS, budget, options):
        aside = step.layer.store.aside
        assert step.layer.store.aside.nbytes >= 2 * 2 * full * 8 * 4 * 2
        pages = (count + step.now - prompt - 1) // size
        for row, group in itertools.product(range(2), range(2)):
            held = aside.places()[row, group].tolist()
            least, votes, best = kept[row, group]
            mine = [token for token in held if token < old]
            # max-pooling gives neighbours equal votes, which may stand for each other
            assert len(mine) == len(best) and min(float(votes[token]) for token in mine) >= least - 1e-6
            assert held == sorted(held) and set(range(old, prompt - (count - full))) <= set(held)
            assert len(held) == pages * size
            queries = torch.stack([VECTORS.of(row, head, step.now)[0] for head in range(group * 3, group * 3 + 3)])
            _, keys, _ = VECTORS.of(row, group * 3, step.now)
            heavy = queries.abs().sum(0).topk(channels).indices
            bounds = []
            for page in range(pages):
                chunk = keys[held[page * size : page * size + size]][:, heavy]
                ends = queries[:, heavy] * chunk.amin(0), queries[:, heavy] * chunk.amax(0)
                bounds.append(torch.maximum(*ends).sum())
            static = step.static(row, group * 3)
            assert static == list(range(step.now - len(static), step.now)) and 1 <= len(static) <= size
            top = torch.stack(bounds).topk((budget - len(static)) // size).indices.tolist()
            expected = [token for page in top for token in held[page * size : page * size + size]]
            assert sorted(step.selected(row, group * 3)) == sorted(expected)


def test_rocketkv_splits_the_compression_as_published():
    """α = min(0.2 + 0.06 · log₂ c, 0.8): a quarter of the tokens is 0.32 of the two factors of 2, and so on."""
    assert split(4096, 1024) == math.ceil(4096 / 4**0.32)
    assert split(131072, 512) == math.ceil(131072 / 256**0.68)
    assert split(2**24, 2**12) == math.ceil(2**24 / 2 ** (12 * 0.8))  # its upper end
    assert split(100, 100) == split(100, 200) == 100


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
