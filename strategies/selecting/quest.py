"""Quest (arXiv 2406.10774): select pages of keys by an upper bound of their scores."""

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from kvbench.contract.budget import LayerBudget
from kvbench.contract.extension import Options
from kvbench.contract.layer import Layer
from kvbench.contract.policy import KVCachePolicy
from kvbench.contract.selection import Selection
from kvbench.contract.step import Clock, FixedStep, FixedTokens, Part
from kvbench.kernels.attention import Segment, attend
from kvbench.kernels.bounds import update_bounds
from kvbench.kernels.insert import insert
from kvbench.kernels.score import page_scores
from kvbench.kernels.select import select_top
from kvbench.kernels.steps import GrowingStep


def note_pages(layer: Layer, keys: Tensor, size: int) -> None:
    """Add to `low` and `high` of the layer's state the bounds of keys [B, G, n, d] in pages of `size`, n a multiple."""
    low, high = keys.reshape(*keys.shape[:2], -1, size, keys.shape[3]).aminmax(dim=3)
    if "low" in layer.state:
        low, high = torch.cat([layer.state["low"], low], dim=2), torch.cat([layer.state["high"], high], dim=2)
    layer.state["low"], layer.state["high"] = low, high
    layer.store.index_bytes = low.nbytes + high.nbytes


