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
from kvbench.contract.step import Clock, FixedStep, Part
from kvbench.strategies.compressing.kivi_storage import pack, unpack
from kvbench.strategies.selecting.quest import Quest

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
        """None yet: what is pruned has no step of fixed shapes."""
        return "twilight's pruning has no step of fixed shapes"

    def held_step(self, parts: Sequence[Part], clock: Clock, holder: KVCachePolicy) -> FixedStep | str | None:
        """None yet, as for `fixed_step`."""
        return self.fixed_step(parts, clock)
