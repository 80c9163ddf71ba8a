"""Every index against exact float64 search."""

import json
import struct

import numba
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvbench.contract.errors import KVBenchError
from kvbench.indexes import IVF, Flat, Index, RoarGraph, Vamana, kvbench_indexes

INDEXES = kvbench_indexes()
GRAPHS = [index for index in INDEXES if index.name in ("vamana", "robust_vamana", "cagra", "roargraph")]
SMALL = {
    "ivf": {"lists": 4, "nprobe": 2},
    "ivfpq": {"lists": 4, "nprobe": 2, "subspaces": 2},
    "hnsw": {"degree": 4},
    "vamana": {"degree": 8, "construction_ef": 16},
    "robust_vamana": {"degree": 8, "construction_ef": 16},
    "cagra": {"degree": 8, "intermediate": 16},
    "roargraph": {"degree": 8, "neighbors": 8},
}
NAMES = [index.name for index in INDEXES]
by_name = {index.name: index for index in INDEXES}
quick = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)


def make(name, seed=0, **options):
    index = by_name[name]
    return index(index.Options(**{**SMALL.get(name, {}), **options}), seed)


def vectors(seed, heads, n, d=8, scale=1.0):
    return (np.random.default_rng(seed).standard_normal((heads, n, d)) * scale).astype(np.float32)


def exact(keys, queries):
    per_group = len(queries) // len(keys)
    return np.einsum("hqd,hnd->hqn", queries.astype(np.float64), np.repeat(keys, per_group, axis=0).astype(np.float64))


def check(result, keys, queries, k):
    """Ids are distinct and in range, scores are those of the ids, best first, and padding is at the end."""
    scores = exact(keys, queries)
    heads, count = queries.shape[:2]
    assert result.ids.shape == result.scores.shape == (heads, count, k)
    assert result.evaluations.shape == (heads, count)
    for head in range(heads):
        for query in range(count):
            ids = result.ids[head, query]
            found = ids[ids >= 0]
            assert np.all(ids[len(found) :] == -1) and np.all(np.isneginf(result.scores[head, query, len(found) :]))
            assert len(set(found)) == len(found) and np.all(found < keys.shape[1])
            got = result.scores[head, query, : len(found)]
            np.testing.assert_allclose(got, scores[head, query, found], rtol=1e-4, atol=1e-4)
            assert np.all(np.diff(got) <= 0)
            assert result.evaluations[head, query] >= len(found)


def same(first, second):
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)


@quick
@given(st.integers(0, 2**16), st.integers(0, 70), st.integers(1, 80), st.sampled_from(NAMES), st.booleans())
def test_search_returns_true_scores_of_distinct_keys(seed, n, k, name, with_zeros_and_ties):
    keys = vectors(seed, 2, n)
    if with_zeros_and_ties and n:
        keys[:, ::3] = 0
        keys[:, 1::3] = keys[:, -1:]
    queries = vectors(seed + 1, 4, 30)
    index = make(name)
    index.build(keys, queries[:, :20])
    result = index.search(queries[:, 20:], k)
    check(result, keys, queries[:, 20:], k)
    if name in GRAPHS:
        assert np.all(result.evaluations <= n)


@quick
@given(st.integers(0, 2**16), st.integers(1, 60), st.integers(1, 70))
def test_flat_is_exact(seed, n, k):
    keys, queries = vectors(seed, 2, n), vectors(seed + 1, 4, 3)
    index = Flat()
    index.build(keys, heads=4)
    result = index.search(queries, k)
    best = -np.sort(-exact(keys, queries), axis=2)[:, :, :k]
    np.testing.assert_allclose(result.scores[:, :, : min(k, n)], best, rtol=1e-4, atol=1e-5)
    assert np.all(result.evaluations == n)


def test_equal_scores_come_by_smaller_id():
    index = Flat()
    index.build(np.ones((1, 6, 4), np.float32))
    np.testing.assert_array_equal(index.search(np.ones((1, 1, 4), np.float32), 6).ids[0, 0], np.arange(6))


@pytest.mark.parametrize("nprobe", [1, 3, 5])
def test_ivf_counts_centroids_and_scanned_keys(nprobe):
    keys, queries = vectors(0, 1, 200), vectors(1, 1, 9)
    index = IVF(IVF.Options(lists=5, nprobe=nprobe))
    index.build(keys)
    result = index.search(queries, 200)
    found = (result.ids >= 0).sum(2)  # with k = n every scanned key is returned
    np.testing.assert_array_equal(result.evaluations, 5 + found)
    closest = np.argsort(-exact(index.centroids, queries)[0], axis=1)[:, :nprobe]
    nearest = ((keys[0][:, None].astype(float) - index.centroids[0]) ** 2).sum(2).argmin(1)
    np.testing.assert_array_equal(found[0], [np.isin(nearest, probed).sum() for probed in closest])


