"""Packages that only some commands and tasks need: named, with the pip command, before any work is done."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from kvbench.contract.errors import KVBenchError

EXTRAS = {
    "duckdb": "leaderboard",
    "jieba": "chinese",
    "lm_eval": "lm-eval",
    "nltk": "metrics",
    "pyarrow": "hub",
    "rapidfuzz": "metrics",
    "ray": "ray",
    "rouge_score": "metrics",
    "sacrebleu": "metrics",
    "simpy": "trace",
    "trackio": "trackio",
    "triton": "gpu",
    "wandb": "wandb",
}
"""Module -> the extra of kvbench that installs it."""


def need(module: str, purpose: str) -> Any:
    """Import and give a module of an extra; raises KVBenchError, which names the pip command, where it is missing.

    `purpose` says who needs it, as the beginning of a sentence: `kvbench leaderboard`.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise _missing(module, purpose, error) from None


def check_extras(purpose: str, *modules: str) -> None:
    """Raise KVBenchError where a module of an extra is not installed; nothing is imported."""
    for module in modules:
        if find_spec(module.partition(".")[0]) is None:
            raise _missing(module, purpose, None)


def _missing(module: str, purpose: str, error: ImportError | None) -> KVBenchError:
    top = module.partition(".")[0]
    broken = error is not None and error.name not in (None, top, module)
    why = f"which cannot be imported ({error})" if broken else "which is not installed"
    return KVBenchError(f"{purpose} needs the package {top}, {why}: run pip install 'kvbench[{EXTRAS[top]}]'.")
