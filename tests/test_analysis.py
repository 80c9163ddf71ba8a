"""The measurements against scipy and formulas written out here."""

import numpy as np
import pytest
from scipy.spatial import distance
from scipy.special import softmax

from kvbench.analysis import measures
from kvbench.contract.errors import KVBenchError

RNG = np.random.default_rng(5)
KEYS = RNG.normal(size=(400, 8)) @ RNG.normal(size=(8, 8))
QUERIES = RNG.normal(size=(50, 8)) + 3
WEIGHTS = softmax(RNG.normal(size=(6, 40)) * 3, axis=1)


def test_mahalanobis_is_scipys():
    inverse = np.linalg.inv(np.cov(KEYS.T))
    expected = [distance.mahalanobis(x, KEYS.mean(0), inverse) for x in QUERIES]
    assert measures.fit(KEYS).distances(QUERIES) == pytest.approx(expected, rel=1e-9)


def test_shrinkage_follows_its_formula():
    covariance = np.cov(KEYS[:6].T)
    shrunk = 0.7 * covariance + 0.3 * np.trace(covariance) / 8 * np.eye(8)
    expected = distance.cdist(QUERIES, KEYS[:6].mean(0)[None], "mahalanobis", VI=np.linalg.inv(shrunk))[:, 0]
    assert measures.fit(KEYS[:6], shrinkage=0.3).distances(QUERIES) == pytest.approx(expected, rel=1e-9)


def test_a_pseudo_inverse_is_numpys_and_says_its_rank():
    flat = np.c_[KEYS[:, :6], KEYS[:, 0] + KEYS[:, 1], KEYS[:, 2] * 2]
    found = measures.fit(flat, pseudo_inverse=True)
    assert found.rank == 6
    inverse = np.linalg.pinv(np.cov(flat.T))
    delta = flat[:20] - flat.mean(0)
    expected = np.sqrt(np.einsum("ij,jk,ik->i", delta, inverse, delta))
    assert found.distances(flat[:20]) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (KEYS[:8], "8 samples are too few for a covariance of dimension 8: give at least 9"),
        (np.c_[KEYS[:, :7], KEYS[:, 0]], "singular .rank 7 of 8.*1 directions"),
        (np.ones((20, 3)), "singular .rank 0 of 3"),
        (np.where(KEYS > 4, np.nan, KEYS), "NaN or infinite"),
        (np.where(KEYS > 4, np.inf, KEYS), "NaN or infinite"),
        (KEYS[0], "1 dimensions, not 2"),
    ],
)
def test_samples_that_make_no_covariance_are_refused(sample, message):
    with pytest.raises(KVBenchError, match=message):
        measures.fit(sample)


def test_points_of_another_dimension_are_refused():
    with pytest.raises(KVBenchError, match="7 dimensions and the sample 8"):
        measures.fit(KEYS).distances(QUERIES[:, :7])


def test_in_distribution_vectors_lie_at_the_square_root_of_the_dimension_and_shifted_ones_beyond():
    rng = np.random.default_rng(0)
    d = 32
    found = measures.ood_distances(
        rng.normal(size=(8000, d)), rng.normal(size=(4000, d)) + 2, rng.normal(size=(100, d)) + 2
    )
    assert np.sqrt((found.keys**2).mean()) == pytest.approx(np.sqrt(d), rel=0.02)
    assert np.sqrt((found.queries**2).mean()) == pytest.approx(np.sqrt(d + 4 * d), rel=0.02)
    assert np.sqrt((found.prompt_queries**2).mean()) == pytest.approx(np.sqrt(d), rel=0.03)
    assert np.sqrt((found.decode_queries**2).mean()) == pytest.approx(np.sqrt(d), rel=0.05)
    assert (found.key_samples, found.query_samples, len(found.keys)) == (4000, 2000, 4000)


def test_attention_weights_are_a_softmax_over_what_is_visible():
    weights = measures.attention_weights(QUERIES, KEYS, visible=np.arange(1, 51))
    for row in (0, 7, 49):
        expected = softmax(KEYS[: row + 1] @ QUERIES[row] / np.sqrt(8))
        assert weights[row, : row + 1] == pytest.approx(expected, rel=1e-9)
        assert not weights[row, row + 1 :].any()
    with pytest.raises(KVBenchError, match="between 1 and 400"):
        measures.attention_weights(QUERIES, KEYS, visible=np.zeros(50))


