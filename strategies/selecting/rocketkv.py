"""RocketKV (arXiv 2502.14051): evict from the prompt once, then choose pages of what is left on a few channels."""

import math
from collections.abc import Sequence
from functools import partial

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from kvbench.contract import extension
from kvbench.contract.budget import LayerBudget
from kvbench.contract.buffers import gathered
from kvbench.contract.layer import Layer
from kvbench.contract.policy import KVCachePolicy
from kvbench.contract.selection import Selection
from kvbench.contract.step import Clock, FixedStep, Part, rows_of
from kvbench.contract.storage import Storage, TokenBuffer
from kvbench.kernels.attention import Segment, attend
from kvbench.kernels.bounds import update_bounds
from kvbench.kernels.insert import insert
from kvbench.kernels.select import select_top
from kvbench.kernels.steps import GrowingStep
from kvbench.strategies.evicting.snapkv import pooled, window_votes
from kvbench.strategies.selecting.quest import note_pages


class Kept(Storage):
    """Those of a prompt's first tokens that each head kept, in order, and all that follow.

    `ids` [B, G, k], ascending, name the kept ones; slots count all tokens, and a slot of one that is gone has −∞ scores
    and zeros.
    """

    def __init__(self, ids: Tensor, keys: Tensor, values: Tensor) -> None:
        self.ids = ids
        self._first = keys.shape[2]
        self.held = TokenBuffer(gathered(keys, ids), gathered(values, ids))

    @property
    def length(self) -> int:  # type: ignore[override]
        """Tokens, those that are gone included."""
        return self._first + self.held.length - self.ids.shape[-1]

    @property
    def nbytes(self) -> int:
        """Bytes of what is held and of the ids."""
        return self.held.nbytes + self.ids.nbytes

    @property
    def keys(self) -> Tensor:
        """All keys [B, G, t, d], zeros for those that are gone."""
        return self._spread(self.held.keys, 0.0)

    @property
    def values(self) -> Tensor:
        """All values [B, G, t, d], zeros for those that are gone."""
        return self._spread(self.held.values, 0.0)

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add tokens at the end."""
        self.held.append(keys, values)

    def places(self) -> Tensor:
        """The slot [B, G, h] of each held token."""
        later = torch.arange(self._first, self.length, device=self.ids.device)
        return torch.cat([self.ids, later.expand(*self.ids.shape[:2], -1)], dim=-1)

    def pick(self, slots: Tensor, heads: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the tokens in `slots` [B, H or G, k], which are held; any token for one that is gone."""
        share = heads // self.ids.shape[1]
        ids = self.ids if share == 1 else self.ids.repeat_interleave(share, dim=1)
        place = torch.searchsorted(ids.contiguous(), slots.contiguous()).clamp_max(max(ids.shape[-1] - 1, 0))
        later = slots - self._first + ids.shape[-1]
        return self.held.pick(torch.where(slots < self._first, place, later), heads)

    def scores(self, queries: Tensor, scaling: float) -> Tensor:
        """Scaled inner products with all keys; −∞ for those that are gone."""
        found = self.held.scores(queries, scaling)
        grouped = found.view(*self.ids.shape[:2], -1, found.shape[2]).transpose(2, 3)
        return self._spread(grouped, -torch.inf).transpose(2, 3).flatten(1, 2)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """Sum of all values with `weights` [B, H, t]."""
        places = self.places().repeat_interleave(weights.shape[1] // self.ids.shape[1], dim=1)
        return self.held.weighted_sum(weights.gather(-1, places))

    def _spread(self, mine: Tensor, fill: float) -> Tensor:
        whole = mine.new_full((*mine.shape[:2], self.length, mine.shape[3]), fill)
        return whole.scatter_(2, self.places()[..., None].expand_as(mine), mine)


def split(tokens: int, budget: int) -> int:
    """Tokens that the first stage keeps of `tokens`, where `budget` are attended to: t / c^α, c = t / budget.

    α = min(0.2 + 0.06 · log₂ c, 0.8) is the share of the compression, by its logarithm, that eviction takes.
    """
    ratio = max(tokens / budget, 1.0)
    share = min(0.2 + 0.06 * math.log2(ratio), 0.8)
    return min(max(math.ceil(tokens / math.pow(ratio, share)), budget), tokens)


def page_bounds(queries: Tensor, low: Tensor, high: Tensor, channels: int) -> Tensor:
    """Scores, float32 [B, G, p], of pages by their keys' minima and maxima [B, G, p, d] for queries [B, H, 1, d].

    Each query head's bound, on the `channels` channels of the group's largest Σ|q|, summed over the group.
    """
    grouped = queries.float().reshape(*low.shape[:2], -1, queries.shape[3])
    heavy = grouped.abs().sum(2).topk(channels, dim=-1).indices
    asked = grouped.gather(3, heavy[:, :, None].expand(-1, -1, grouped.shape[2], -1))
    place = heavy[:, :, None].expand(-1, -1, low.shape[2], -1)
    up, down = asked.clamp_min(0).sum(2, keepdim=True), asked.clamp_max(0).sum(2, keepdim=True)
    ends = (high.gather(3, place).float() * up).sum(-1), (low.gather(3, place).float() * down).sum(-1)
    return ends[0] + ends[1]


class RocketKV(KVCachePolicy):
    """Keeps t / c^α of a prompt's t tokens, then attends to the best pages of them, and to the latest tokens.

    c is the prompt's length by the budget and α = min(0.2 + 0.06 · log₂ c, 0.8). The first stage keeps what the last
    queries attend to, summed, pooled widely and averaged over a group's heads, and the window. The second cuts what a
    head kept into pages, in order, and takes those of the highest bounds on the channels where the group's queries are
    largest. The page that is being filled is always attended to; generated tokens join the pages.
    """

    name = "rocketkv"
    summary = "Evicts from the prompt as SnapKV does, then selects pages of what is left on the heaviest channels."
    reference = (
        "Behnam et al., RocketKV: Accelerating Long-Context LLM Inference via Two-Stage KV Cache Compression, "
        "ICML 2025, arXiv 2502.14051"
    )
    query_aware = "evicts what the prompt's last queries do not attend to"

    class Options(extension.Options):
        """Options of RocketKV."""

        window: int = Field(32, ge=1, description="last queries of the prompt that vote, whose tokens are kept")
        kernel: int = Field(63, ge=1, description="width of the max-pooling over neighbouring tokens; odd")
        page_size: int = Field(4, ge=1, description="tokens in a page")
        channels: float = Field(0.5, gt=0, le=1, description="share of the channels that pages are scored on")

    def __init__(self, options: BaseModel | None = None) -> None:
        super().__init__(options)
        self.query_window = self.options.window

    def static_tokens(self, context: int) -> tuple[int, int]:
        """The page that is being filled."""
        return 0, self.options.page_size

    def prefill(self, layer: Layer, queries: Tensor, keys: Tensor, values: Tensor) -> None:
        """Keep what the window votes for, set all full pages of it aside and note their bounds."""
        tokens, size = layer.tokens, self.options.page_size
        kept = tokens if layer.budget.covers_all else split(tokens, layer.budget.tokens)
        full = (kept - 1) // size * size  # of what is kept; the rest is the page that is being filled
        if full == 0:
            return
        first, before = tokens - (kept - full), tokens - queries.shape[2]
        if kept == tokens:
            ids = torch.arange(full, device=keys.device).expand(*keys.shape[:2], -1)
        else:
            votes = pooled(
                window_votes(queries, keys, layer.scaling)[..., :before], layer.kv_heads, self.options.kernel, "max"
            )
            # votes are less than the window's length; of the window itself the latest come first
            latest = torch.arange(first, dtype=torch.float32, device=keys.device) + self.options.window
            scores = latest.expand(*keys.shape[:2], -1).clone()
            scores[..., : min(before, first)] = votes[..., :first]
            ids = scores.topk(full, dim=-1).indices.sort(-1).values
        layer.store.set_aside(0, first, offload=False, storage=partial(Kept, ids))
        note_pages(layer, gathered(keys, ids), size)

    def insert(self, layer: Layer, keys: Tensor, values: Tensor) -> None:
        """Close the current page once it is full and a further token has come."""
        if "low" in layer.state and layer.store.static_tokens > self.options.page_size:
            note_pages(layer, layer.store.advance(self.options.page_size)[0], self.options.page_size)

    def channels(self, dim: int) -> int:
        """How many channels pages are scored on."""
        share: float = self.options.channels
        return max(round(share * dim), 1)

    def select(self, layer: Layer, queries: Tensor, budget: LayerBudget) -> Selection:
        """Take the pages of the best bounds, one set for a group."""
        if "low" not in layer.state:
            return Selection()
        if budget.covers_all:
            return Selection(everything=True, evaluations=0.0)
        size, low, high = self.options.page_size, layer.state["low"], layer.state["high"]
        found = page_bounds(queries, low, high, self.channels(layer.head_dim))
        best = budget.top(found, layer.store.static_tokens, unit=size)
        slots = (best[..., None] * size + torch.arange(size, device=best.device)).flatten(2)
        aside = layer.store.aside
        assert isinstance(aside, Kept)
        return Selection(aside.places().gather(-1, slots), evaluations=float(low.shape[2]))

    def fixed_step(self, parts: Sequence[Part], clock: Clock) -> FixedStep | None:
        """Pages in place; None where only some rows of the layer have any."""
        paged = {"low" in part.layer.state for part in parts}
        if len(paged) > 1:
            return None
        return RocketStep(self, parts, clock) if paged.pop() else GrowingStep(parts, clock)


class RocketStep(FixedStep):
    """A step in fixed shapes: what each head holds lies in order, the page that is being filled last."""

    def __init__(self, policy: RocketKV, parts: Sequence[Part], clock: Clock) -> None:
        layer, device = parts[0].layer, clock.positions.device
        self._size, self._scaling, self._channels = (
            policy.options.page_size,
            layer.scaling,
            policy.channels(layer.head_dim),
        )
        held = {id(part): part.layer.store.aside for part in parts}
        counts = [aside.held.length for aside in held.values() if isinstance(aside, Kept)]
        late = [part.layer.store.static_tokens for part in parts]
        room = max(a + b for a, b in zip(counts, late, strict=True)) + clock.new_tokens
        self._pages = -(-room // self._size)
        shape = clock.batch, layer.kv_heads
        first_keys, first_values, _ = layer.store.static_parts()[0]
        self._keys, self._values = (
            like.new_zeros(*shape, self._pages * self._size, like.shape[3]) for like in (first_keys, first_values)
        )
        low = layer.state["low"]
        self._low, self._high = (low.new_zeros(*shape, self._pages, low.shape[3]) for _ in range(2))
        self._held = torch.zeros_like(clock.positions)
        """Tokens that each row's heads hold before the step's own."""
        self._budget = torch.zeros_like(clock.positions)
        for part, count, more in zip(parts, counts, late, strict=True):
            rows, store, state = list(rows_of(part)), part.layer.store, part.layer.state
            aside, full = store.aside, count // self._size
            assert isinstance(aside, Kept)
            keys, values, _ = store.static_parts()[0]
            for target, old, new in ((self._keys, aside.held.keys, keys), (self._values, aside.held.values, values)):
                target[rows, :, :count], target[rows, :, count : count + more] = old, new
            for bounds, known, current in zip(
                (self._low, self._high), (state["low"], state["high"]), keys.aminmax(dim=2), strict=True
            ):
                bounds[rows, :, :full], bounds[rows, :, full] = known, current
            self._held[rows] = count + more
            own = part.layer.budget
            self._budget[rows] = self._pages * self._size if own.covers_all else own.tokens
            store.release_static(0)
            store.release_aside()
            state.clear()
        self._most = max(min((int(self._budget.max()) - 1) // self._size, self._pages), 1)
        self._beyond = float((clock.positions - self._held).float().mean())
        self._slot = torch.arange(self._pages, device=device)

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Append, widen the page's bounds, choose the best full pages and attend to them and the current one."""
        held, size = self._held, self._size
        insert(self._keys, self._values, keys, values, held)
        update_bounds(keys, held, size, self._low, self._high)
        full = torch.div(held, size, rounding_mode="floor")
        found = page_bounds(queries, self._low, self._high, self._channels)
        found = found.masked_fill_(self._slot >= full[:, None, None], -torch.inf)
        wanted = torch.div(self._budget - (held + 1 - full * size), size, rounding_mode="floor")
        ids = select_top(found, wanted.minimum(full).int(), self._most, also=full)
        held.add_(1)
        chosen = Segment(self._keys, self._values, held, ids, size)
        return attend(queries, chosen, scaling=self._scaling, dtype=queries.dtype)[0]

    def bytes(self) -> dict[str, int]:
        """Tokens on the device; the bounds are the index."""
        return {
            "resident": self._keys.nbytes + self._values.nbytes,
            "offloaded": 0,
            "index": self._low.nbytes + self._high.nbytes,
        }

    def reads(self, tokens: int) -> dict[str, int]:
        """The heaviest channels of all bounds, and the chosen tokens."""
        held = min(max(tokens - self._beyond, 0), self._pages * self._size)
        bounds = (self._low.nbytes + self._high.nbytes) * self._channels / self._low.shape[3]
        token = (self._keys.nbytes + self._values.nbytes) / self._keys.shape[2]
        chosen = float(self._budget.clamp_max(int(held)).float().mean()) * token
        return {"device": int(bounds * held / (self._pages * self._size) + chosen), "host": 0}

    def changed(self) -> Sequence[Tensor]:
        """The counts of tokens."""
        return [self._held]
