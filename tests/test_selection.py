"""Selecting policies against slow, obvious float64 references of their papers' formulas."""

import math

import pytest
import torch
from drive import Driven, Vectors, drive, random_vectors
from tiny import small_options

from kvbench.indexes.kmeans import cluster_sums, kmeans
from kvbench.indexes.lsh import HashTables, collision_probability
from kvbench.plugins import registry

STATIC = {"sinks": 2, "window": 8}


@pytest.fixture(params=["random", pytest.param("real", marks=pytest.mark.real)], scope="module")
def vectors(request):
    return request.getfixturevalue("real_vectors") if request.param == "real" else random_vectors()


def pairs(vectors):
    """Every row, head and the head's group."""
    share = vectors.queries.shape[1] // vectors.keys.shape[1]
    return [(r, h, h // share) for r in range(vectors.keys.shape[0]) for h in range(vectors.queries.shape[1])]


def logits_of(vectors, row, head, now):
    query, keys, _ = vectors.of(row, head, now)
    return keys @ query / query.shape[0] ** 0.5


def lloyd(points, clusters, rounds, spherical=False):
    """k-means of points [n, d] in float64, from evenly spread points; centroids and assignments."""
    points = points.double()
    if spherical:
        points = points / points.norm(dim=-1, keepdim=True)
    centroids = points[torch.linspace(0, len(points) - 1, clusters).long()].clone()
    for _ in range(rounds):
        assigned = torch.cdist(points, centroids).argmin(-1)
        for cluster in range(clusters):
            mine = points[assigned == cluster]
            if len(mine):
                centroids[cluster] = mine.mean(0)
                if spherical:
                    centroids[cluster] /= centroids[cluster].norm()
    return centroids, torch.cdist(points, centroids).argmin(-1)


@pytest.mark.parametrize("spherical", [False, True])
def test_kmeans_of_many_sets_equals_lloyds_of_each(spherical):
    points = torch.randn(5, 120, 8, generator=torch.Generator().manual_seed(0))
    centroids, assigned = kmeans(points, 9, 10, spherical=spherical)
    for number in range(5):
        expected, labels = lloyd(points[number], 9, 10, spherical)
        torch.testing.assert_close(centroids[number].double(), expected, atol=1e-5, rtol=1e-4)
        assert torch.equal(assigned[number], labels)


def test_points_are_added_up_one_by_one():
    points = torch.randn(3, 120, 8, generator=torch.Generator().manual_seed(0))
    assigned = torch.randint(9, (3, 120), generator=torch.Generator().manual_seed(1))
    assigned[assigned == 4] = 5
    sums, sizes = cluster_sums(points, assigned, 9)
    for number in range(3):
        for cluster in range(9):
            mine = points[number, assigned[number] == cluster].double()
            torch.testing.assert_close(sums[number, cluster].double(), mine.sum(0), atol=1e-5, rtol=1e-5)
            assert sizes[number, cluster] == len(mine)


DRIVEN = [
    "flat", "hnsw", "ivf", "ivfpq", "magicpig", "oracle_topk", "oracle_topp", "pqcache", "quest", "random", "retrieval",
    "retroinfer", "robust_vamana", "squeezed_attention", "vamana", "cagra",
]  # fmt: skip


@pytest.mark.parametrize("policy", DRIVEN)
def test_the_output_is_attention_over_static_and_selected_tokens_with_weights_and_summaries(policy):
    vectors = random_vectors(steps=20)
    for step in drive(policy, vectors, 40, small_options(registry().find("policy", policy))):
        for row, head, group in pairs(vectors):
            query, keys, values = vectors.of(row, head, step.now)
            static, selected = step.static(row, head), step.selected(row, head)
            logits = keys @ query / query.shape[0] ** 0.5
            parts, rows = [logits[static], logits[selected]], [values[static], values[selected]]
            if step.selection.log_weights is not None:
                weights = step.selection.log_weights[row, head].double()
                parts[1] = parts[1] + weights[step.selection.ids[row, head] >= 0]
            if step.selection.summary is not None:
                parts.append(step.selection.summary[0][row, head].double())
                rows.append(step.selection.summary[1][row, group].double())
            expected = torch.cat(parts).softmax(0) @ torch.cat(rows)
            torch.testing.assert_close(step.output[row, head, 0].double(), expected, atol=1e-4, rtol=1e-4)


def test_quest_takes_the_pages_of_its_bound(vectors):
    size, budget = 4, 24
    for step in drive("quest", vectors, budget, {"page_size": size}):
        pages = (step.now - 1) // size
        for row, head, _ in pairs(vectors):
            query, keys, _ = vectors.of(row, head, step.now)
            bounds = []
            for page in range(pages):
                chunk = keys[page * size : page * size + size]
                bounds.append(torch.maximum(query * chunk.amin(0), query * chunk.amax(0)).sum())
            assert sorted(step.static(row, head)) == list(range(pages * size, step.now))
            best = torch.stack(bounds).topk((budget - step.now + pages * size) // size).indices.tolist()
            expected = {page * size + offset for page in best for offset in range(size)}
            assert set(step.selected(row, head)) == expected


@pytest.mark.parametrize("policy", ["flat", "oracle_topk"])
def test_exact_top_k(vectors, policy):
    options = STATIC if policy == "flat" else {}
    for step in drive(policy, vectors, 30, options):
        for row, head, _ in pairs(vectors):
            static = step.static(row, head)
            aside = sorted(set(range(step.now)) - set(static))
            logits = logits_of(vectors, row, head, step.now)[aside]
            assert set(step.selected(row, head)) == {aside[i] for i in logits.topk(30 - len(static)).indices.tolist()}
            if policy == "oracle_topk":
                assert static == [step.now - 1]


@pytest.mark.parametrize("policy", ["retrieval", "robust_vamana", "vamana", "cagra", "hnsw", "ivf", "ivfpq"])
def test_indexes_find_most_of_the_exact_top(policy):
    """So few keys that a search sees most of them: what a policy hands to its index and takes from it is right."""
    vectors, hits, total = random_vectors(prompt=150), 0, 0
    for step in drive(policy, vectors, 40, small_options(registry().find("policy", policy))):
        for row, head, _ in pairs(vectors):
            aside = sorted(set(range(step.now)) - set(step.static(row, head)))
            selected = step.selected(row, head)
            logits = logits_of(vectors, row, head, step.now)[aside]
            best = {aside[i] for i in logits.topk(len(selected)).indices.tolist()}
            hits, total = hits + len(best & set(selected)), total + len(selected)
    assert hits / total > 0.9


@pytest.mark.parametrize("capped", [True, False])
def test_oracle_topp_takes_the_fewest_tokens_that_reach_p(vectors, capped):
    cut = 0
    for step in drive("oracle_topp", vectors, 20, {"p": 0.8, "capped": capped}):
        for row, head, _ in pairs(vectors):
            weights = logits_of(vectors, row, head, step.now).softmax(0)
            newest, selected = step.now - 1, step.selected(row, head)
            others = weights.clone()
            others[newest] = 0
            best = others.sort(descending=True)
            mass, count = float(weights[newest]), 0
            while mass < 0.8:
                mass += float(best.values[count])
                count += 1
            cut += count > 19
            if capped:
                count = min(count, 19)
            assert set(selected) == set(best.indices[:count].tolist())
    assert cut > 0


def test_random_draws_anew_for_every_head_and_step_and_again_for_the_same_seed():
    vectors = random_vectors(batch=1, steps=60)

    def draws(seed):
        return [[tuple(sorted(step.selected(0, head))) for head in range(6)]
                for step in drive("random", vectors, 30, {**STATIC, "seed": seed})]  # fmt: skip

    first = draws(0)
    assert first == draws(0)
    assert first != draws(1)
    flat = [head for step in first for head in step]
    assert len(set(flat)) == len(flat)
    counts = torch.zeros(150)
    for chosen in flat:
        assert len(set(chosen)) == len(chosen)
        counts[list(chosen)] += 1
    drawn = counts[2:80] / len(flat)
    # Between 14 and 20 of 80 to 138 tokens are drawn: each token about as often as the others.
    assert float(drawn.std()) < 4 * math.sqrt(float(drawn.mean()) / len(flat))


def test_pqcache_takes_the_top_of_the_codes_scores(vectors):
    budget, m, bits, rounds = 40, 2, 4, 10
    d = vectors.keys.shape[-1]
    first, stop = 2, vectors.prompt - 8
    centroids = {}
    for row, _, group in pairs(vectors):
        for part in range(m):
            keys = vectors.keys[row, group, first:stop, part * d // m : (part + 1) * d // m]
            centroids.setdefault((row, group, part), lloyd(keys, 2**bits, rounds)[0])
    share = vectors.queries.shape[1] // vectors.keys.shape[1]
    options = {**STATIC, "subspaces": m, "bits": bits, "rounds": rounds}
    for step in drive("pqcache", vectors, budget, options):
        for row, head, group in pairs(vectors):
            if head % share:
                continue
            aside = sorted(set(range(step.now)) - set(step.static(row, head)))
            total = torch.zeros(len(aside), dtype=torch.float64)
            for mine in range(head, head + share):
                query, keys, _ = vectors.of(row, mine, step.now)
                scores = torch.zeros(len(aside), dtype=torch.float64)
                for part in range(m):
                    channels = slice(part * d // m, (part + 1) * d // m)
                    words = centroids[row, group, part]
                    nearest = torch.cdist(keys[aside][:, channels], words).argmin(-1)
                    scores += words[nearest] @ query[channels]
                total += (scores / d**0.5).softmax(0)
            wanted = budget - len(step.static(row, head))
            chosen = step.selected(row, head)
            assert len(set(chosen)) == wanted
            # Tokens of equal codes tie, so compare what the chosen tokens are worth.
            worth = total[[aside.index(token) for token in chosen]].sum()
            torch.testing.assert_close(worth, total.topk(wanted).values.sum(), rtol=1e-5, atol=1e-9)
    codes = vectors.keys.shape[0] * vectors.keys.shape[1] * (len(aside) * m + 2**bits * d * 4)
    assert step.layer.store.index_bytes == codes


def test_squeezed_attention_takes_the_clusters_above_the_calibrated_threshold(vectors):
    budget, window, calibration = 40, 8, min(64, vectors.prompt)
    stop, d = vectors.prompt - window, vectors.keys.shape[-1]
    number = round(0.1 * stop)
    heads = vectors.queries.shape[1]
    labels, means = {}, {}
    for row, _, group in pairs(vectors):
        keys = vectors.keys[row, group, :stop].double()
        labels[row, group] = lloyd(keys, number, 10, spherical=True)[1]
        means[row, group] = [keys[labels[row, group] == c].mean(0) for c in range(number)]

    def estimates(row, group, query):
        """Weight of an average token, by cluster."""
        sizes = [int((labels[row, group] == c).sum()) for c in range(number)]
        scores = [math.exp(float(query @ mean) / d**0.5) if n else 0.0
                  for mean, n in zip(means[row, group], sizes, strict=True)]  # fmt: skip
        total = sum(n * score for n, score in zip(sizes, scores, strict=True))
        return [(score / total, n, c) for c, (score, n) in enumerate(zip(scores, sizes, strict=True))]

    def most(found, tokens):
        """The best clusters that together have no more than so many tokens."""
        taken = 0
        for weight, n, *where in sorted(found, key=lambda entry: -entry[0]):
            taken += n
            if taken > tokens:
                return
            yield weight, *where

    threshold = {}
    for row in range(vectors.keys.shape[0]):
        found = []
        for head in range(heads):
            for query in range(vectors.prompt - calibration, vectors.prompt):
                group = head * vectors.keys.shape[1] // heads
                found += estimates(row, group, vectors.queries[row, head, query].double())
        threshold[row] = min(w for w, *_ in most(found, (budget - window) * heads * calibration))
    for step in drive("squeezed_attention", vectors, budget, {"window": window, "clusters": 0.1}):
        if step.now % 8:
            continue
        for row in range(vectors.keys.shape[0]):
            found = []
            for head in range(heads):
                group = head * vectors.keys.shape[1] // heads
                assert sorted(step.static(row, head)) == list(range(stop, step.now))
                for weight, n, c in estimates(row, group, vectors.queries[row, head, step.now - 1].double()):
                    found.append((weight, n, head, c))
            expected = {head: set() for head in range(heads)}
            for weight, head, c in most(found, (budget - (step.now - stop)) * heads):
                if weight >= threshold[row] * (1 - 1e-9):
                    group = head * vectors.keys.shape[1] // heads
                    expected[head] |= set((labels[row, group] == c).nonzero().squeeze(-1).tolist())
            for head in range(heads):
                assert set(step.selected(row, head)) == expected[head]


@pytest.mark.parametrize("segment", [8192, 40])
def test_retroinfer_retrieves_the_best_clusters_and_estimates_the_next(vectors, segment):
    budget, size, share_estimated = 40, 4, 0.3
    stop = vectors.prompt - 8
    share = vectors.queries.shape[1] // vectors.keys.shape[1]
    options = {**STATIC, "cluster_size": size, "segment": segment, "estimated": share_estimated}
    step = next(drive("retroinfer", vectors, budget, options))
    for row, head, group in pairs(vectors):
        if head % share:
            continue
        keys, values = vectors.keys[row, group, 2:stop].double(), vectors.values[row, group, 2:stop].double()
        points = keys - keys.mean(0)
        points = points / points.norm(dim=-1, keepdim=True)
        centroids = torch.cat([lloyd(points[s : s + segment], -(-len(points[s : s + segment]) // size), 9, True)[0]
                               for s in range(0, len(points), segment)])  # fmt: skip
        labels = torch.cdist(points, centroids).argmin(-1)
        members = [(labels == c).nonzero().squeeze(-1) for c in range(len(centroids))]
        means = torch.stack(
            [keys[m].mean(0) if len(m) else keys.new_full((keys.shape[1],), torch.nan) for m in members]
        )
        logits = torch.stack([means @ vectors.of(row, h, step.now)[0] / keys.shape[1] ** 0.5
                              for h in range(head, head + share)])  # fmt: skip
        logits = logits.nan_to_num(nan=-torch.inf)
        order = logits.softmax(-1).sum(0).argsort(descending=True).tolist()
        taken, retrieved = 0, []
        while order:
            taken += len(members[order[0]])
            if taken > budget - len(step.static(row, head)):
                break
            retrieved.append(order.pop(0))
        expected = {int(token) + 2 for c in retrieved for token in members[c]}
        assert set(step.selected(row, head)) == expected
        assert expected
        zone = [c for c in order[: round(share_estimated * len(centroids))] if len(members[c])]
        rows, means_of_values = step.selection.summary
        real = rows[row, head].isfinite()
        torch.testing.assert_close(
            means_of_values[row, group][real].double(), torch.stack([values[members[c]].mean(0) for c in zone]),
            atol=1e-5, rtol=1e-4,
        )  # fmt: skip
        for offset in range(share):
            sizes = torch.tensor([len(members[c]) for c in zone]).double()
            expected_rows = logits[offset][zone] + sizes.log()
            torch.testing.assert_close(rows[row, head + offset][real].double(), expected_rows, atol=1e-4, rtol=1e-4)
            # Jensen: a cluster's estimated weight never exceeds the exact weight of its tokens.
            own = keys @ vectors.of(row, head + offset, step.now)[0] / keys.shape[1] ** 0.5
            exact = torch.stack([own[members[c]].logsumexp(0) for c in zone])
            assert bool((rows[row, head + offset][real].double() <= exact + 1e-5).all())


def test_retroinfer_clusters_what_leaves_the_window_beside_the_clusters_there_are():
    vectors = random_vectors(steps=40)
    sizes = []
    for step in drive("retroinfer", vectors, 60, {**STATIC, "cluster_size": 4, "update_every": 10}):
        wave = step.layer.state["wave"]
        store = step.layer.store
        sizes.append(store.aside_stop)
        assert wave["assigned"].shape[2] == store.aside_stop - store.aside_start
        torch.testing.assert_close(wave["sizes"].sum(-1), torch.full((2, 2), store.aside_stop - 2))
        sums = torch.zeros(wave["keys"].shape)
        for row in range(2):
            for group in range(2):
                labels = wave["assigned"][row, group].long()
                sums[row, group].index_add_(0, labels, store.aside_keys[row, group])
        torch.testing.assert_close(sums / wave["sizes"].clamp_min(1)[..., None], wave["keys"], atol=1e-5, rtol=1e-4)
    assert sorted(set(sizes)) == [82, 92, 102, 112, 122]


def test_hash_tables_find_the_keys_that_share_two_buckets():
    random = torch.Generator().manual_seed(0)
    keys, queries = torch.randn(2, 300, 8, generator=random), torch.randn(4, 8, generator=random)
    tables = HashTables(2, 8, bits=4, tables=12, seed=3)
    tables.insert(keys[:, :200])
    tables.insert(keys[:, 200:])
    signs = [(part.double() @ tables.planes.double() > 0).unflatten(-1, (12, 4)) for part in (keys, queries)]
    for head, found in enumerate(tables.collisions(queries, least=2)):
        shared = (signs[0][head // 2] == signs[1][head]).all(-1).sum(-1)
        assert found.tolist() == (shared >= 2).nonzero().squeeze(-1).tolist()


def test_collision_probability_is_that_of_two_or_more_of_the_tables():
    for angle in (0.3, 1.2, 2.0):
        p = (1 - angle / math.pi) ** 5
        expected = sum(math.comb(20, k) * p**k * (1 - p) ** (20 - k) for k in range(2, 21))
        measured = collision_probability(torch.tensor([math.cos(angle)], dtype=torch.float64), 5, 20)
        assert float(measured) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("budget", [89, 20], ids=["whole sample", "part of the sample"])
def test_magicpig_estimates_without_bias(budget):
    """Σ exp(s)/u over the sample, and with the values, against the sums over all keys: within 4 standard errors."""
    vectors = random_vectors(batch=1, heads=2, groups=1, steps=1, seed=4)
    seeds, estimates, cut = 600, [], 0
    for seed in range(seeds):
        (step,) = drive("magicpig", vectors, budget, {**STATIC, "bits": 3, "tables": 6, "seed": seed})
        rows = []
        for head in range(2):
            ids = step.selected(0, head)
            cut += len(ids) == budget - len(step.static(0, head))
            weights = step.selection.log_weights[0, head][step.selection.ids[0, head] >= 0].double()
            _, _, values = vectors.of(0, head, step.now)
            terms = (logits_of(vectors, 0, head, step.now)[ids] + weights).exp()
            rows.append(torch.cat([terms.sum()[None], terms @ values[ids]]))
        estimates.append(torch.stack(rows))
    found = torch.stack(estimates)
    aside = sorted(set(range(step.now)) - set(step.static(0, 0)))
    for head in range(2):
        _, _, values = vectors.of(0, head, step.now)
        terms = logits_of(vectors, 0, head, step.now)[aside].exp()
        exact = torch.cat([terms.sum()[None], terms @ values[aside]])
        error = found[:, head].std(0) / seeds**0.5
        assert bool(((found[:, head].mean(0) - exact).abs() < 4 * error).all())
        assert float(error[0] / exact[0]) < 0.1
    assert (cut > seeds) == (budget == 20)  # most samples are larger than the small budget


def test_magicpig_samples_by_the_angle_to_the_centred_keys():
    vectors = Vectors(*(torch.randn(1, 1, 61, 8, generator=torch.Generator().manual_seed(s)) for s in range(3)), 60)
    (step,) = drive("magicpig", vectors, 59, {**STATIC, "bits": 2, "tables": 30})
    query, keys, _ = vectors.of(0, 0, 61)
    centred = keys - keys[2:52].mean(0)
    ids = step.selected(0, 0)
    for token, weight in zip(ids, step.selection.log_weights[0, 0].tolist(), strict=True):
        angle = math.acos(float(centred[token] @ query / (centred[token].norm() * query.norm())))
        p = (1 - angle / math.pi) ** 2
        u = 1 - (1 - p) ** 30 - 30 * p * (1 - p) ** 29
        assert weight == pytest.approx(-math.log(u), rel=1e-4, abs=1e-5)


def softmax_attention(query, keys, values):
    return (keys @ query / query.shape[0] ** 0.5).softmax(0) @ values


def rounded(x, bits):
    """A group of numbers on the nearest of 2^bits levels between its minimum and its maximum."""
    low = x.min().half().double()
    scale = ((x.max() - low) / (2**bits - 1)).half().double()
    return low + scale * ((x - low) / scale).round().clamp(0, 2**bits - 1)


@pytest.mark.parametrize("bits", [2, 4])
def test_kivi_attends_to_keys_rounded_per_channel_and_values_per_token(vectors, bits):
    group, residual, prompt, d = 8, 16, vectors.prompt, vectors.keys.shape[3]
    share = vectors.queries.shape[1] // vectors.keys.shape[1]
    options = {"group": group, "residual": residual, "bits": bits}
    for step in drive("kivi", vectors, prompt, options):
        assert step.selection.everything
        if step.now not in (prompt + 1, prompt + residual, prompt + 23):
            continue
        for row, head, _ in pairs(vectors)[::share]:
            query, keys, values = vectors.of(row, head, step.now)
            for start in range(0, step.now // residual * residual, group):
                for channel in range(d):
                    keys[start : start + group, channel] = rounded(keys[start : start + group, channel], bits)
            for token in range(step.now - residual):
                for start in range(0, d, group):
                    values[token, start : start + group] = rounded(values[token, start : start + group], bits)
            expected = softmax_attention(query, keys, values)
            torch.testing.assert_close(step.output[row, head].squeeze(0).double(), expected, atol=1e-3, rtol=1e-2)
    waiting = step.now // residual * residual
    assert torch.equal(step.layer.store.aside_keys[:, :, waiting:], vectors.keys[:, :, waiting : step.now])


def test_think_drops_the_channels_that_the_last_queries_weigh_least(vectors):
    window, prompt, d = 8, vectors.prompt, vectors.keys.shape[3]
    share = vectors.queries.shape[1] // vectors.keys.shape[1]
    for step in drive("think", vectors, prompt, {"pruned": 0.4, "window": window}):
        for row, first, group in pairs(vectors)[::share]:
            asked = vectors.queries[row, first : first + share, prompt - window : prompt].double()
            whole = vectors.keys[row, group, : prompt - window].double()
            score = [torch.linalg.matrix_norm(torch.outer(asked[..., j].flatten(), whole[:, j])) for j in range(d)]
            dropped = torch.stack(score).topk(int(0.4 * d), largest=False).indices
            for head in range(first, first + share):
                assert step.static(row, head) == list(range(prompt - window, step.now))
                query, keys, values = vectors.of(row, head, step.now)
                keys[: prompt - window, dropped] = 0
                expected = softmax_attention(query, keys, values)
                torch.testing.assert_close(step.output[row, head].squeeze(0).double(), expected, atol=1e-4, rtol=1e-3)


def another(field):
    """A valid value of an option that is not its default, as the command line gives it."""
    if field.annotation is bool:
        return str(not field.default).lower()
    choices = getattr(field.annotation, "__args__", ())
    if choices and all(isinstance(choice, str) for choice in choices):
        return next(choice for choice in choices if choice != field.default)
    if isinstance(field.default, float):
        return str(field.default * 1.25)
    return "8" if field.default != 8 else "4"


INDEX_OPTIONS = [
    (name, option)
    for name, policy in sorted(registry().classes["policy"].items())
    if hasattr(policy, "index")
    for option in policy.index.Options.model_fields
]


@pytest.mark.parametrize(("name", "option"), INDEX_OPTIONS)
def test_every_option_of_an_index_reaches_it_through_its_policy(name, option):
    policy = registry().find("policy", name)
    value = another(policy.index.Options.model_fields[option])
    driven = Driven(name, random_vectors(d=16), 40, {**STATIC, option: value})
    step = driven.step()
    index = driven.layer.state["index"]
    given = getattr(index.options, option)
    assert str(given).lower() == value
    assert given != policy.index.Options.model_fields[option].default
    assert len(step.selected(0, 0)) > 0