@pytest.mark.parametrize("sinks", [0, 4])
def test_recoveries_follow_their_definitions(sinks):
    ks = [1, 5, 100]
    dynamic = measures.dynamic_recovery(WEIGHTS, ks, sinks=sinks)
    static = measures.static_recovery(WEIGHTS, ks, sinks=sinks)
    grown = measures.static_recovery(WEIGHTS, ks, sinks=sinks, generated_from=30)
    first = sorted(range(sinks, 40), key=lambda i: -WEIGHTS[0, i])
    for place, k in enumerate(ks):
        for step, row in enumerate(WEIGHTS):
            total = sum(row[sinks:])
            assert dynamic[place, step] == pytest.approx(sum(sorted(row[sinks:])[::-1][:k]) / total)
            assert static[place, step] == pytest.approx(sum(row[first[:k]]) / total)
            kept = set(first[:k]) | set(range(30, 40))
            assert grown[place, step] == pytest.approx(sum(row[i] for i in kept) / total)
            chosen = np.isin(np.arange(40), first[:k])
            assert measures.recovered_mass(row, chosen, sinks=sinks) == pytest.approx(static[place, step])
    assert static[:, 0] == pytest.approx(dynamic[:, 0])


def test_tokens_for_mass_counts_from_the_largest():
    for share in (0.5, 0.9, 1):
        for row, count in zip(WEIGHTS, measures.tokens_for_mass(WEIGHTS, share), strict=True):
            best = np.sort(row)[::-1]
            assert best[:count].sum() >= share * row.sum() - 1e-9
            assert best[: count - 1].sum() < share * row.sum()
    assert measures.tokens_for_mass([[0.5, 0.5, 0.0, 0.0]], 1).tolist() == [2]


def test_recall_and_overlap_count_sets():
    selected = RNG.random((6, 40)) < 0.5
    found = measures.recall_at_k(selected, WEIGHTS, 7)
    for row, chosen, value in zip(WEIGHTS, selected, found, strict=True):
        best = set(np.argsort(-row)[:7])
        assert value == pytest.approx(len(best & set(np.flatnonzero(chosen))) / 7)
    assert measures.overlap(selected[0], selected[0]) == 1
    assert np.isnan(measures.overlap(np.zeros(3), np.ones(3)))
    assert measures.overlap([1, 1, 0, 1], [1, 0, 1, 1]) == pytest.approx(2 / 3)
    with pytest.raises(KVBenchError, match="Recall@41 needs 41 keys"):
        measures.recall_at_k(selected, WEIGHTS, 41)


def test_the_best_budgets_recover_no_less_than_any_other():
    counts = measures.best_budgets(WEIGHTS, 30)
    assert counts.sum() == 30
    best = sum(np.sort(row)[::-1][:count].sum() for row, count in zip(WEIGHTS, counts, strict=True))
    uniform = sum(np.sort(row)[::-1][:5].sum() for row in WEIGHTS)
    assert best >= uniform
    assert best == pytest.approx(np.sort(WEIGHTS.ravel())[::-1][:30].sum())
    with pytest.raises(KVBenchError, match="between 1 and the 240"):
        measures.best_budgets(WEIGHTS, 241)


def test_a_run_stores_the_steps_of_its_probes(tmp_path):
    from tiny import tiny_model, tokens

    import kvbench
    from kvbench.plugins import registry
    from kvbench.runs.traces import read_trace, write_trace

    names = ("recall", "recovery", "sparsity", "overlap")
    probes = [registry().make("probe", name) for name in names]
    with kvbench.attach(
        tiny_model(), policy="quest", options={"page_size": 4}, budget=30, probes=[*probes, "latency"]
    ) as session:
        session.model.generate(tokens(1, 80), max_new_tokens=6, do_sample=False)
    latency = session.probes[-1].result()
    assert all(value > 0 for value in latency.values())
    columns = {name: column for probe in probes for name, column in probe.trace().items()}
    write_trace(tmp_path / "t" / "0.safetensors", columns, example="a", prompt_tokens=80)
    trace = read_trace(tmp_path / "t" / "0.safetensors")
    assert (trace.example, trace.prompt_tokens) == ("a", 80)
    assert trace.positions.tolist() == [81, 82, 83, 84, 85]
    assert trace.columns["recall_at_k"].shape == (5, 3, 6)
    results = {name: value for probe in probes for name, value in probe.result().items()}
    for name, column in trace.columns.items():
        assert np.nanmean(column) == pytest.approx(results[name], rel=1e-5), name
    assert np.isnan(trace.columns["step_overlap"][0]).all()
    assert (trace.columns["tokens_for_90"] <= trace.columns["tokens_for_99"]).all()
    (tmp_path / "t" / "0.safetensors").write_bytes(b"cut")
    with pytest.raises(KVBenchError, match="no readable trace"):
        read_trace(tmp_path / "t" / "0.safetensors")
