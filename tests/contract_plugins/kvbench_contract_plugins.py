"""Policies of a third party, each of which needs one more part of the contract than hooks at a decoding step."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Literal

import torch
from pydantic import Field

import kvbench
from kvbench.contract.storage import Storage
from kvbench.kernels.attention import Segment, attend
from kvbench.kernels.insert import insert
from kvbench.kernels.steps import GrowingStep


class EveryOther(kvbench.KVCachePolicy):
    """Governs every other full-attention layer and keeps the most recent tokens there."""

    name = "every_other"
    summary = "Keeps the most recent tokens in every other layer; the layers between stay exact."
    query_window = 0

    class Options(kvbench.Options):
        """Options of the policy."""

        first: int = Field(1, ge=0, le=1, description="the first layer that it governs")

    def governs(self, place):
        """Layers first, first + 2, ..."""
        return place.ordinal % 2 == self.options.first

    def static_tokens(self, context):
        """The newest token."""
        return 0, 1

    def prefill(self, layer, queries, keys, values):
        """Evict all but the most recent tokens."""
        if not layer.budget.covers_all:
            layer.store.keep(torch.arange(layer.tokens - layer.budget.tokens, layer.tokens))

    def insert(self, layer, keys, values):
        """Evict the oldest tokens."""
        if not layer.budget.covers_all:
            layer.store.evict(layer.tokens - layer.budget.tokens - keys.shape[2], keys.shape[2])


class BlockSparse(kvbench.KVCachePolicy):
    """The prompt's queries see the first block of tokens, their own and the one before it; decoding is exact."""

    name = "block_sparse"
    summary = "Block-sparse attention over the prompt; keeps everything."
    takes_budget = False
    never_exact = "the prompt's attention is sparse"
    query_window = 0

    class Options(kvbench.Options):
        """Options of the policy."""

        block: int = Field(16, ge=1, description="tokens in a block")
        dense: int = Field(0, ge=0, description="first layers whose prompt attention stays exact")

    def attend_prompt(self, layer, queries, keys, values):
        """Softmax over the blocks that a query's own block may see."""
        if layer.ordinal < self.options.dense:
            return None
        layer.state["calls"] = layer.state.get("calls", 0) + 1
        tokens, new, size = keys.shape[2], queries.shape[2], self.options.block
        mine = torch.arange(tokens - new, tokens)[:, None]
        theirs = torch.arange(tokens)
        near = (mine // size - theirs // size <= 1) | (theirs < size)
        grouped = queries.unflatten(1, (layer.kv_heads, -1)).flatten(2, 3)
        logits = (grouped @ keys.transpose(-1, -2)).unflatten(2, (-1, new)) * layer.scaling
        weights = logits.masked_fill(~near | (theirs > mine), -torch.inf).softmax(-1)
        return (weights.flatten(2, 3) @ values).unflatten(2, (-1, new)).flatten(1, 2)


class TopInBlocks(kvbench.KVCachePolicy):
    """Sets all but the last tokens aside and chooses the best for each query, however many come at once."""

    name = "top_in_blocks"
    summary = "Exact top-k of the prompt for every query of a block; new tokens stay."
    grows = True
    blocks = True
    query_window = 0

    class Options(kvbench.Options):
        """Options of the policy."""

        window: int = Field(8, ge=1, description="last tokens of the prompt, always attended")

    def static_tokens(self, context):
        """The window."""
        return 0, self.options.window

    def prefill(self, layer, queries, keys, values):
        """Set all but the window aside."""
        layer.store.set_aside(0, layer.tokens - self.options.window, offload=False)

    def select(self, layer, queries, budget):
        """A set for each query."""
        layer.state.setdefault("blocks", []).append(queries.shape[2])
        keys = layer.store.aside_keys.repeat_interleave(layer.heads // layer.kv_heads, dim=1)
        count = budget.beside(self.options.window, keys.shape[2])
        ids = (queries @ keys.transpose(-1, -2)).topk(count, dim=-1).indices
        return kvbench.Selection(ids if queries.shape[2] > 1 else ids[:, :, 0])


class Searching(TopInBlocks):
    """Searches the offloaded tokens on a thread of its own while the static set is attended to."""

    name = "searching"
    summary = "Exact top-k of the offloaded prompt, searched beside the attention to the static set."
    blocks = False

    def __init__(self, options=None):
        """One thread for all layers."""
        super().__init__(options)
        self.thread = ThreadPoolExecutor(1)

    def prefill(self, layer, queries, keys, values):
        """Offload all but the window."""
        layer.store.set_aside(0, layer.tokens - self.options.window, offload=True)

    def begin_select(self, layer, queries, budget):
        """Hand the search to the thread."""
        return self.thread.submit(self.select, layer, queries.cpu(), budget)


class _HalfBuffer(Storage):
    def __init__(self, dtype, keys, values):
        self._dtype, self._like = dtype, keys.dtype
        self._held = [keys.to(dtype), values.to(dtype)]

    @property
    def length(self):
        return self._held[0].shape[2]

    @property
    def nbytes(self):
        return sum(part.nbytes for part in self._held)

    @property
    def keys(self):
        return self._held[0].to(self._like)

    @property
    def values(self):
        return self._held[1].to(self._like)

    def append(self, keys, values):
        new = (keys.to(self._dtype), values.to(self._dtype))
        self._held = [torch.cat(pair, dim=2) for pair in zip(self._held, new, strict=True)]


class Halves(kvbench.KVCachePolicy):
    """Holds every token in 16 bits, its own or those that another policy sets aside."""

    name = "halves"
    summary = "Keeps every token in 16 bits."
    takes_budget = False
    never_exact = "keys and values are held in 16 bits"
    query_window = 0

    class Options(kvbench.Options):
        """Options of the policy."""

        kind: Literal["float16", "bfloat16"] = Field("float16", description="how numbers are held")

    def storage(self, layer):
        """Tensors of 16 bits."""
        return partial(_HalfBuffer, getattr(torch, self.options.kind))

    def prefill(self, layer, queries, keys, values):
        """Set everything aside."""
        layer.store.set_aside(0, layer.tokens, offload=False, storage=self.storage(layer))

    def insert(self, layer, keys, values):
        """Set the new token aside."""
        layer.store.advance(keys.shape[2])

    def select(self, layer, queries, budget):
        """Attend to everything."""
        return kvbench.Selection(everything=True)


class HalvesOfPages(Halves):
    """The same with an option that another policy has, too."""

    name = "halves_of_pages"

    class Options(kvbench.Options):
        """Options of the policy."""

        page_size: int = Field(4, ge=1, description="not used")
        kind: Literal["float16", "bfloat16"] = Field("float16", description="how numbers are held")


class RecentHalves(kvbench.KVCachePolicy):
    """Keeps sinks and recent tokens, all of them in 16 bits."""

    name = "recent_halves"
    summary = "Keeps the first and the most recent tokens of the prompt in 16 bits."
    grows = True
    never_exact = "keys and values are held in 16 bits"
    query_window = 0

    class Options(kvbench.Options):
        """Options of the policy."""

        sinks: int = Field(2, ge=0, description="first tokens that are kept")

    def static_tokens(self, context):
        """The sinks."""
        return self.options.sinks, 0

    def prefill(self, layer, queries, keys, values):
        """Evict what lies between, and hold the rest, and what is generated, in 16 bits."""
        if not layer.budget.covers_all:
            ids, recent = torch.arange(layer.tokens), layer.budget.tokens - self.options.sinks
            layer.store.keep(ids[(ids < self.options.sinks) | (ids >= layer.tokens - recent)])
        layer.store.hold_static(partial(_HalfBuffer, torch.float16))


class LongestValues(kvbench.KVCachePolicy):
    """Keeps the values of largest norm, of the prompt and, again and again, of prompt and answer."""

    name = "longest_values"
    summary = "Keeps the tokens whose values have the largest norm, per head."
    grows = True
    head_budgets = True
    query_window = 0

    def static_tokens(self, context):
        """The newest token."""
        return 0, 1

    def prefill(self, layer, queries, keys, values):
        """Evict the shortest values."""
        layer.keep_top(values[:, :, :-1].norm(dim=-1))

    def score_held(self, layer, held):
        """The norms; the newest token stays."""
        return held.values.norm(dim=-1).masked_fill(held.newest(1), torch.inf)


class PagesByMean(kvbench.KVCachePolicy):
    """Selects whole pages of the prompt by the mean of their keys, as blocks where steps have fixed shapes."""

    name = "pages_by_mean"
    summary = "Pages of the prompt whose mean key a query meets best; new tokens stay."
    query_window = 0
    grows = True

    class Options(kvbench.Options):
        """Options of the policy."""

        page_size: int = Field(4, ge=1, description="tokens in a page")

    def static_tokens(self, context):
        """The last page, and what is left of the prompt behind it."""
        return 0, min(context, self.options.page_size + context % self.options.page_size)

    def prefill(self, layer, queries, keys, values):
        """Set the pages aside, with the mean of each."""
        size, paged = self.options.page_size, layer.tokens - layer.static[1]
        layer.store.set_aside(0, paged, offload=False)
        layer.state["means"] = keys[:, :, :paged].unflatten(2, (-1, size)).mean(3)
        layer.state["pages"] = min(layer.budget.beside(layer.static[1], paged), paged) // size

    def best(self, layer, queries, means):
        """The best pages of each query head, [B, H, p]."""
        grouped = queries.reshape(layer.rows, layer.kv_heads, -1, layer.head_dim)
        scores = (grouped @ means.transpose(-1, -2)).view(layer.rows, layer.heads, -1)
        return scores.topk(layer.state["pages"], dim=-1).indices

    def select(self, layer, queries, budget):
        """Name the tokens of the best pages."""
        best, size = self.best(layer, queries, layer.state["means"]), self.options.page_size
        ids = best[..., None] * size + torch.arange(size, device=best.device)
        return kvbench.Selection(ids.flatten(-2), evaluations=float(layer.state["means"].shape[2]))

    def fixed_step(self, parts, clock):
        """A step for rows of equal length."""
        return PagesStep(self, parts, clock) if len(parts) == 1 else "policy 'pages_by_mean' takes rows of equal length"


class PagesStep(GrowingStep):
    """Attends to the pages in place, by their numbers, and to what is behind them."""

    def __init__(self, policy, parts, clock):
        layer = parts[0].layer
        self.policy, self.layer, self.means = policy, layer, layer.state["means"]
        self.keys, self.values = layer.store.aside_keys, layer.store.aside_values
        super().__init__(parts, clock)

    def __call__(self, queries, keys, values):
        """Append, choose and attend."""
        insert(self.held.keys, self.held.values, keys, values, self.held.lengths)
        self.held.lengths.add_(1)
        best = self.policy.best(self.layer, queries, self.means).int()
        pages = Segment(self.keys, self.values, ids=best, unit=self.policy.options.page_size)
        behind = Segment(self.held.keys, self.held.values, lengths=self.held.lengths)
        return attend(queries, pages, behind, scaling=self.scaling, dtype=queries.dtype)[0]

    def bytes(self):
        """The pages, too, and their means."""
        held = super().bytes()
        return {
            **held,
            "resident": held["resident"] + self.keys.nbytes + self.values.nbytes,
            "index": self.means.nbytes,
        }


@kvbench.hookimpl
def kvbench_policies():
    """Register the policies."""
    return [
        EveryOther,
        BlockSparse,
        TopInBlocks,
        Searching,
        Halves,
        HalvesOfPages,
        RecentHalves,
        LongestValues,
        PagesByMean,
    ]
