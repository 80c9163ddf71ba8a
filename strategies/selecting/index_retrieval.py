"""Retrieval policies: a vector index over offloaded keys answers each head's query, whatever the index."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from kvbench.contract.budget import LayerBudget
from kvbench.contract.layer import Layer
from kvbench.contract.selection import Pending, Selection
from kvbench.contract.step import Clock, FixedStep, Part
from kvbench.indexes.base import Index
from kvbench.indexes.flat import Flat
from kvbench.indexes.threads import beside
from kvbench.indexes.tuning import least_effort
from kvbench.strategies.selecting.aside import ScoreStep
from kvbench.strategies.selecting.index_step import IndexStep, Where
from kvbench.strategies.selecting.static_set import StaticSetOptions
from kvbench.strategies.selecting.tiers import SelectingPolicy

HELD_OUT = 32
"""Last queries of the prompt, at most, that set the effort and train no index."""
MISSED = 0.6
"""The part of the allowed misses that these queries may use up: the answer's queries find a little less."""
BEST = 100
"""The exact best keys of which a part must be found, where the budget leaves as many."""


def held_out_recall(recall: float) -> float:
    """What a search must reach on held-out queries of the prompt so that it reaches `recall` while decoding."""
    return 1 - MISSED * (1 - recall)


class RetrievalOptions(StaticSetOptions):
    """Options of every retrieval policy, beside those of its index."""

    insert_every: int = Field(
        16,
        ge=0,
        description="tokens that leave the window for the index at a time; 0 keeps all new tokens in the window",
    )
    recall: float | None = Field(
        None,
        gt=0,
        le=1,
        description="recall (of the best 100) that sets each layer's search effort, on queries of the prompt held out",
    )
    attention: Where = Field(
        "auto",
        description="where steps of fixed shapes attend to the found tokens: host, device (in pinned memory), or auto",
    )


