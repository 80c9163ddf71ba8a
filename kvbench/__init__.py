"""Benchmarks of KV-cache policies for long-context language models."""

from __future__ import annotations

__path__ = __import__("pkgutil").extend_path(__path__, __name__)

from typing import TYPE_CHECKING, Any

from kvbench.contract.errors import KVBenchError
from kvbench.contract.markers import hookimpl

if TYPE_CHECKING:
    from kvbench.api.index import IndexResults, index
    from kvbench.api.results import RunResult, RunResults, SweepResults
    from kvbench.api.run import run
    from kvbench.api.sweep import sweep
    from kvbench.api.table import Table
    from kvbench.compare.recommend import recommend
    from kvbench.contract.analysis import Analysis
    from kvbench.contract.attention import Attention
    from kvbench.contract.budget import Budget, BudgetAllocator, BudgetRequest, LayerBudget
    from kvbench.contract.extension import Extension, Options
    from kvbench.contract.layer import Layer, PromptView
    from kvbench.contract.policy import KVCachePolicy, ModelView, Place
    from kvbench.contract.probe import Probe
    from kvbench.contract.saved import Saveable
    from kvbench.contract.selection import Pending, Selection
    from kvbench.engine.attach import attach
    from kvbench.engine.prefixes import PrefixStore
    from kvbench.engine.resume import resume
    from kvbench.engine.session import Session
    from kvbench.engine.summary import SessionSummary

_HOMES = {
    "Analysis": "contract.analysis",
    "Attention": "contract.attention",
    "Budget": "contract.budget",
    "BudgetAllocator": "contract.budget",
    "BudgetRequest": "contract.budget",
    "LayerBudget": "contract.budget",
    "Extension": "contract.extension",
    "Options": "contract.extension",
    "KVCachePolicy": "contract.policy",
    "Layer": "contract.layer",
    "PromptView": "contract.layer",
    "ModelView": "contract.policy",
    "Pending": "contract.selection",
    "Place": "contract.policy",
    "PrefixStore": "engine.prefixes",
    "Probe": "contract.probe",
    "Saveable": "contract.saved",
    "Selection": "contract.selection",
    "Session": "engine.session",
    "attach": "engine.attach",
    "sweep": "api.sweep",
    "run": "api.run",
    "index": "api.index",
    "Table": "api.table",
    "SweepResults": "api.results",
    "SessionSummary": "engine.summary",
    "RunResults": "api.results",
    "RunResult": "api.results",
    "IndexResults": "api.index",
    "recommend": "compare.recommend",
    "resume": "engine.resume",
}

__all__ = [
    "Analysis",
    "Attention",
    "Budget",
    "BudgetAllocator",
    "BudgetRequest",
    "Extension",
    "IndexResults",
    "KVBenchError",
    "KVCachePolicy",
    "Layer",
    "LayerBudget",
    "ModelView",
    "Options",
    "Pending",
    "Place",
    "PrefixStore",
    "Probe",
    "PromptView",
    "RunResult",
    "RunResults",
    "Saveable",
    "Selection",
    "Session",
    "SessionSummary",
    "SweepResults",
    "Table",
    "attach",
    "hookimpl",
    "index",
    "recommend",
    "resume",
    "run",
    "sweep",
]


def __getattr__(name: str) -> Any:
    """Import on first use, so that the command line answers quickly where no model is needed."""
    if name not in _HOMES:
        raise AttributeError(f"module 'kvbench' has no attribute {name!r}")
    from importlib import import_module  # noqa: PLC0415

    return getattr(import_module(f"kvbench.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    """The public names, for tab completion."""
    return sorted(__all__)
