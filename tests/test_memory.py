"""Freed memory is given back between examples, without what makes a run wait for it."""

import gc
import subprocess
import weakref

import kvbench.runs.runner  # noqa: F401 - the modules of a run, which garbage collection would go through
from kvbench.runs.memory import quick_release, release


class Node:
    def __init__(self):
        self.itself = self


def test_release_frees_what_came_in_the_block_and_starts_no_process(monkeypatch):
    def start(*_, **__):
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess, "Popen", start)
    gc.unfreeze()  # what conftest.py froze
    for already in (False, True):
        if already:
            gc.freeze()
        with quick_release():
            assert gc.get_freeze_count() > 10_000
            gone = weakref.ref(Node())
            assert gone() is not None
            release()
            assert gone() is None
        assert (gc.get_freeze_count() > 0) == already
