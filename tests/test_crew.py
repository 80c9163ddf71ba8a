"""Threads that spin for work: the same results as one thread, whoever takes which part."""

import threading
import time

import numpy as np
import pytest

from kvbench.indexes import threads
from kvbench.indexes.compiled import kernel
from kvbench.indexes.crew import Crew
from kvbench.indexes.threads import on_threads
from kvbench.plugins import registry


@kernel
def mark(part, parts, items, turns, marks, step, nothing):
    """Add `step` to each of this part's items, after some work."""
    for item in range(part, items, parts):
        total = 0.0
        for i in range(turns):
            total += (i * item) % 7
        marks[item] += step + (total < 0) + (nothing is not None)


@pytest.fixture
def crew(monkeypatch):
    """Three threads beside this one, on however many cores."""
    monkeypatch.setattr("kvbench.indexes.threads.numba.get_num_threads", lambda: 4)
    threads.assemble()
    yield threads._crews[0]
    threads.dismiss()


def test_every_part_is_done_once_by_whoever_is_free(crew):
    assert isinstance(crew, Crew) and crew.threads == 3 and crew.assembled
    expected = np.zeros(50, np.int64)
    found = expected.copy()
    for turn in range(2000):
        turns = (0, 30, 3000)[turn % 3]
        on_threads(mark, 50, 50, turns, found, turn, None)
        expected += turn
        if turn % 100 == 0:
            assert np.array_equal(found, expected)
            threads.dismiss()
            threads.assemble()
    assert np.array_equal(found, expected)


def test_a_second_thread_does_not_wait_for_the_crew(crew):
    """Two leaders at once: one of them goes to the pool."""
    counts = [np.zeros(40, np.int64) for _ in range(2)]

    def work(mine):
        for _ in range(300):
            on_threads(mark, 40, 40, 200, mine, 1, None)

    others = [threading.Thread(target=work, args=(mine,)) for mine in counts]
    for other in others:
        other.start()
    for other in others:
        other.join(60)
    assert all((mine == 300).all() for mine in counts)


def test_dismissed_threads_take_no_time(crew):
    found = np.zeros(8, np.int64)
    on_threads(mark, 8, 8, 1, found, 1, None)
    threads.dismiss()
    time.sleep(0.05)
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.1
    on_threads(mark, 8, 8, 1, found, 1, None)  # by the pool
    assert (found == 2).all()


@pytest.mark.parametrize("name", ["ivf", "vamana"])
def test_indexes_find_the_same_with_and_without(name, monkeypatch):
    generator = np.random.default_rng(2)
    keys = generator.standard_normal((2, 400, 16)).astype(np.float32)
    queries = generator.standard_normal((4, 60, 16)).astype(np.float32)
    index = registry().find("index", name)()
    index.build(keys[:, :380], queries, heads=4)
    index.reserve(20)
    plain = index.search(queries[:, :5], 30)
    monkeypatch.setattr("kvbench.indexes.threads.numba.get_num_threads", lambda: 3)
    threads.assemble()
    try:
        again = index.search(queries[:, :5], 30)
        assert all(np.array_equal(one, other) for one, other in zip(plain, again, strict=True))
        index.insert(keys[:, 380:])
        after = index.search(queries[:, :5], 30)
    finally:
        threads.dismiss()
    other = registry().find("index", name)()
    other.build(keys[:, :380], queries, heads=4)
    other.insert(keys[:, 380:])
    assert all(np.array_equal(one, two) for one, two in zip(after, other.search(queries[:, :5], 30), strict=True))
