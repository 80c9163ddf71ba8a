"""InfiniGen (arXiv 2406.19707): fetch what the previous layer's input says that this layer will attend to."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from kvbench.contract import extension
from kvbench.contract.budget import LayerBudget
from kvbench.contract.layer import Layer
from kvbench.contract.policy import KVCachePolicy
from kvbench.contract.selection import Selection
from kvbench.contract.step import Clock, FixedStep, Part
from kvbench.contract.storage import TokenBuffer
from kvbench.kernels.attention import Segment
from kvbench.kernels.insert import insert
from kvbench.kernels.score import scores
from kvbench.kernels.steps import GrowingStep
from kvbench.kernels.weights import group_weights
from kvbench.strategies.selecting.aside import AsideStep, best_of
from kvbench.strategies.selecting.static_set import HOT


class InfiniGen(KVCachePolicy):
    """Speculates with a fifth of the dimensions, after a rotation that gathers the queries' energy in them.

    The skewing matrix is orthogonal (right singular vectors of the prompt's queries, here of all query heads of a
    key/value head together), so skewed queries and keys have the inner products of the plain ones. All key/value heads
    fetch the same number of tokens: the mean over heads of those within `alpha` of the head's highest speculated
    score, at most the budget. A group's score is its query heads' highest relative to their maxima. The first layer,
    which has none before it, speculates with its own queries. The paper leaves layers 0 and 1 dense and outside its
    budget; with `--dense-layers 2` they are so here too, and the results' density counts them. The whole query is
    computed for the prediction, not only its partial weights, so the prediction's time is an upper bound.
    """

    name = "infinigen"
    summary = "Offloads everything; each layer fetches the tokens that the previous layer's input predicts to matter."
    reference = (
        "Lee et al., InfiniGen: Efficient Generative Inference of Large Language Models with Dynamic KV Cache "
        "Management, OSDI 2024, arXiv 2406.19707"
    )
    uses_hidden = True
    offload: ClassVar[bool] = True
    head_budgets = True

    class Options(extension.Options):
        """Options of InfiniGen."""

        partial_weight_ratio: float = Field(0.2, gt=0, le=1, description="share of the dimensions that speculate")
        alpha: float = Field(4.0, gt=0, description="how far below the highest score a token may lie; 4 or 5 published")
        hot: int = HOT

    def static_tokens(self, context: int) -> tuple[int, int]:
        """The newest token."""
        return 0, 1

    def prefill(self, layer: Layer, queries: Tensor, keys: Tensor, values: Tensor) -> None:
        """Offload all but the newest token; keep its keys' most telling dimensions after skewing."""
        if layer.tokens == 1:
            return
        grouped = queries.reshape(layer.rows, layer.kv_heads, -1, layer.head_dim).float()
        skew = torch.linalg.eigh(grouped.transpose(-1, -2) @ grouped).eigenvectors
        telling = (grouped @ skew).abs().mean(2) + (keys.float() @ skew).abs().mean(2)
        kept = telling.topk(max(1, round(self.options.partial_weight_ratio * layer.head_dim)), dim=-1).indices
        projection = skew.gather(-1, kept[:, :, None].expand(-1, -1, layer.head_dim, -1)).to(keys.dtype)
        partial = keys[:, :, :-1] @ projection
        layer.store.set_aside(0, layer.tokens - 1, offload=True)
        layer.state["projection"] = projection
        layer.state["partial"] = TokenBuffer(partial, partial.new_empty(*partial.shape[:3], 0))
        layer.store.index_bytes = projection.nbytes + layer.state["partial"].nbytes

    def period(self, layer: Layer, most: int) -> int:
        """Every token leaves for the host at the next step."""
        return 1

    def fixed_step(self, parts: Sequence[Part], clock: Clock) -> FixedStep | None:
        """Speculation on the device; None where only some rows of the layer have tokens set aside."""
        started = {"partial" in part.layer.state for part in parts}
        if len(started) > 1:
            return None
        return _SpeculatingStep(self, parts, clock) if started.pop() else GrowingStep(parts, clock)

    def insert(self, layer: Layer, keys: Tensor, values: Tensor) -> None:
        """Offload the token before the newest one and keep its partial key."""
        if "partial" in layer.state:
            moved, _ = layer.store.advance(layer.store.static_tokens - 1)
            partial = moved @ layer.state["projection"]
            layer.state["partial"].append(partial, partial[..., :0])
            layer.store.index_bytes = layer.state["projection"].nbytes + layer.state["partial"].nbytes

    def select(self, layer: Layer, queries: Tensor, budget: LayerBudget) -> Selection:
        """Take the tokens whose speculated score lies within alpha of the head's highest."""
        if "partial" not in layer.state:
            return Selection()
        available = layer.state["partial"].length
        wanted = budget.beside(layer.store.static_tokens, available)
        if not wanted or (wanted == available and (budget.heads is None or budget.covers_all)):
            return Selection(everything=wanted > 0, evaluations=0.0)
        predicted = queries if layer.hidden_before is None else layer.queries_for(layer.hidden_before)
        grouped = predicted.reshape(layer.rows, layer.kv_heads, -1, layer.head_dim) @ layer.state["projection"]
        speculated = (grouped @ layer.state["partial"].keys.transpose(-1, -2)).float() * layer.scaling
        below = (speculated - speculated.amax(-1, keepdim=True)).amax(2)
        counts = (below > -self.options.alpha).sum(-1).float().mean(-1).ceil().long().clamp(max=wanted)
        best = below.topk(int(counts.max()), dim=-1).indices
        beyond = torch.arange(best.shape[-1], device=best.device) >= counts[:, None, None]
        ids = budget.cut(best.masked_fill(beyond, -1), layer.store.static_tokens)
        return Selection(ids, padded=True, evaluations=float(available))