def test_hnsw_counts_each_distance_once():
    keys, queries = vectors(0, 1, 300), vectors(1, 1, 5)
    index = make("hnsw", degree=16)
    index.build(keys)
    everything = index.search(queries, 300, effort=600)
    assert np.all(everything.evaluations >= 300) and np.all(everything.evaluations < 400)
    assert np.all(index.search(queries, 5, effort=8).evaluations < 300)


@pytest.mark.parametrize("name", NAMES)
def test_finds_most_of_the_best_keys(name):
    keys, queries = vectors(2, 2, 800, d=16), vectors(3, 4, 700, d=16)
    options = {"nprobe": 12, "lists": 16} if name in ("ivf", "ivfpq") else {}
    index = (
        by_name[name](by_name[name].Options(**options)) if name not in ("ivfpq",) else make(name, **options, refine=8)
    )
    index.build(keys, queries[:, :600])
    result = index.search(queries[:, 600:], 10)
    best = np.argsort(-exact(keys, queries[:, 600:]), axis=2)[:, :, :10]
    recall = np.mean(
        [len(np.intersect1d(a, b)) / 10 for a, b in zip(result.ids.reshape(-1, 10), best.reshape(-1, 10), strict=True)]
    )
    assert recall > 0.9


@pytest.mark.parametrize("name", NAMES)
def test_insert_continues_ids_and_finds_new_keys(name):
    keys, queries = vectors(4, 2, 120), vectors(5, 4, 40)
    whole = np.concatenate([keys, vectors(6, 2, 30, scale=2)], axis=1)
    copied, shared = make(name), make(name)
    copied.build(keys, queries)
    shared.build(keys, queries)
    for first in range(120, 150, 5):
        copied.insert(whole[:, first : first + 5])
        shared.insert(whole[:, first : first + 5], storage=whole[:, : first + 5])
    result = copied.search(queries, 20)
    check(result, whole, queries, 20)
    same(result, shared.search(queries, 20))
    assert (result.ids >= 120).any()
    assert np.shares_memory(shared.keys.rows, whole) and not np.shares_memory(copied.keys.rows, keys)


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_index_takes_keys_later(name):
    keys, queries = vectors(7, 2, 25), vectors(8, 4, 30)
    index = make(name)
    index.build(keys[:, :0], queries)
    empty = index.search(queries, 3)
    assert np.all(empty.ids == -1) and np.all(empty.evaluations == 0) and index.nbytes == 0
    index.insert(keys[:, :1])
    assert np.all(index.search(queries, 3).ids[:, :, 0] == 0)
    index.insert(keys[:, 1:])
    check(index.search(queries, 3), keys, queries, 3)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("n", [0, 1, 150])
def test_saved_and_loaded_searches_alike(name, n, tmp_path):
    keys, queries = vectors(9, 2, n), vectors(10, 4, 50)
    index = make(name, seed=3, **({"sq8": True} if name in ("vamana", "roargraph") else {}))
    index.build(keys, queries)
    if n:
        index.insert(vectors(11, 2, 7))
    index.save(tmp_path / "whole")
    index.save(tmp_path / "bare", keys=False)
    whole = by_name[name].load(tmp_path / "whole")
    bare = by_name[name].load(tmp_path / "bare", keys=np.array(index.keys.array))
    expected = index.search(queries, 12)
    same(expected, whole.search(queries, 12))
    same(expected, bare.search(queries, 12))
    more = vectors(12, 2, 4)
    index.insert(more)
    whole.insert(more)
    if name != "hnsw":  # faiss draws the levels of new keys from where its generator stands
        same(index.search(queries, 12), whole.search(queries, 12))
    with pytest.raises(KVBenchError, match="without its keys"):
        by_name[name].load(tmp_path / "bare")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["flat", "ivf", "roargraph"])
def test_half_precision_keys_are_read_in_place(name, dtype):
    buffer = torch.from_numpy(vectors(13, 2, 200)).to(dtype)
    keys, queries = buffer[:, :150], torch.from_numpy(vectors(14, 4, 60)).to(dtype)
    half, full = make(name), make(name)
    half.build(keys, queries)
    full.build(keys.float(), queries.float())
    result = half.search(queries, 10)
    check(result, keys.float().numpy(), queries.float().numpy(), 10)
    same(result, full.search(queries.float(), 10))
    assert half.keys.rows.ctypes.data == buffer.data_ptr()
    half.insert(buffer[:, 150:], storage=buffer)
    check(half.search(queries, 10), buffer.float().numpy(), queries.float().numpy(), 10)


