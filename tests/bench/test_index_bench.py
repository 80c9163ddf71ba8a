"""roargraph against the other indexes on real decoding queries, as ratios inside one run, on one thread.

By default an 8K capture of the embedded model; `KVBENCH_BENCH_CAPTURE` names another capture's folder.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import faiss
import numba
import numpy as np
import pytest

from kvbench.capture.files import load_capture
from kvbench.capture.record import capture, plan_capture, read_text
from kvbench.indexes import kvbench_indexes
from kvbench.indexes.knn import draw, nearest_keys
from kvbench.models import load_model

pytestmark = [pytest.mark.bench, pytest.mark.real]

INDEXES = {index.name: index for index in kvbench_indexes()}
SINKS, WINDOW, K = 4, 64, 100


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = numba.get_num_threads(), faiss.omp_get_max_threads()
    numba.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    yield
    numba.set_num_threads(before[0])
    faiss.omp_set_num_threads(before[1])


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = os.environ.get("KVBENCH_BENCH_CAPTURE")
    if folder:
        return load_capture(Path(folder))
    loaded = load_model("smollm2-135m")
    text = read_text("default")
    config = plan_capture(loaded, text, context_length=8192, decode_tokens=64, layers="14")
    return capture(config, loaded, text, tmp_path_factory.mktemp("capture") / "8k")


@pytest.fixture(scope="module")
def data(source):
    """Keys of one key/value head, its three heads' prompt queries, and their decoding queries."""
    layer = source.layer(source.layers[0])
    heads = source.manifest.heads // source.manifest.kv_heads
    keys = layer.prompt.keys[:1, SINKS:-WINDOW].float().contiguous().numpy()
    prompt = layer.prompt.queries[:heads, SINKS:].float().contiguous().numpy()
    return keys, prompt, layer.decode.queries[:heads].float().contiguous().numpy()


@pytest.fixture(scope="module")
def built(data):
    indexes = {}
    for name, index in INDEXES.items():
        indexes[name] = index()
        indexes[name].build(*data[:2])
    return indexes


def recall(result, best):
    hits = [np.isin(found, true).mean() for found, true in zip(result.ids.reshape(-1, K), best, strict=True)]
    return float(np.mean(hits))


@pytest.fixture(scope="module")
def at_95(data, built):
    """For each index the smallest effort with mean recall@100 of 0.95, and its evaluations a query."""
    queries = data[2]
    best = built["flat"].search(queries, K).ids.reshape(-1, K)
    found = {}
    for name in ("roargraph", "hnsw", "ivf", "vamana", "robust_vamana"):
        for step in range(0, 40):
            effort = round((100 if name != "ivf" else 4) * 1.1**step)
            result = built[name].search(queries, K, effort=effort)
            if recall(result, best) >= 0.95:
                break
        found[name] = effort, float(result.evaluations.mean())
    return found


def test_time_per_evaluation_against_faiss_hnsw(data, built, ratio_gate):
    queries = data[2]
    hnsw = built["hnsw"].indexes[0]
    flat_queries = queries.reshape(-1, queries.shape[2])
    parameters = faiss.SearchParametersHNSW(efSearch=256)
    faiss.cvar.hnsw_stats.reset()
    hnsw.search(flat_queries, K, params=parameters)
    theirs = faiss.cvar.hnsw_stats.ndis
    ours = int(built["roargraph"].search(queries, K, effort=256).evaluations.sum())
    # Repeated so that both sides make about as many evaluations.
    times = max(1, round(theirs / ours))

    def candidate():
        for _ in range(times):
            built["roargraph"].search(queries, K, effort=256)

    ratio_gate.ratio("roargraph / hnsw, evaluations of ef 256", ours / theirs)
    per_evaluation = ratio_gate.time(
        "roargraph / hnsw, time per evaluation at ef 256, one thread",
        candidate,
        lambda: hnsw.search(flat_queries, K, params=parameters),
        scale=theirs / (times * ours),
    )
    assert per_evaluation <= 1


def search(index, queries, threads, times):
    """Search so many times, on as many threads."""
    numba.set_num_threads(threads)
    try:
        for _ in range(times):
            index.search(queries, K)
    finally:
        numba.set_num_threads(1)


def test_parallel_efficiency_over_heads(data, built, ratio_gate):
    """Time on all threads times their number, over one thread's: the inverse of the efficiency, whose aim is 80%."""
    index, queries, threads = built["roargraph"], data[2], numba.config.NUMBA_NUM_THREADS
    ratio_gate.time(
        "roargraph, threads x time on all threads / time on one",
        lambda: search(index, queries, threads, 5),
        lambda: search(index, queries, 1, 5),
        scale=threads,
    )


def test_all_threads_on_one_search_against_independent_searches(data, built, ratio_gate):
    """What sharing one search among threads costs, beyond what the machine's cores cost each other."""
    index, queries, threads = built["roargraph"], data[2], numba.config.NUMBA_NUM_THREADS
    with ThreadPoolExecutor(threads) as pool:
        ratio_gate.time(
            "roargraph, all threads on each search / each thread on a search of its own",
            lambda: search(index, queries, threads, 5 * threads),
            lambda: list(pool.map(lambda _: search(index, queries, 1, 5), range(threads))),
        )


@pytest.mark.parametrize("other", ["hnsw", "ivf", "vamana", "robust_vamana"])
def test_at_recall_95(data, built, at_95, other, ratio_gate):
    queries = data[2]
    ratio_gate.ratio(f"roargraph / {other}, evaluations at recall@100 0.95", at_95["roargraph"][1] / at_95[other][1])
    ratio_gate.time(
        f"roargraph / {other}, time at recall@100 0.95",
        lambda: built["roargraph"].search(queries, K, effort=at_95["roargraph"][0]),
        lambda: built[other].search(queries, K, effort=at_95[other][0]),
    )


@pytest.mark.parametrize("heads", [1, 3])
def test_build_given_the_nearest_keys_against_hnsw(data, heads, ratio_gate):
    """One graph against one HNSW graph, and a group's: one for each of three query heads, where HNSW needs one."""
    keys, prompt, _ = data
    prompt = prompt[:heads]
    kind, hnsw = INDEXES["roargraph"], INDEXES["hnsw"]()
    roargraph = kind(kind.Options(shared=False))
    roargraph.build(keys, prompt)
    training = draw(prompt, roargraph.options.sample, roargraph.options.recent, 0)
    nearest = nearest_keys(roargraph.keys, training, roargraph.options.neighbors)
    ratio = ratio_gate.time(
        f"roargraph given the nearest keys / hnsw, build of {heads} graphs / 1",
        lambda: roargraph.build_from_neighbors(training, nearest),
        lambda: hnsw.build(keys),
        rounds=3,
    )
    assert heads > 1 or ratio <= 1


def test_scaling_with_the_number_of_keys(data, built, ratio_gate):
    keys, prompt, queries = data
    quarter = INDEXES["roargraph"]()
    quarter.build(keys[:, : keys.shape[1] // 4], prompt)
    ratio_gate.time(
        "roargraph on all keys / on a quarter, time of ef 256",
        lambda: built["roargraph"].search(queries, K, effort=256),
        lambda: quarter.search(queries, K, effort=256),
    )