class _SpeculatingStep(AsideStep):
    """A data-dependent number of tokens in a row of fixed length: ids beyond it are −1."""

    per_head = False

    def __init__(self, policy: InfiniGen, parts: Sequence[Part], clock: Clock) -> None:
        states, self._number = [dict(part.layer.state) for part in parts], parts[0].layer.number
        super().__init__(policy, parts, clock)
        assert clock.inputs is not None
        self._inputs, self._alpha = clock.inputs, policy.options.alpha
        first: Tensor = states[0]["projection"]
        kept = first.shape[3]
        # rows of whole 32 bytes, which are read at once
        wide = -(-kept // 16) * 16
        self._needed = kept / wide
        self._projection = first.new_zeros(self.batch, *first.shape[1:3], wide)
        self._partial = first.new_zeros(self.batch, self.kv_heads, self.capacity, wide)
        self._chosen: Tensor | None = None
        for part, state in zip(parts, states, strict=True):
            rows = slice(None) if part.rows is None else part.rows.to(first.device)
            known = state["partial"].keys
            self._projection[rows, :, :, :kept] = state["projection"]
            self._partial[rows, :, : known.shape[2], :kept] = known
            newest = part.layer.tokens - 1
            keys = self.keys[rows][:, :, :1] @ self._projection[rows]
            self._partial[rows, :, newest : newest + 1] = keys
            part.layer.state.clear()

    def observe(self, keys: Tensor, values: Tensor) -> None:
        """Keep the token's partial key; it is looked at once the token has left for the host."""
        partial = keys @ self._projection
        insert(self._partial, self._partial, partial, partial, self._clock.positions)

    def choose(self, queries: Tensor) -> Sequence[Segment]:
        """The tokens within alpha of a head's highest speculated score."""
        before = self._inputs.before(self._number)
        predicted = queries if before is None else self._inputs.queries_for(self._number, before)
        grouped = predicted.reshape(self.batch, self.kv_heads, -1, predicted.shape[3]) @ self._projection
        asked = grouped.reshape(self.batch, self.heads, 1, -1)
        found = scores(asked, self._partial, self.window.aside, scaling=self.scaling)
        below = group_weights(found, self.kv_heads, "margin", self.window.aside)
        counts = (below > -self._alpha).sum(-1).float().mean(-1, keepdim=True).ceil().int()
        self._chosen = counts.minimum(self.window.left)
        return [Segment(self.aside_keys, self.aside_values, ids=best_of(below, self._chosen, self.most))]

    def index_bytes(self) -> int:
        """Partial keys and the projection."""
        return self._partial.nbytes + self._projection.nbytes

    def index_reads(self, share: float) -> dict[str, int]:
        """All partial keys and the projection."""
        read = self._partial.nbytes * share + self._projection.nbytes
        return {"device": int(read * self._needed), "host": 0}

    def reads(self, tokens: int) -> dict[str, int]:
        """As for a full budget; once a step was taken, with the tokens that it chose."""
        found = super().reads(tokens)
        if self._chosen is not None and not self._all:
            token = (self.keys.nbytes + self.values.nbytes) // self.keys.shape[2]
            chosen = int(self._chosen.float().mean() * token)
            index = self.index_reads(max(tokens - 1, 0) / self.capacity)["device"]
            found = self._with_hits({"device": index + token, "host": chosen}, chosen)
        return found