@pytest.mark.parametrize("index", GRAPHS, ids=lambda index: index.name)
def test_any_number_of_threads_gives_the_same_index(index):
    keys, queries = vectors(15, 2, 400), vectors(16, 4, 200)
    before = numba.get_num_threads()
    states, results = [], []
    try:
        for threads in (1, min(2, numba.config.NUMBA_NUM_THREADS)):
            numba.set_num_threads(threads)
            built = make(index.name, seed=5)
            built.build(keys, queries)
            built.insert(vectors(17, 2, 20))
            states.append(built._state())
            results.append(built.search(queries, 10))
    finally:
        numba.set_num_threads(before)
    same(*results)
    for name, array in states[0].items():
        np.testing.assert_array_equal(array, states[1][name])


@pytest.mark.parametrize("name", ["vamana", "roargraph"])
def test_codes_are_re_ranked_exactly_and_counted(name):
    keys, queries = vectors(18, 2, 500), vectors(19, 4, 200)
    plain, coded = make(name), make(name, sq8=True)
    for index in (plain, coded):
        index.build(keys, queries[:, :150])
    result = coded.search(queries[:, 150:], 10, effort=40)
    check(result, keys, queries[:, 150:], 10)
    assert result.evaluations.mean() > plain.search(queries[:, 150:], 10, effort=40).evaluations.mean()
    assert coded.nbytes > plain.nbytes


@pytest.mark.parametrize("shared", [True, False])
def test_roargraph_by_pivots_finds_the_best_keys(shared):
    keys, queries = vectors(20, 2, 600), vectors(21, 4, 500)
    index = RoarGraph(RoarGraph.Options(projection="pivot", degree=40, shared=shared))
    index.build(keys, queries[:, :400])
    result = index.search(queries[:, 400:], 10)
    best = -np.sort(-exact(keys, queries[:, 400:]), axis=2)[:, :, :10]
    assert np.mean(np.isclose(result.scores, best, rtol=1e-3)) > 0.9
    assert index.unreached.shape == (2 if shared else 4,) and np.all(index.unreached < 0.05)


@quick
@given(
    st.integers(0, 2**16), st.integers(1, 40), st.lists(st.integers(1, 25), max_size=8), st.integers(1, 6),
    st.integers(2, 9), st.sampled_from(["cooccurrence", "pivot"]), st.booleans(), st.booleans(),
)  # fmt: skip
def test_roargraph_reaches_every_key_whatever_is_inserted(seed, n, batches, eager, degree, projection, ties, shared):
    keys = vectors(seed, 2, n + sum(batches))
    if ties:
        keys[:, ::3] = keys[:, :1]
        keys[:, 1::4] = 0
    queries = vectors(seed + 1, 4, 12)
    index = RoarGraph(RoarGraph.Options(eager=eager, degree=degree, projection=projection, entries=2, shared=shared))
    index.build(keys[:, :n], queries[:, :10])
    for count in [0, *batches]:
        index.insert(keys[:, n : n + count])
        n += count
        found = index.search(queries[:, 10:], n, effort=n)
        np.testing.assert_array_equal(np.sort(found.ids, axis=2), np.broadcast_to(np.arange(n), found.ids.shape))
        assert np.all(index.unreached == 0)


