"""ThinK (arXiv 2407.21018): drop the key channels that matter least to the recent queries."""

from collections.abc import Sequence
from functools import partial

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from kvbench.contract import attention
from kvbench.contract.budget import LayerBudget
from kvbench.contract.extension import Options
from kvbench.contract.layer import Layer
from kvbench.contract.policy import KVCachePolicy
from kvbench.contract.selection import Selection
from kvbench.contract.step import Clock, FixedStep, Part
from kvbench.contract.storage import Storage, TokenBuffer
from kvbench.kernels.attention import decode
from kvbench.kernels.insert import insert
from kvbench.kernels.merge import merge
from kvbench.kernels.steps import GrowingStep, HeldStep


class _PrunedKeys(Storage):
    """Keys with only the `kept` channels [B, G, c], and whole values."""

    def __init__(self, kept: Tensor, keys: Tensor, values: Tensor) -> None:
        self._kept, self._dim = kept.to(keys.device), keys.shape[3]
        self._tokens = TokenBuffer(self._pruned(keys), values)

    @property
    def kept(self) -> Tensor:
        """The channels [B, G, c] that are left."""
        return self._kept

    def take(self) -> tuple[Tensor, Tensor]:
        """Hand over the memory: pruned keys [B, G, t, c] and values [B, G, t, d]."""
        return self._tokens.take(0)

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
    query_aware = "drops the key channels that matter least to the prompt's last queries"

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

    def fixed_step(self, parts: Sequence[Part], clock: Clock) -> FixedStep | None:
        """The pruned tokens stay as they are; whole ones are appended behind the window."""
        pruned = any(part.layer.store.aside_stop for part in parts)
        return ThinKStep(parts, clock) if pruned else GrowingStep(parts, clock)

    def select(self, layer: Layer, queries: Tensor, budget: LayerBudget) -> Selection:
        """Attend to everything."""
        return Selection(everything=True)


class ThinKStep(HeldStep):
    """ThinK's step in fixed shapes: attention over pruned tokens and over whole ones, merged."""

    def __init__(self, parts: Sequence[Part], clock: Clock) -> None:
        sample = next(part.layer.store.aside for part in parts if part.layer.store.aside_stop)
        assert isinstance(sample, _PrunedKeys)
        layer, groups, channels = parts[0].layer, sample.kept.shape[1], sample.kept.shape[2]
        device = clock.positions.device
        if len(parts) == 1:
            self._kept = sample.kept
            self._pruned = torch.full((clock.batch,), sample.length, dtype=torch.int32, device=device)
            self._keys, self._values = sample.take()
        else:
            longest = max(part.layer.store.aside_stop for part in parts)
            shape = clock.batch, groups, longest
            self._kept = torch.zeros(clock.batch, groups, channels, dtype=torch.int64, device=device)
            self._pruned = torch.zeros(clock.batch, dtype=torch.int32, device=device)
            self._values = sample.values.new_zeros(*shape, sample.values.shape[3])
            self._keys = sample.values.new_zeros(*shape, channels)
            for part in parts:
                if not part.layer.store.aside_stop:
                    continue
                aside = part.layer.store.aside
                assert isinstance(aside, _PrunedKeys)
                rows = slice(None) if part.rows is None else part.rows.to(device)
                self._kept[rows], self._pruned[rows] = aside.kept, aside.length
                keys, values = aside.take()
                self._keys[rows, :, : keys.shape[2]], self._values[rows, :, : values.shape[2]] = keys, values
        for part in parts:
            part.layer.store.release_aside()
        super().__init__(parts, clock, clock.new_tokens)
        self._channels = self._kept.repeat_interleave(layer.heads // layer.kv_heads, dim=1)[:, :, None]
        self._outputs = torch.zeros(2, clock.batch, layer.heads, 1, self._values.shape[3], device=device)
        self._lses = torch.zeros(2, clock.batch, layer.heads, device=device)

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Append, and attend to both kinds of tokens."""
        held = self.held
        insert(held.keys, held.values, keys, values, held.lengths)
        held.lengths.add_(1)
        parts = (
            (queries.gather(3, self._channels), self._keys, self._values, self._pruned),
            (queries, held.keys, held.values, held.lengths),
        )
        for part, output, lse in zip(parts, self._outputs, self._lses, strict=True):
            decode(*part, scaling=self.scaling, output=output, lse=lse)
        return merge(self._outputs, self._lses, dtype=queries.dtype)[0]

    def bytes(self) -> dict[str, int]:
        """All on the device."""
        pruned = self._keys.nbytes + self._values.nbytes + self._kept.nbytes
        return {"resident": self.held.nbytes + pruned, "offloaded": 0, "index": 0}

    def reads(self, tokens: int) -> dict[str, int]:
        """The pruned tokens, and the whole ones of the rest of `tokens`."""
        rows, groups, size = self._keys.shape[:3]
        token = (self._keys.nbytes + self._values.nbytes) // (rows * groups * size)
        pruned = int(self._pruned.sum())
        whole = self.held.nbytes // (rows * groups * self.held.keys.shape[2])
        return {"device": groups * (token * pruned + whole * (rows * tokens - pruned)), "host": 0}