class Quest(KVCachePolicy):
    """Selects, per query head, the pages whose channel-wise minima and maxima allow the highest score.

    The page that is being filled is always attended. The paper leaves layers 0 and 1 dense and outside its budget;
    with `--dense-layers 2` (`attach(..., dense_layers=2)`) they are so here too, and the results' density counts them.
    """

    name = "quest"
    summary = "Selects pages of 16 tokens at each step, by the bounds of their keys; keeps everything on the device."
    reference = "Tang et al., Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference, arXiv 2406.10774"
    head_budgets = True
    query_window = 0

    class Options(Options):
        """Options of Quest."""

        page_size: int = Field(16, ge=1, description="tokens in a page")

    def static_tokens(self, context: int) -> tuple[int, int]:
        """The page that is being filled."""
        return 0, self.options.page_size

    def prefill(self, layer: Layer, queries: Tensor, keys: Tensor, values: Tensor) -> None:
        """Set the full pages aside, on the device, and note the bounds of their keys."""
        size = self.options.page_size
        full = (layer.tokens - 1) // size * size
        if full == 0:
            return
        layer.store.set_aside(0, full, offload=False)
        self._note_pages(layer, keys[:, :, :full])

    def _note_pages(self, layer: Layer, keys: Tensor) -> None:
        note_pages(layer, keys, self.options.page_size)

    def insert(self, layer: Layer, keys: Tensor, values: Tensor) -> None:
        """Close the current page once it is full and a further token has come, the first of a block (`at_once`)."""
        first = layer.store.static_tokens - (keys.shape[2] - 1)
        if "low" in layer.state and first > self.options.page_size:
            self._note_pages(layer, layer.store.advance(self.options.page_size)[0])

    def at_once(self, layer: Layer, most: int) -> int:
        """What fills a page: the next one where the current one is full."""
        kind, size = type(self), int(self.options.page_size)
        if kind.select is not Quest.select or kind.insert is not Quest.insert or hasattr(self, "attend"):
            return 1
        if "low" not in layer.state:
            return most
        room = size - layer.store.static_tokens
        return room if room > 0 else size

    def fixed_step(self, parts: Sequence[Part], clock: Clock) -> FixedStep | str | None:
        """Pages in place; None where only some rows of the layer have any."""
        paged = {"low" in part.layer.state for part in parts}
        if len(paged) > 1:
            return None
        if not paged.pop():
            return GrowingStep(parts, clock)
        return QuestStep(parts, clock, self.options.page_size, PlainTokens(parts, clock, self._capacity(parts, clock)))

    def held_step(self, parts: Sequence[Part], clock: Clock, holder: KVCachePolicy) -> FixedStep | str | None:
        """Pages of tokens that another policy holds."""
        if any("low" not in part.layer.state for part in parts):
            return "a prompt of a page holds no codes"
        size = self.options.page_size
        tokens = holder.fixed_tokens(parts, clock, size, self._capacity(parts, clock))
        return tokens if isinstance(tokens, str) else QuestStep(parts, clock, size, tokens)

    def _capacity(self, parts: Sequence[Part], clock: Clock) -> int:
        longest, size = max(part.layer.tokens for part in parts), int(self.options.page_size)
        return -(-(longest + clock.new_tokens) // size) * size

    def select(self, layer: Layer, queries: Tensor, budget: LayerBudget) -> Selection:
        """Take the best pages of each query head by Σ_c max(q_c·min_c, q_c·max_c)."""
        if "low" not in layer.state:
            return Selection()
        size, low, high = self.options.page_size, layer.state["low"], layer.state["high"]
        grouped = queries.reshape(layer.rows, layer.kv_heads, -1, layer.head_dim)
        bounds = grouped.clamp_min(0) @ high.transpose(-1, -2) + grouped.clamp_max(0) @ low.transpose(-1, -2)
        pages, block = low.shape[2], queries.shape[2]
        if block > 1:
            return self._select_each(layer, bounds.view(layer.rows, layer.heads, block, pages), budget)
        best = budget.top(bounds.view(layer.rows, layer.heads, pages), layer.store.static_tokens, unit=size)
        ids = best[..., None] * size + torch.arange(size, device=best.device)
        ids = ids.masked_fill(best[..., None] < 0, -1).flatten(-2)
        return Selection(ids, padded=budget.heads is not None, evaluations=float(pages))

    def _select_each(self, layer: Layer, bounds: Tensor, budget: LayerBudget) -> Selection:
        """The best pages by `bounds` [B, H, m, p] of a block of queries, each beside the tokens of the page so far."""
        size, (_, _, block, pages) = self.options.page_size, bounds.shape
        static = [layer.store.static_tokens - later for later in reversed(range(block))]
        each = [budget.top(bounds[:, :, place], count, unit=size) for place, count in enumerate(static)]
        best = bounds.new_full((*bounds.shape[:3], max(part.shape[-1] for part in each)), -1, dtype=torch.long)
        for place, part in enumerate(each):
            best[:, :, place, : part.shape[-1]] = part
        ids = best[..., None] * size + torch.arange(size, device=best.device)
        return Selection(ids.masked_fill(best[..., None] < 0, -1).flatten(-2), padded=True, evaluations=float(pages))


class QuestStep(FixedStep):
    """Quest's step in fixed shapes: tokens and bounds of all pages lie in one place, the page being filled included."""

    def __init__(self, parts: Sequence[Part], clock: Clock, page_size: int, tokens: FixedTokens) -> None:
        layer = parts[0].layer
        self._tokens, self._size, self._positions, self._scaling = tokens, page_size, clock.positions, layer.scaling
        self._pages_held = pages = -(-(max(part.layer.tokens for part in parts) + clock.new_tokens) // page_size)
        low, shape = layer.state["low"], (clock.batch, layer.kv_heads)
        self._low, self._high = (low.new_zeros(*shape, pages, low.shape[3]) for _ in range(2))
        budget = torch.zeros(shape, dtype=torch.int32, device=clock.positions.device)
        for part in parts:
            store, state = part.layer.store, part.layer.state
            rows = slice(None) if part.rows is None else part.rows.to(budget.device)
            full = store.aside_stop // page_size
            current = store.static_parts()[0][0].aminmax(dim=2)
            for bounds, known, mine in ((self._low, state["low"], current[0]), (self._high, state["high"], current[1])):
                bounds[rows, :, :full], bounds[rows, :, full] = known, mine
            own = part.layer.budget
            count = pages * page_size if own.covers_all else own.tokens if own.heads is None else own.heads
            budget[rows] = torch.as_tensor(count).to(budget)
            store.release_static(0)
            store.release_aside()
            state.clear()
        self._budget = budget.repeat_interleave(layer.heads // layer.kv_heads, dim=1)
        most = max(min((int(budget.max()) - 1) // page_size, pages), 1)
        key = "quest", page_size, tuple(self._budget.flatten().tolist())
        self._leads = key not in clock.shared
        self._pages: _Pages = clock.shared.setdefault(key, _Pages(self._budget, clock.positions, page_size, most))
        self._ids = torch.empty(clock.batch, layer.heads, most + 1, dtype=torch.int32, device=budget.device)
        self._bounds = torch.empty(clock.batch, layer.heads, pages, device=budget.device)

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Append, widen the page's bounds, choose the best full pages and attend to them and the current one."""
        shared, positions = self._pages, self._positions
        if self._leads:
            shared.count()
        self._tokens.insert(keys, values)
        update_bounds(keys, positions, self._size, self._low, self._high)
        bounds = page_scores(queries, self._low, self._high, shared.full, output=self._bounds)
        ids = select_top(bounds, shared.wanted, shared.most, also=shared.full, output=self._ids)
        return self._tokens.attend(queries, ids, self._size, shared.tokens, self._scaling)

    def bytes(self) -> dict[str, int]:
        """Tokens on the device; the bounds are the index."""
        return {
            "resident": self._tokens.nbytes,
            "offloaded": 0,
            "index": self._low.nbytes + self._high.nbytes,
        }

    def reads(self, tokens: int) -> dict[str, int]:
        """All bounds of full pages, once for each key/value head, and the chosen tokens of each query head's group."""
        share = min(tokens / (self._low.shape[2] * self._size), 1.0)
        token = self._tokens.nbytes // (self._pages_held * self._size)
        chosen = int(self._budget.clamp_max(tokens).float().mean()) * token
        return {"device": int((self._low.nbytes + self._high.nbytes) * share) + chosen, "host": 0}

    def changed(self) -> Sequence[Tensor]:
        """Nothing: a step writes the same token, and the same bounds, to the same place again."""
        return []


class PlainTokens(FixedTokens):
    """All tokens as they are: `keys` and `values` [B, G, capacity, d], by their ids."""

    def __init__(self, parts: Sequence[Part], clock: Clock, capacity: int) -> None:
        first, self._positions = parts[0].layer.store, clock.positions
        shape = (clock.batch, parts[0].layer.kv_heads, capacity)
        self.keys, self.values = (like.new_zeros(*shape, like.shape[3]) for like in first.aside.decoded())
        for part in parts:
            store = part.layer.store
            rows = slice(None) if part.rows is None else part.rows.to(clock.positions.device)
            current_keys, current_values, _ = store.static_parts()[0]
            for target, aside, current in (
                (self.keys, store.aside_keys, current_keys),
                (self.values, store.aside_values, current_values),
            ):
                target[rows, :, : store.aside_stop] = aside
                target[rows, :, store.aside_stop : store.tokens] = current

    def insert(self, keys: Tensor, values: Tensor) -> None:
        """Append."""
        insert(self.keys, self.values, keys, values, self._positions)

    def attend(self, queries: Tensor, ids: Tensor, unit: int, lengths: Tensor, scaling: float) -> Tensor:
        """Attend to the blocks, read in place."""
        chosen = Segment(self.keys, self.values, lengths, ids, unit)
        return attend(queries, chosen, scaling=scaling, dtype=queries.dtype)[0]

    @property
    def nbytes(self) -> int:
        """Keys and values."""
        return self.keys.nbytes + self.values.nbytes


class _Pages:
    """How many pages are full and how many a head may choose, counted once a step for all layers of one budget."""

    def __init__(self, budget: Tensor, positions: Tensor, page_size: int, most: int) -> None:
        self.most = most
        self._budget, self._positions, self._size = budget, positions, page_size
        self.full, self.tokens = torch.zeros_like(positions), torch.zeros_like(positions)
        self.wanted = torch.zeros_like(budget)

    def count(self) -> None:
        """Count at the step's position."""
        torch.div(self._positions, self._size, rounding_mode="floor", out=self.full)
        torch.add(self._positions, 1, out=self.tokens)
        beside = self._budget - (self.tokens - self.full * self._size)[:, None]
        torch.div(beside, self._size, rounding_mode="floor", out=self.wanted)
