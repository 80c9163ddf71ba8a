"""ThinK (arXiv 2407.21018): drop the key channels that matter least to the recent queries."""

from functools import partial

from pydantic import BaseModel, Field
from torch import Tensor

from kvbench.contract import attention
from kvbench.contract.budget import LayerBudget
from kvbench.contract.extension import Options
from kvbench.contract.layer import Layer
from kvbench.contract.policy import KVCachePolicy
from kvbench.contract.selection import Selection
from kvbench.contract.storage import Storage, TokenBuffer


class _PrunedKeys(Storage):
    """Keys with only the `kept` channels [B, G, c], and whole values."""

    def __init__(self, kept: Tensor, keys: Tensor, values: Tensor) -> None:
        self._kept, self._dim = kept.to(keys.device), keys.shape[3]
        self._tokens = TokenBuffer(self._pruned(keys), values)

    def _pruned(self, keys: Tensor) -> Tensor:
        return keys.gather(3, self._kept[:, :, None].expand(-1, -1, keys.shape[2], -1))

    @property
    def length(self) -> int:  # type: ignore[override]
        return self._tokens.length

    @property
    def nbytes(self) -> int:
        return self._tokens.nbytes + self._kept.nbytes

    @property
    def keys(self) -> Tensor:
        pruned = self._tokens.keys
        whole = pruned.new_zeros(*pruned.shape[:3], self._dim)
        return whole.scatter_(3, self._kept[:, :, None].expand(pruned.shape), pruned)

    @property
    def values(self) -> Tensor:
        return self._tokens.values

    def append(self, keys: Tensor, values: Tensor) -> None:
        self._tokens.append(self._pruned(keys), values)

    def scores(self, queries: Tensor, scaling: float) -> Tensor:
        grouped = queries.view(*self._kept.shape[:2], -1, self._dim)
        pruned = self._pruned(grouped).view(*queries.shape[:3], -1)
        return attention.scores(pruned, self._tokens.keys, scaling)


class ThinK(KVCachePolicy):
    """Keeps every token, its key without the channels that score lowest by ‖Q_j‖·‖K_j‖.

    Q_j is channel j of the prompt's last queries of a key/value head, K_j that of the keys. Recent tokens and generated
    ones keep all channels, as published. Its size follows from `pruned`, so it takes no budget of tokens; compare by
    bytes.
    """

    name = "think"
    summary = "Keeps every token, but drops the key channels that matter least to the prompt's last queries."
    reference = "Xu et al., ThinK: Thinner Key Cache by Query-Driven Pruning, arXiv 2407.21018"
    takes_budget = False

    class Options(Options):
        """Options of ThinK."""

        pruned: float = Field(0.4, ge=0, lt=1, description="share of the key channels that are dropped")
        window: int = Field(32, ge=1, description="last queries that judge the channels; these tokens stay whole")

    def __init__(self, options: BaseModel | None = None) -> None:
        super().__init__(options)
        self.query_window = self.options.window
        if self.options.pruned > 0:
            self.never_exact = f"{self.options.pruned:.0%} of the key channels are dropped"

    def prefill(self, layer: Layer, queries: Tensor, keys: Tensor, values: Tensor) -> None:
        """Judge the channels and drop the weakest of all tokens before the window."""
        stop = layer.tokens - queries.shape[2]
        kept = layer.head_dim - int(self.options.pruned * layer.head_dim)
        if not stop or kept == layer.head_dim:
            return
        grouped = queries.reshape(layer.rows, layer.kv_heads, -1, layer.head_dim)
        score = grouped.float().norm(dim=2) * keys[:, :, :stop].float().norm(dim=2)
        channels = score.topk(kept, dim=-1).indices.sort(-1).values
        layer.store.set_aside(0, stop, offload=False, storage=partial(_PrunedKeys, channels))

    def select(self, layer: Layer, queries: Tensor, budget: LayerBudget) -> Selection:
        """Attend to everything."""
        return Selection(everything=True)
