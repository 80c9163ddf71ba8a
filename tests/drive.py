"""Policies on plain vectors, without a model: the hooks in the order in which a session calls them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kvbench.contract.budget import LayerBudget
from kvbench.contract.layer import Layer
from kvbench.contract.selection import Selection
from kvbench.contract.storage import KVStore
from kvbench.engine.governor import DefaultPolicy
from kvbench.engine.rotary import Rotary
from kvbench.plugins import registry


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


class Driven:
    """A policy that has taken over the prompt of some vectors, with a budget in tokens, and decodes the rest."""

    def __init__(self, name: str, vectors: Vectors, budget: int, options: dict[str, Any] | None = None,
                 rotary: Rotary | None = None, module: nn.Module | None = None) -> None:  # fmt: skip
        self.vectors, self.policy = vectors, registry().make("policy", name, options or {})
        default = DefaultPolicy()
        self._select = getattr(self.policy, "select", default.select)
        self._attend = getattr(self.policy, "attend", default.attend)
        queries, keys, values, prompt = vectors.queries, vectors.keys, vectors.values, vectors.prompt
        batch, heads, _, d = queries.shape
        self.layer = Layer(
            ordinal=0, count=1, number=0, heads=heads, kv_heads=keys.shape[1], head_dim=d, scaling=d**-0.5, rows=batch,
            store=KVStore(keys[:, :, :prompt].clone(), values[:, :, :prompt].clone()),
            budget=LayerBudget(budget, covers_all=budget == prompt), static=self.policy.static_tokens(prompt),
            prompt_tokens=prompt, module=module or nn.Identity(), rotary=rotary,
        )  # fmt: skip
        window = prompt if self.policy.query_window is None else min(self.policy.query_window, prompt)
        self.policy.prefill(
            self.layer, queries[:, :, prompt - window : prompt], keys[:, :, :prompt], values[:, :, :prompt]
        )

    def step(self) -> Step:
        """Decode the next token."""
        now = self.layer.tokens + 1
        queries, keys, values = (
            part[:, :, now - 1 : now] for part in (self.vectors.queries, self.vectors.keys, self.vectors.values)
        )
        self.layer.store.append(keys, values)
        if hasattr(self.policy, "insert"):
            self.policy.insert(self.layer, keys, values)
        selection = self._select(self.layer, queries, self.layer.budget)
        return Step(self.layer, selection, self._attend(self.layer, queries, selection).output, now)


def drive(name: str, vectors: Vectors, budget: int, options: dict[str, Any] | None = None) -> Iterator[Step]:
    """Run a policy over the vectors, with `budget` tokens; yield every decoding step."""
    driven = Driven(name, vectors, budget, options)
    for _ in range(vectors.queries.shape[2] - vectors.prompt):
        yield driven.step()