def clustered(seed, heads, steps, d=32):
    """Keys that wander between topics, and queries that lie off them, close to the topic of their step."""
    generator = np.random.default_rng(seed)
    centres = generator.standard_normal((heads, 24, d))
    topic = generator.integers(0, 24, steps // 20 + 1).repeat(20)[:steps]
    keys = centres[:, topic] + 0.7 * generator.standard_normal((heads, steps, d)) + 1
    queries = 2 * centres[:, topic] + generator.standard_normal((heads, steps, d)) - 3
    return keys.astype(np.float32), queries.astype(np.float32)


@pytest.mark.parametrize("prompt", [150, 700, 4096])
def test_1200_keys_inserted_one_by_one_are_found_as_after_a_fresh_build(prompt):
    steps = prompt + 1200
    keys, queries = clustered(prompt, 1, steps + 60)
    keys, later = keys[:, :steps], queries[:, steps:]
    grown, fresh = RoarGraph(), RoarGraph()
    grown.build(keys[:, :prompt].copy(), queries[:, :prompt])
    for end in range(prompt + 1, steps + 1):
        grown.insert(keys[:, end - 1 : end], storage=keys[:, :end])
    fresh.build(keys, queries[:, :prompt])
    scores = exact(keys, later)[0]
    best = np.argpartition(-scores, 100, axis=1)[:, :100]

    def measured(index, effort):
        found = index.search(later, 100, effort=effort)
        hits = np.array([np.isin(true, ids) for true, ids in zip(best, found.ids[0], strict=True)])
        return hits.mean(), hits[best >= prompt].mean(), found.evaluations.mean()

    recall, of_new, cost = measured(fresh, 200)
    grown_recall, grown_of_new, _ = measured(grown, 200)
    assert grown_recall > recall - 0.02
    assert grown_of_new > of_new - 0.02
    at_cost = max(measured(grown, effort) for effort in range(100, 200, 10) if measured(grown, effort)[2] <= cost)
    assert at_cost[0] > recall - 0.05
    everything = grown.search(later[:, :3], steps, effort=steps).ids
    assert np.all(np.sort(everything, axis=2) == np.arange(steps))


@pytest.mark.parametrize("name", ["roargraph", "ivf", "ivfpq"])
@pytest.mark.parametrize("options", [{}, {"shared": False}])
def test_what_a_device_builds_finds_as_much_for_as_few_comparisons(name, options):
    if options and name != "roargraph":
        return
    keys, queries = clustered(5, 2, 3060)
    keys, queries, later = keys[:, :3000], queries.repeat(2, 0)[:, :3000], queries.repeat(2, 0)[:, 3000:]
    usual, beside = (by_name[name](by_name[name].Options(**options)) for _ in range(2))
    usual.build(keys, queries)
    on_device = torch.from_numpy(keys.copy())
    beside.build_beside(keys, on_device, torch.from_numpy(queries) if usual.uses_queries else None, heads=4)
    best = np.argpartition(-exact(keys, later), 50, axis=2)[:, :, :50]

    def measured(index, effort):
        found = index.search(later, 50, effort=effort)
        check(found, keys, later, 50)
        return recall_of(best, found.ids), found.evaluations.mean()

    efforts = (60, 90, 130, 200) if name == "roargraph" else (2, 4, 8, 16)
    curves = [np.array([measured(index, effort) for effort in efforts]).T for index in (usual, beside)]
    at = np.linspace(curves[0][0].min(), min(curves[0][0].max(), curves[1][0].max()), 4)[1:]
    costs = [np.interp(at, *curve) for curve in curves]
    assert np.mean(costs[1] / costs[0]) < 1.1
    assert curves[1][0].max() > curves[0][0].max() - 0.01
    if name == "roargraph":
        assert np.all(beside.unreached == 0)
    beside.insert(keys[:, :40] + 0.01)
    assert measured_ids(beside, later)[0] > 0


def measured_ids(index, later):
    ids = index.search(later, 50).ids
    return (ids >= 3000).sum(), ids


def recall_of(best, ids):
    hits = [np.isin(true, got) for true, got in zip(best.reshape(-1, 50), ids.reshape(-1, 50), strict=True)]
    return np.mean(hits)


@quick
@given(st.integers(0, 2**16), st.integers(1, 90), st.integers(1, 6), st.integers(2, 9), st.booleans())
def test_a_graph_built_on_a_device_reaches_every_key(seed, n, eager, degree, ties):
    keys, queries = vectors(seed, 2, n), vectors(seed + 1, 4, 14)
    if ties:
        keys[:, ::3] = keys[:, :1]
        keys[:, 1::4] = 0
    index = RoarGraph(RoarGraph.Options(eager=eager, degree=degree, entries=2))
    index.build_beside(keys, torch.from_numpy(keys), torch.from_numpy(queries[:, :12]), heads=4)
    found = index.search(queries[:, 12:], n, effort=n)
    np.testing.assert_array_equal(np.sort(found.ids, axis=2), np.broadcast_to(np.arange(n), found.ids.shape))
    assert np.all(index.unreached == 0)


def test_roargraph_starts_from_a_handful_of_keys_and_queries():
    keys, queries = clustered(1, 1, 460)
    index = RoarGraph()
    index.build(keys[:, :3], queries[:, :5])
    for first in range(3, 400, 16):
        index.insert(keys[:, first : min(first + 16, 400)])
    later = queries[:, 400:]
    best = np.argpartition(-exact(keys[:, :400], later)[0], 20, axis=1)[:, :20]
    found = index.search(later, 20, effort=100)
    assert np.mean([np.isin(true, ids) for true, ids in zip(best, found.ids[0], strict=True)]) > 0.9
    assert found.evaluations.mean() < 0.9 * 400


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_nan_and_infinity_are_refused(bad, dtype):
    keys = vectors(22, 2, 5).astype(dtype)
    good = keys.copy()
    keys[1, 3, 2] = bad
    index = Flat()
    with pytest.raises(KVBenchError, match=r"key 3 of head 1 is NaN or infinite.*\.$"):
        index.build(keys)
    index.build(good)
    with pytest.raises(KVBenchError, match="queries hold NaN or infinite"):
        index.search(keys, 1)
    with pytest.raises(KVBenchError, match="NaN or infinite"):
        index.insert(keys)
    with pytest.raises(KVBenchError, match="NaN or infinite"):
        index.insert(keys, storage=np.concatenate([good, keys], axis=1))
    assert index.keys.n == 5


def test_bad_input_is_refused_in_one_sentence():
    keys = vectors(23, 2, 9)
    built = Flat()
    built.build(keys)
    roargraph = RoarGraph()
    for call in (
        lambda: Flat().build(keys.astype(np.float64)),
        lambda: Flat().build(keys[0]),
        lambda: Flat().build(keys, heads=3),
        lambda: Flat().search(keys, 1),
        lambda: Flat().insert(keys),
        lambda: built.search(keys[:, :, :4], 1),
        lambda: built.search(keys, 0),
        lambda: built.search(keys, 1, effort=0),
        lambda: built.insert(keys[:1]),
        lambda: built.insert(keys.astype(np.float16)),
        lambda: built.insert(keys, storage=keys),
        lambda: roargraph.build(keys),
        lambda: roargraph.build(keys, keys[:, :0]),
        lambda: Vamana(Flat.Options()),
        lambda: make("ivfpq", subspaces=3).build(keys),
    ):
        with pytest.raises(KVBenchError) as error:
            call()
        assert str(error.value).endswith(".") and "\n" not in str(error.value)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A saved index of every kind, as bytes."""
    folder = tmp_path_factory.mktemp("saved")
    keys, queries = vectors(24, 2, 60), vectors(25, 4, 40)
    files = {}
    for name in NAMES:
        index = make(name)
        index.build(keys, queries)
        index.save(folder / name)
        files[name] = (folder / name).read_bytes()
    return files


def split(data):
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def joined(header, body):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


@pytest.mark.parametrize("name", NAMES)
def test_truncated_and_foreign_files_are_refused(name, saved, tmp_path):
    path = tmp_path / "file"
    data = saved[name]
    header, body = split(data)
    other = next(n for n in NAMES if n != name)
    foreign = json.loads(json.dumps(header))
    foreign["__metadata__"]["format"] = "pt"
    for content in (b"", b"not an index", data[:7], data[:200], data[:-1], saved[other], joined(foreign, body)):
        path.write_bytes(content)
        with pytest.raises(KVBenchError):
            by_name[name].load(path)
    with pytest.raises(KVBenchError):
        by_name[name].load(tmp_path / "missing")


@pytest.mark.parametrize("name", NAMES)
def test_hostile_files_are_refused(name, saved, tmp_path):
    path = tmp_path / "file"
    header, body = split(saved[name])
    about = json.loads(header["__metadata__"]["index"])

    def refused(header, body):
        path.write_bytes(joined(header, body))
        with pytest.raises(KVBenchError):
            by_name[name].load(path)

    for field, value in (
        ("heads", 3), ("heads", 0), ("heads", "x"), ("shape", [2, 61, 8]), ("dtype", "float64"), ("seed", "x"),
        ("options", {"nothing": 1}), ("options", 3), ("name", 7),
    ):  # fmt: skip
        changed = json.loads(json.dumps(header))
        changed["__metadata__"]["index"] = json.dumps(about | {field: value})
        refused(changed, body)
    refused({**header, "__metadata__": {**header["__metadata__"], "index": "{"}}, body)
    for tensor in header:
        if tensor in ("__metadata__", "keys") or not header[tensor]["dtype"].startswith("I"):
            continue
        begin, end = header[tensor]["data_offsets"]
        size = 8 if header[tensor]["dtype"] == "I64" else 4
        for value in (10**6, -5):
            number = value.to_bytes(size, "little", signed=True)
            refused(header, body[:begin] + number * ((end - begin) // size) + body[end:])
    for tensor in header:
        if tensor != "__metadata__":
            refused({key: value for key, value in header.items() if key != tensor}, body)


@pytest.mark.parametrize("index", INDEXES, ids=lambda index: index.name)
def test_every_index_says_what_it_is(index):
    assert issubclass(index, Index) and index.summary and "\n" not in index.summary
    assert not index.search_parameter or index.search_parameter in index.Options.model_fields
    assert index.Options.__doc__
