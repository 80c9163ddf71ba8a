"""InfiniGen (arXiv 2406.19707): fetch what the previous layer's input says that this layer will attend to."""

import torch
from pydantic import Field
from torch import Tensor

from kvbench.contract import extension
from kvbench.contract.budget import LayerBudget
from kvbench.contract.layer import Layer
from kvbench.contract.policy import KVCachePolicy
from kvbench.contract.selection import Selection
from kvbench.contract.storage import TokenBuffer


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
    head_budgets = True

    class Options(extension.Options):
        """Options of InfiniGen."""

        partial_weight_ratio: float = Field(0.2, gt=0, le=1, description="share of the dimensions that speculate")
        alpha: float = Field(4.0, gt=0, description="how far below the highest score a token may lie; 4 or 5 published")

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
        if wanted in (0, available):
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