class IndexRetrieval(SelectingPolicy):
    """Offloads all but the static set and attends, per query head, to the tokens that an index finds.

    Subclasses name their `index` and merge its options into their `Options`. With `insert_every` tokens beyond the
    window (fewer where the budget is tight), the oldest are offloaded and inserted into the index, so that the tokens
    attended stay at the budget.
    """

    together = True
    offload = True
    head_budgets = True
    index: ClassVar[type[Index]]

    def __init__(self, options: BaseModel | None = None) -> None:
        super().__init__(options)
        fields = self.index.Options.model_fields
        self._index_options: Any = self.index.Options(**{name: getattr(self.options, name) for name in fields})
        if self.index.uses_queries:
            self.query_window = None
        else:
            self.query_window = 0 if self.options.recall is None else HELD_OUT

    def build(self, layer: Layer, queries: Tensor, keys: Tensor, values: Tensor) -> None:
        """Index the offloaded keys, on a GPU that has them where the index can."""
        index, heads = self.index(self._index_options), layer.rows * layer.heads
        held_out = 0 if self.options.recall is None else min(HELD_OUT, queries.shape[2] // 8)
        training = queries[:, :, : queries.shape[2] - held_out]
        asked = training.flatten(0, 1) if self.index.uses_queries else None
        offloaded = layer.store.aside_keys.flatten(0, 1)
        if keys.is_cuda:
            index.build_beside(offloaded, keys.flatten(0, 1), asked, heads=heads)
        else:
            index.build(offloaded, asked, heads=heads)
        layer.state["index"] = index
        if held_out:
            layer.state["effort"] = self._effort(layer, queries[:, :, queries.shape[2] - held_out :], keys)
        layer.store.index_bytes = index.nbytes

    def _effort(self, layer: Layer, queries: Tensor, keys: Tensor) -> int | None:
        """The least effort that finds enough of the exact best of set-aside `keys` for the prompt's last `queries`."""
        wanted = layer.budget.beside(sum(layer.static), keys.shape[2])
        if wanted in (0, keys.shape[2]):
            return None
        share = layer.heads // layer.kv_heads
        best = torch.stack([
            (row.flatten(0, 1).float() @ group.float().T).topk(min(BEST, wanted), dim=-1).indices
            for rows, groups in zip(queries, keys, strict=True)
            for row, group in zip(rows.unflatten(0, (-1, share)), groups, strict=True)
        ])  # fmt: skip
        asked = queries.flatten(0, 1).float().cpu().numpy()
        exact = best.view(*asked.shape[:2], -1).cpu().numpy()
        return least_effort(layer.state["index"], asked, exact, wanted, held_out_recall(self.options.recall))

    def choose(self, layer: Layer, queries: Tensor, wanted: int) -> Selection:
        """Search the index with each head's query."""
        effort = layer.state.get("effort")
        found = layer.state["index"].search(queries.flatten(0, 1).cpu(), wanted, effort=effort)
        ids = torch.from_numpy(found.ids).long().view(layer.rows, layer.heads, wanted)
        ids = torch.where(ids < 0, -1, ids + layer.store.aside_start)
        evaluations = torch.from_numpy(found.evaluations).view(layer.rows, layer.heads)
        return Selection(ids, padded=True, evaluations=evaluations)

    def choose_each(self, layer: Layer, queries: Tensor, wanted: Sequence[int]) -> Selection:
        """Search the index with all of a head's queries."""
        effort = layer.state.get("effort")
        found = layer.state["index"].search(queries.flatten(0, 1).cpu(), wanted[0], effort=effort)
        ids = torch.from_numpy(found.ids).long().view(layer.rows, layer.heads, len(wanted), wanted[0])
        beyond = torch.arange(wanted[0]) >= torch.tensor(wanted)[:, None]
        return Selection(torch.where((ids < 0) | beyond, -1, ids + layer.store.aside_start), padded=True)

    def leave(self, layer: Layer, beyond: int) -> bool:
        """Move what has grown out of the window to the host and into the index, if new tokens go there at all."""
        return bool(self.options.insert_every) and super().leave(layer, beyond)

    def moves(self, layer: Layer, beyond: int) -> bool:
        """Every `insert_every` tokens; the first time sooner, so that only some of the layers insert at a step."""
        every = int(self.options.insert_every)
        moved = layer.store.aside_stop > layer.prompt_tokens - layer.static[1]
        early = 0 if moved or self.index is Flat else layer.ordinal * every // layer.count
        return beyond >= every - early

    def until(self, layer: Layer, most: int) -> int:
        """Tokens beyond the window when some leave it the next time; more than `most` where none does so soon."""
        return super().period(layer, most) if self.options.insert_every else most + 1

    def period(self, layer: Layer, most: int) -> int:
        """As `insert_every` says, or sooner where the budget is tight."""
        every = min(int(self.options.insert_every) or most + 1, most + 1)
        tight = range(1, every) if self.options.insert_every else ()
        return next((n for n in tight if self._over_budget(layer, n)), every)

    def begin_select(self, layer: Layer, queries: Tensor, budget: LayerBudget) -> Pending | None:
        """Search on another thread; None where nothing is searched for."""
        store = layer.store
        available = store.aside_stop - store.aside_start
        if budget.beside(store.static_tokens, available) in (0, available):
            return None
        return beside(self.select, layer, queries.cpu(), budget)

    def aside_step(self, parts: Sequence[Part], clock: Clock) -> FixedStep | None:
        """A search on the host between two graphs of a layer.

        With exact search, which needs no structure, every key is read from the host by the device at each step; and
        nothing is searched for where all tokens are attended to.
        """
        if self.index is Flat or all(part.layer.budget.covers_all for part in parts):
            return ScoreStep(self, parts, clock)
        return IndexStep(self, parts, clock, self.options.attention)

    def grow(self, layer: Layer, keys: Tensor, values: Tensor) -> None:
        """Insert the new keys into the index."""
        layer.state["index"].insert(keys.flatten(0, 1).cpu(), storage=layer.store.aside_keys.flatten(0, 1))
        layer.store.index_bytes = layer.state["index"].nbytes


def retrieval_policy(
    index: type[Index], *, name: str | None = None, summary: str | None = None, reference: str | None = None
) -> type[IndexRetrieval]:
    """Make the policy that attends to what `index` finds; by default it has the index's name and reference."""
    options = type(
        "Options",
        (RetrievalOptions, index.Options),
        {"__doc__": "Options of the retrieval policy and of the index.", "__module__": index.__module__},
    )
    return type(
        f"{index.__name__}Retrieval",
        (IndexRetrieval,),
        {
            "__doc__": f"Attends to the keys that index '{index.name}' finds for each head's query.",
            "__module__": index.__module__,
            "name": name or index.name,
            "summary": summary or f"Top-k over offloaded keys by index '{index.name}': {index.summary.rstrip('.')}.",
            "reference": index.reference if reference is None else reference,
            "index": index,
            "Options": options,
            "derived": True,
        },
    )
