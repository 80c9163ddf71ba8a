"""Twilight (arXiv 2502.02770): of the pages that Quest would take, the fewest tokens for a share p of the mass."""

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from kvbench.contract.attention import scores
from kvbench.contract.budget import LayerBudget
from kvbench.contract.layer import Layer
from kvbench.contract.policy import KVCachePolicy
from kvbench.contract.selection import Selection
from kvbench.contract.step import Clock, FixedStep, Part, rows_of
from kvbench.kernels.attention import Segment, attend
from kvbench.kernels.bounds import update_bounds
from kvbench.kernels.insert import insert
from kvbench.kernels.score import page_scores
from kvbench.kernels.score import scores as all_scores
from kvbench.kernels.select import select_top
from kvbench.strategies.compressing.kivi_storage import pack, unpack
from kvbench.strategies.selecting.quest import PlainTokens, Quest, QuestStep

_LAST = 15
"""The largest code."""


def _encoded(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Codes, uint8 [..., d / 2], of keys [..., d] in four bits, and each key's minimum and step, float16 [..., 2]."""
    low, high = (end[..., None].float() for end in keys.aminmax(dim=-1))
    step = ((high - low) / _LAST).clamp_min(2**-14)  # what float16 holds
    facts = torch.cat([low, step], dim=-1).half()
    low, step = facts.float().chunk(2, dim=-1)
    return pack(((keys.float() - low) / step).round_().clamp_(0, _LAST).to(torch.uint8), 4), facts


def _estimates(queries: Tensor, codes: Tensor, facts: Tensor, scaling: float) -> Tensor:
    """Scaled scores, float32 [B, H, n], of queries [B, H, 1, d] with the codes' keys [B, G, n, d]."""
    batch, groups = codes.shape[:2]
    grouped = queries.reshape(batch, groups, -1, queries.shape[3]).float()
    found = (grouped @ unpack(codes, 4).float().transpose(-1, -2)) * facts[..., 1].float()[:, :, None]
    found += grouped.sum(-1, keepdim=True) * facts[..., 0].float()[:, :, None]
    return found.view(batch, queries.shape[1], -1) * scaling


class Twilight(Quest):
    """Attends, per query head, to the page being filled and the fewest of its candidates that bring the mass to `p`.

    The candidates are the pages of Quest's highest bounds, `candidates` tokens of them; their weights are estimated
    from keys in four bits (one minimum and step for each), normalised over candidates and static tokens, and taken
    from the largest on until they reach `p`. The budget is an upper bound; one that covers everything prunes nothing.
    The paper leaves the first two layers dense: `--dense-layers 2`.
    """

    name = "twilight"
    summary = "Prunes Quest's pages to the fewest tokens that reach a share p of the mass, estimated in four bits."
    reference = "Lin et al., Twilight: Adaptive Attention Sparsity with Hierarchical Top-p Pruning, arXiv 2502.02770"

    class Options(Quest.Options):
        """Options of Twilight."""

        p: float = Field(0.85, gt=0, le=1, description="share of the estimated mass to reach")
        candidates: int | None = Field(
            None, ge=1, description="tokens of Quest's pages; by default 8,192, at most half of the context"
        )

    def _note_pages(self, layer: Layer, keys: Tensor) -> None:
        super()._note_pages(layer, keys)
        for name, more in zip(("codes", "facts"), _encoded(keys), strict=True):
            known = layer.state.get(name)
            layer.state[name] = more if known is None else torch.cat([known, more], dim=2)
        layer.store.index_bytes = sum(part.nbytes for part in layer.state.values())

    def select(self, layer: Layer, queries: Tensor, budget: LayerBudget) -> Selection:
        """Take the candidates of the largest estimated weights until they and the static tokens reach `p`."""
        state, store = layer.state, layer.store
        if "low" not in state:
            return Selection()
        if budget.covers_all:
            return Selection(everything=True, evaluations=0.0)
        size, pages, available = self.options.page_size, state["low"].shape[2], store.aside_stop
        wanted = budget.beside(store.static_tokens, available)
        if not wanted:
            return Selection()
        grouped = queries.reshape(layer.rows, layer.kv_heads, -1, layer.head_dim)
        bounds = grouped.clamp_min(0) @ state["high"].transpose(-1, -2)
        bounds += grouped.clamp_max(0) @ state["low"].transpose(-1, -2)
        asked = self.options.candidates or min(8192, layer.tokens // 2)
        best = bounds.view(layer.rows, layer.heads, pages).topk(max(min(asked // size, pages), 1), dim=-1).indices
        ids = (best[..., None] * size + torch.arange(size, device=best.device)).flatten(2)
        ((static, _, _),) = store.static_parts()
        known = layer.capped(scores(queries, static, layer.scaling)).logsumexp(-1, keepdim=True)
        found = layer.capped(_estimates(queries, state["codes"], state["facts"], layer.scaling)).gather(-1, ids)
        total = known.logaddexp(found.logsumexp(-1, keepdim=True))
        order = found.sort(dim=-1, descending=True, stable=True)
        weights = (order.values - total).double().exp()
        before = weights.cumsum(-1) - weights + (known - total).double().exp()
        counts = budget.counts(store.static_tokens, available, layer.heads)
        room = wanted if counts is None else counts.to(ids.device)[..., None]
        needed = (before < self.options.p) & (torch.arange(ids.shape[2], device=ids.device) < room)
        chosen = torch.where(needed, ids.gather(-1, order.indices), -1)
        return Selection(chosen[..., : max(int(needed.sum(-1).max()), 1)], padded=True, evaluations=float(pages))

    def fixed_step(self, parts: Sequence[Part], clock: Clock) -> FixedStep | str | None:
        """The same choice in fixed shapes; Quest's where nothing is pruned."""
        covered = {part.layer.budget.covers_all for part in parts}
        paged = {"low" in part.layer.state for part in parts}
        if len(covered) > 1 or len(paged) > 1:
            return None
        if covered.pop() or not paged.pop():
            return super().fixed_step(parts, clock)
        return _PruningStep(parts, clock, self)

    def held_step(self, parts: Sequence[Part], clock: Clock, holder: KVCachePolicy) -> FixedStep | str | None:
        """None: what another policy holds is read a page at a time, not a token."""
        return f"no step of fixed shapes prunes the codes of '{holder.name}'"


class _PruningStep(QuestStep):
    """Quest's pages, of which the codes say what is attended to, token by token."""

    def __init__(self, parts: Sequence[Part], clock: Clock, policy: Twilight) -> None:
        layer, size = parts[0].layer, int(policy.options.page_size)
        longest = max(part.layer.tokens for part in parts)
        room = -(-(longest + clock.new_tokens) // size) * size
        state = layer.state
        self._codes, self._facts = (
            state[name].new_zeros(clock.batch, layer.kv_heads, room, state[name].shape[3])
            for name in ("codes", "facts")
        )
        for part in parts:
            rows, store = list(rows_of(part)), part.layer.store
            late = _encoded(store.static_parts()[0][0])
            for target, known, more in zip(
                (self._codes, self._facts), (part.layer.state["codes"], part.layer.state["facts"]), late, strict=True
            ):
                target[rows, :, : store.aside_stop], target[rows, :, store.aside_stop : store.tokens] = known, more
        tokens = PlainTokens(parts, clock, room)
        self._plain = tokens
        super().__init__(parts, clock, size, tokens)
        self._p, self._heads, self._share = policy.options.p, layer.heads, layer.heads // layer.kv_heads
        self._asked = policy.options.candidates
        most = (min(8192, room // 2) if self._asked is None else min(self._asked, room)) // size
        self._most_pages = max(most, 1)
        self._most_tokens = max(min(int(self._budget.max()), self._most_pages * size), 1)
        self._offset = torch.arange(size, dtype=torch.int32, device=clock.positions.device)
        self._rank = torch.arange(self._most_pages * size, device=clock.positions.device)

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Append, choose pages, estimate their tokens' weights, and attend to the fewest that reach the share."""
        shared, positions, size = self._pages, self._positions, self._size
        if self._leads:
            shared.count()
        self._tokens.insert(keys, values)
        update_bounds(keys, positions, size, self._low, self._high)
        codes, facts = _encoded(keys)
        insert(self._codes, self._facts, codes, facts, positions)
        bounds = page_scores(queries, self._low, self._high, shared.full, output=self._bounds)
        asked = (shared.tokens // 2).clamp_max(8192) if self._asked is None else torch.full_like(positions, self._asked)
        wanted = (asked // size).clamp(1, self._most_pages).minimum(shared.full)
        pages = select_top(bounds, wanted.int(), self._most_pages)
        ids = (pages[..., None] * size + self._offset).masked_fill(pages[..., None] < 0, -1).flatten(2)
        estimates = _estimates(queries, self._codes, self._facts, self._scaling)
        found = estimates.gather(-1, ids.long().clamp_min(0)).masked_fill(ids < 0, -torch.inf)
        static = (shared.full * size)[:, None] + self._offset
        static = torch.where(static <= positions[:, None], static, -1)[:, None].expand(-1, self._heads, -1)
        places = static[:, :: self._share, :, None].long().clamp_min(0)
        current = self._plain.keys.gather(2, places.expand(-1, -1, -1, keys.shape[3]))
        exact = all_scores(queries, current, scaling=self._scaling).masked_fill(static < 0, -torch.inf)
        known = exact.logsumexp(-1, keepdim=True)
        total = known.logaddexp(found.logsumexp(-1, keepdim=True))
        order = found.sort(dim=-1, descending=True, stable=True)
        weights = (order.values - total).double().exp()
        before = weights.cumsum(-1) - weights + (known - total).double().exp()
        room = (self._budget - (shared.tokens - shared.full * size)[:, None]).clamp_min(0)
        needed = (before < self._p) & (self._rank < room[..., None]) & (order.values > -torch.inf)
        chosen = torch.where(needed, ids.gather(-1, order.indices), -1)[..., : self._most_tokens]
        segment = Segment(self._plain.keys, self._plain.values, ids=torch.cat([chosen, static], dim=-1).int())
        return attend(queries, segment, scaling=self._scaling, dtype=queries.dtype)[0]

    def bytes(self) -> dict[str, int]:
        """Quest's, and the codes."""
        found = super().bytes()
        return found | {"index": found["index"] + self._codes.nbytes + self._facts.nbytes}

    def reads(self, tokens: int) -> dict[str, int]:
        """Quest's, and the codes of the candidates; the tokens attended to are the budget at most."""
        found = super().reads(tokens)
        candidates = min(self._most_pages * self._size, tokens)
        coded = (self._codes.nbytes + self._facts.nbytes) * candidates // self._codes.shape[2]
        return found | {"device": found["device"] + coded}
