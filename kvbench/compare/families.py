"""Families of tasks whose scores are published as one: RULER's thirteen, LongBench, ∞-Bench, SCBench."""

from __future__ import annotations

RULER = (
    "niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3",
    "niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe", "qa_1", "qa_2",
)  # fmt: skip
"""Hsieh et al., arXiv 2404.06654, table 2."""
_PREFIXES = {"longbench_": "LongBench", "infinitebench_": "∞-Bench", "scbench_": "SCBench"}
_APART = ("longbench_v2",)


def family_of(task: str) -> str | None:
    """The family of a task; None for one that stands alone."""
    if task in RULER:
        return "RULER"
    if task in _APART:
        return None
    return next((name for prefix, name in _PREFIXES.items() if task.startswith(prefix)), None)


def family_text(family: str, tasks: int) -> str:
    """A mean over tasks in words: never a part of RULER under its name alone."""
    return (
        f"{family}, mean of its {tasks} tasks"
        if family == "RULER" and tasks == len(RULER)
        else (f"{family}, mean of {tasks}" + (f" of its {len(RULER)} tasks" if family == "RULER" else " tasks"))
    )
