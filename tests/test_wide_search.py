"""Long candidate lists are heaps: the same keys, scores and evaluations as a sorted list gives."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbench.indexes.kernels import beam_search, enter, push, replace_first, wide_search
from kvbench.plugins import registry


@given(st.lists(st.integers(-(2**62), 2**62), min_size=1, max_size=60), st.lists(st.integers(-(2**62), 2**62)))
@settings(max_examples=50, deadline=None)
def test_a_heaps_first_entry_is_its_smallest(entries, later):
    heap = np.zeros(len(entries), np.int64)
    for size, entry in enumerate(entries):
        push(heap, size, entry)
    held = sorted(entries)
    for entry in later:
        assert heap[0] == held[0]
        replace_first(heap, len(heap), entry)
        held = sorted([*held[1:], entry])
    assert sorted(heap.tolist()) == held


@given(
    st.integers(0, 2**20), st.integers(1, 80), st.integers(1, 90), st.integers(1, 8), st.integers(1, 5),
    st.booleans(),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_both_searches_do_the_same(seed, n, ef, degree, eager, equal):
    generator = np.random.default_rng(seed)
    rows = (
        generator.integers(-1, 2, (n, 3)).astype(np.float32)
        if equal
        else generator.standard_normal((n, 3)).astype(np.float32)
    )
    query = generator.standard_normal(3).astype(np.float32)
    links = generator.integers(0, n, n * degree).astype(np.int32)
    start = np.arange(0, n * degree + 1, degree)
    entries = generator.permutation(n)[: min(3, ef)].astype(np.int32)
    found = []
    for wide in (False, True):
        pool, seen, fresh = np.zeros(ef, np.int64), np.zeros(n, np.uint8), np.zeros(degree, np.int32)
        size, _ = enter(rows, 0, query, entries, pool, seen, None)
        given = (rows, 0, query, links, start, eager, pool, size, seen, fresh)
        done = wide_search(*given, np.zeros(n, np.int64)) if wide else beam_search(*given, None)
        found.append((*done, (pool[: done[0]] | 1).tolist()))
    assert found[0] == found[1]


@pytest.mark.parametrize("sq8", [False, True])
def test_an_index_goes_over_to_it(sq8):
    generator = np.random.default_rng(4)
    keys = generator.standard_normal((1, 900, 8)).astype(np.float32)
    queries = generator.standard_normal((2, 6, 8)).astype(np.float32)
    cls = registry().find("index", "vamana")
    index = cls(cls.Options(degree=8, construction_ef=20, sq8=sq8))
    index.build(keys, heads=2)
    few, many = index.search(queries, 40, effort=511), index.search(queries, 40, effort=512)
    assert (few.ids == many.ids).mean() > 0.95
    everything = index.search(queries, 900)
    exact = np.einsum("hqd,nd->hqn", queries, keys[0])
    for head in range(2):
        for number in range(6):
            ids, scores = everything.ids[head, number], everything.scores[head, number]
            count = int((ids >= 0).sum())
            assert count > 850 and (ids[:count] >= 0).all() and len(set(ids[:count].tolist())) == count
            np.testing.assert_allclose(scores[:count], exact[head, number][ids[:count]], rtol=1e-4, atol=1e-5)
            assert (np.diff(scores[:count]) <= 0).all()
