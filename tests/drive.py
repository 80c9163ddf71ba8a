"""Policies on plain vectors, without a model: the hooks in the order in which a session calls them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kvbench.budget import LayerBudget
from kvbench.plugins import registry
from kvbench.policy import DefaultPolicy, Layer, Selection
from kvbench.storage import KVStore


@dataclass
class Vectors:
    """Queries [B, H, n, d], keys and values [B, G, n, d] of a context whose first `prompt` tokens are the prompt."""

    queries: Tensor
    keys: Tensor
    values: Tensor
    prompt: int

    def of(self, row: int, head: int, now: int) -> tuple[Tensor, Tensor, Tensor]:
        """Float64 query [d] of the step that made the context `now` tokens, and its keys and values [now, d]."""
        group = head * self.keys.shape[1] // self.queries.shape[1]
        keys, values = (part[row, group, :now].double() for part in (self.keys, self.values))
        return self.queries[row, head, now - 1].double(), keys, values


def random_vectors(batch: int = 2, heads: int = 6, groups: int = 2, prompt: int = 90, steps: int = 25, d: int = 8,
                   seed: int = 0) -> Vectors:  # fmt: skip
    """Keys around a common mean, as real ones are, and queries that attend sharply enough for choices to matter."""
    random = torch.Generator().manual_seed(seed)
    n = prompt + steps
    queries = torch.randn(batch, heads, n, d, generator=random) * 2
    keys = torch.randn(batch, groups, n, d, generator=random) + torch.randn(batch, groups, 1, d, generator=random)
    return Vectors(queries, keys, torch.randn(batch, groups, n, d, generator=random), prompt)


@dataclass
class Step:
    """One decoding step of a context that is now `now` tokens long."""

    layer: Layer
    selection: Selection
    output: Tensor
    now: int

    def static(self, row: int, head: int) -> list[int]:
        """Ids of the static tokens that a query head attends to."""
        ids = self.layer.store.static_ids
        mine = ids if ids.dim() == 1 else ids[row, head * self.layer.kv_heads // self.layer.heads]
        return [token for token in mine.tolist() if token >= 0]

    def selected(self, row: int, head: int) -> list[int]:
        """Ids of the selected tokens that a query head attends to."""
        store, ids = self.layer.store, self.selection.ids
        if self.selection.everything:
            return list(range(store.aside_start, store.aside_stop))
        if ids is None:
            return []
        mine = ids[row, head if ids.shape[1] == self.layer.heads else head * self.layer.kv_heads // self.layer.heads]
        return [token for token in mine.tolist() if token >= 0]


def drive(name: str, vectors: Vectors, budget: int, options: dict[str, Any] | None = None) -> Iterator[Step]:
    """Run a policy over the vectors, with `budget` tokens; yield every decoding step."""
    policy = registry().make("policy", name, options or {})
    default = DefaultPolicy()
    queries, keys, values, prompt = vectors.queries, vectors.keys, vectors.values, vectors.prompt
    batch, heads, n, d = queries.shape
    layer = Layer(
        index=0, count=1, number=0, heads=heads, kv_heads=keys.shape[1], head_dim=d, scaling=d**-0.5, rows=batch,
        store=KVStore(keys[:, :, :prompt].clone(), values[:, :, :prompt].clone()),
        budget=LayerBudget(budget, covers_all=budget == prompt), static=policy.static_tokens(prompt),
        prompt_tokens=prompt, module=nn.Identity(),
    )  # fmt: skip
    window = prompt if policy.query_window is None else min(policy.query_window, prompt)
    policy.prefill(layer, queries[:, :, prompt - window : prompt], keys[:, :, :prompt], values[:, :, :prompt])
    for now in range(prompt + 1, n + 1):
        step = slice(now - 1, now)
        layer.store.append(keys[:, :, step], values[:, :, step])
        if hasattr(policy, "insert"):
            policy.insert(layer, keys[:, :, step], values[:, :, step])
        chooser = policy if hasattr(policy, "select") else default
        selection = chooser.select(layer, queries[:, :, step], layer.budget)
        attender = policy if hasattr(policy, "attend") else default
        yield Step(layer, selection, attender.attend(layer, queries[:, :, step], selection).output, now)
