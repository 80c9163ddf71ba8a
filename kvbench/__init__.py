"""Benchmarks of KV-cache policies for long-context language models."""

from __future__ import annotations

__path__ = __import__("pkgutil").extend_path(__path__, __name__)

from typing import TYPE_CHECKING, Any

from kvbench.errors import KVBenchError
from kvbench.hookspecs import hookimpl

if TYPE_CHECKING:
    from kvbench.attention import Attention
    from kvbench.budget import Budget, BudgetAllocator, BudgetRequest, LayerBudget
    from kvbench.extension import Extension, Options
    from kvbench.policy import KVCachePolicy, Layer, ModelView, Probe, Selection
    from kvbench.session import Session, attach
    from kvbench.study import Analysis

_HOMES = {
    "Analysis": "study",
    "Attention": "attention",
    "Budget": "budget",
    "BudgetAllocator": "budget",
    "BudgetRequest": "budget",
    "LayerBudget": "budget",
    "Extension": "extension",
    "Options": "extension",
    "KVCachePolicy": "policy",
    "Layer": "policy",
    "ModelView": "policy",
    "Probe": "policy",
    "Selection": "policy",
    "Session": "session",
    "attach": "session",
}

__all__ = [
    "Analysis",
    "Attention",
    "Budget",
    "BudgetAllocator",
    "BudgetRequest",
    "Extension",
    "KVBenchError",
    "KVCachePolicy",
    "Layer",
    "LayerBudget",
    "ModelView",
    "Options",
    "Probe",
    "Selection",
    "Session",
    "attach",
    "hookimpl",
]


def __getattr__(name: str) -> Any:
    """Import on first use, so that the command line answers quickly where no model is needed."""
    if name not in _HOMES:
        raise AttributeError(f"module 'kvbench' has no attribute {name!r}")
    from importlib import import_module  # noqa: PLC0415

    return getattr(import_module(f"kvbench.{_HOMES[name]}"), name)
