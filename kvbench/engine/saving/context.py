"""Saves what a session holds of its context, and loads it into another session."""

from __future__ import annotations

import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from kvbench.contract.errors import KVBenchError
from kvbench.contract.policy import KVCachePolicy
from kvbench.contract.reading import reading
from kvbench.engine.cache import PolicyCache
from kvbench.engine.governor import Governor
from kvbench.engine.saving.files import StateFile, damaged, write
from kvbench.engine.saving.identify import about, check_same
from kvbench.engine.saving.memory import Views, pack
from kvbench.engine.saving.state import read_state, write_state
from kvbench.engine.validation import named

DEPTH = 4
"""How deep a policy's attributes are looked at for changes."""


class Attributes:
    """A policy's attributes at one time, to notice that it keeps something on itself between steps."""

    def __init__(self, policy: KVCachePolicy) -> None:
        self._alive: list[Any] = []  # so that no other object gets an id that was seen
        self._marks = {name: self._mark(value, DEPTH) for name, value in vars(policy).items()}

    def changed(self, policy: KVCachePolicy) -> str | None:
        """The name of an attribute that is new or another one now."""
        now = Attributes(policy)._marks
        return next((name for name, mark in now.items() if self._marks.get(name) != mark), None)

    def _mark(self, value: Any, depth: int) -> Any:
        if value is None or isinstance(value, bool | int | float | str | bytes):
            return value
        self._alive.append(value)
        if isinstance(value, Tensor):
            return id(value), None if value.is_inference() else value._version
        if not depth or isinstance(value, BaseModel | nn.Module | type | types.FunctionType | types.ModuleType):
            return id(value)
        if isinstance(value, Mapping):
            return id(value), tuple((self._mark(key, 0), self._mark(part, depth - 1)) for key, part in value.items())
        if isinstance(value, list | tuple | set):
            return id(value), tuple(self._mark(part, depth - 1) for part in value)
        return id(value), tuple(self._mark(part, depth - 1) for part in getattr(value, "__dict__", {}).values())


def save_context(governor: Governor, cache: PolicyCache | None, before: Attributes | None, path: Path) -> None:
    """Write what `cache` holds to a file; `before` are the policy's attributes before the prompt. KVBenchError."""
    policy = governor.policy
    if not policy.cached:
        raise KVBenchError(f"Policy '{policy.name}' keeps no cache, so there is nothing to save: use another policy.")
    if cache is None:
        raise KVBenchError("There is nothing to save yet: let the model read a prompt first.")
    if cache.open or cache.failed:
        raise KVBenchError(
            "The last call of the model ended in an error, so its cache is not saved: read the prompt again."
        )
    if cache.handed_over:
        raise KVBenchError(
            "The latest prompt was decoded in steps of fixed shapes, which hold its tokens in a form of their own: "
            "save before decoding, or decode with decoding='eager'."
        )
    if not cache.complete:
        seen = max((layer.seen for layer in cache.governed), default=0)
        raise KVBenchError(
            f"The prompt has {seen} of the {cache.prompt_tokens} tokens that were announced: save once it is complete."
        )
    if before is not None and type(policy).save_state is KVCachePolicy.save_state:
        changed = before.changed(policy)
        if changed is not None:
            raise KVBenchError(
                f"{named(policy)} changed its attribute '{changed}' after the session began, and what a policy keeps "
                "on itself is not saved: keep it in layer.state, or define save_state and load_state."
            )
    with torch.inference_mode():
        tree, writer = write_state(cache)
        try:
            tensors, views = pack(writer.views)
        except ValueError as error:
            raise KVBenchError(f"{named(policy)} keeps {error}, which cannot be saved.") from None
        rows = sum(layer.rows for layer in cache.governed[0].by_lane)
        write(path, about(governor, int(tree["tokens"]), rows), tree, views, tensors)


def load_context(governor: Governor, path: Path) -> PolicyCache:
    """A cache with what a file holds; KVBenchError for another model's, policy's or code's, or a damaged one."""
    for probe in governor.probes:
        if any(hasattr(probe, hook) for hook in ("prefill", "after_prompt", "attend_prompt")):
            raise KVBenchError(
                f"Probe '{probe.name}' watches the prompt, which a loaded state has behind it: leave the probe out, or "
                "let the model read the prompt."
            )
    with StateFile(path) as file:
        head = file.head
        check_same(path, head.about, about(governor, head.about.tokens, head.about.rows))
        tensors = file.tensors()
    with reading(lambda reason: str(damaged(path, reason))):
        return read_state(governor, head.tree, Views(tensors, head.views))
