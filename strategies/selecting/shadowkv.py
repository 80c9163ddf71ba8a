"""ShadowKV (arXiv 2410.21465): low-rank keys on the device, values on the host, chunks found by their mean keys."""

from collections.abc import Callable

import torch
from pydantic import Field
from torch import Tensor

from kvbench.contract.budget import LayerBudget
from kvbench.contract.extension import Options
from kvbench.contract.layer import Layer
from kvbench.contract.policy import KVCachePolicy
from kvbench.contract.selection import Selection
from kvbench.contract.storage import Storage, pick


class _LowRankKeys(Storage):
    """Keys before rotation as a truncated SVD over all heads together, some chunks' keys exact, and plain values."""

    def __init__(
        self, keys: Tensor, values: Tensor, plain: Tensor, rank: int, outliers: Tensor, chunk: int,
        rotate: Callable[[Tensor, Tensor], Tensor],
    ) -> None:  # fmt: skip
        """`plain` are the `keys` before rotation; `outliers` [B, G, o] the chunks that are kept exact."""
        batch, heads, self.length, dim = keys.shape
        rows = plain.transpose(1, 2).flatten(2).double()
        squares = rows.transpose(1, 2) @ rows
        # a GPU is many times slower in float64, and keys of 16 bits have no use for it
        narrow = keys.is_cuda and keys.element_size() == 2
        found = torch.linalg.eigh(squares.float() if narrow else squares).eigenvectors
        basis = found[..., -min(rank, heads * dim) :].double()
        self._coefficients = (rows @ basis).to(keys.dtype)
        self._basis = basis.transpose(1, 2).reshape(batch, -1, heads, dim).transpose(1, 2).to(keys.dtype).contiguous()
        self._chunk, self._rotate = chunk, rotate
        self._values = values
        slots = (outliers[..., None] * chunk + torch.arange(chunk, device=keys.device)).flatten(2)
        self._exact = keys.gather(2, slots[..., None].expand(-1, -1, -1, dim))
        place = torch.arange(outliers.shape[2], device=keys.device, dtype=torch.int32).expand(outliers.shape)
        self._place = torch.full((batch, heads, self.length // chunk), -1, dtype=torch.int32, device=keys.device)
        self._place.scatter_(2, outliers, place.contiguous())

    @property
    def resident_bytes(self) -> int:
        return sum(int(part.nbytes) for part in (self._coefficients, self._basis, self._exact, self._place))

    @property
    def nbytes(self) -> int:
        return self.resident_bytes + self._values.nbytes

    @property
    def keys(self) -> Tensor:
        slots = torch.arange(self.length, device=self._basis.device)
        return self._rebuilt(slots.expand(*self._place.shape[:2], -1))

    @property
    def values(self) -> Tensor:
        return self._values.to(self._basis.device)

    def append(self, keys: Tensor, values: Tensor) -> None:
        raise NotImplementedError("ShadowKV keeps generated tokens as they are: leave them static")

    def pick(self, slots: Tensor, heads: int) -> tuple[Tensor, Tensor]:
        """Rebuild the keys and fetch the values of `slots` [B, G, k]."""
        keys = self._rebuilt(slots.to(self._basis.device))
        return keys, pick(self._values, slots, heads).to(keys.device)

    def _rebuilt(self, slots: Tensor) -> Tensor:
        batch, heads, count = slots.shape
        coefficients = pick(self._coefficients[:, None], slots, heads)
        plain = (coefficients @ self._basis).view(1, batch * heads * count, -1)
        rebuilt = self._rotate(plain, slots.flatten()).view(*slots.shape, -1)
        place = self._place.gather(2, slots // self._chunk)
        row, head, column = (place >= 0).nonzero(as_tuple=True)
        exact = place[row, head, column] * self._chunk + slots[row, head, column] % self._chunk
        rebuilt[row, head, column] = self._exact[row, head, exact]
        return rebuilt


class ShadowKV(KVCachePolicy):
    """Selects chunks of 8 tokens per key/value head, rebuilds their keys on the device and fetches their values.

    A chunk's landmark is the mean of its keys; a group scores it by its query heads' highest softmax weight. Chunks
    whose keys agree least with their landmark (outliers) are kept exact and always attended. Generated tokens stay as
    they are, as in the paper, and take the place of chunks in the budget, in the end of outliers too. The rank is that
    of a key of all heads together: a model with fewer than 160 such dimensions loses nothing.
    """

    name = "shadowkv"
    summary = "Keeps low-rank keys on the device and values on the host; selects chunks by their mean keys."
    reference = (
        "Sun et al., ShadowKV: KV Cache in Shadows for High-Throughput Long-Context LLM Inference, arXiv 2410.21465"
    )
    query_window = 0
    head_budgets = True

    class Options(Options):
        """Options of ShadowKV."""

        rank: int = Field(160, ge=1, description="rank of the keys before rotation, all heads together")
        chunk_size: int = Field(8, ge=1, description="tokens in a chunk")
        outliers: int | None = Field(
            None, ge=0, description="chunks kept exact; by default 48, at most a sixth of the budget, at least one"
        )
        local: int = Field(32, ge=1, description="most recent tokens of the prompt, always attended")

    def static_tokens(self, context: int) -> tuple[int, int]:
        """The local window."""
        return 0, self.options.local

    def most_attended(self, layer: Layer) -> int | None:
        """Generated tokens stay attended: they take the place of chunks, and go beyond the budget once none is left."""
        if layer.budget.covers_all:
            return layer.tokens
        return layer.budget.tokens + layer.tokens - layer.prompt_tokens

    def prefill(self, layer: Layer, queries: Tensor, keys: Tensor, values: Tensor) -> None:
        """Find landmarks and outliers, compress the keys and offload the values."""
        chunk = self.options.chunk_size
        chunks = max(layer.tokens - self.options.local, 0) // chunk
        if layer.budget.covers_all or not chunks:
            return
        stop = chunks * chunk
        mine = keys[:, :, :stop]
        parts = mine.view(*mine.shape[:2], chunks, chunk, -1)
        landmarks = parts.mean(3)
        agreement = torch.cosine_similarity(parts, landmarks[:, :, :, None], dim=-1).amin(-1)
        budget = layer.budget.least - self.options.local
        outliers = max(1, min(48, budget // chunk // 6)) if self.options.outliers is None else self.options.outliers
        outliers = min(outliers, budget // chunk, chunks)
        odd = agreement.topk(outliers, dim=-1, largest=False).indices
        plain = layer.unrotate(mine, torch.arange(stop))
        layer.store.set_aside(
            0, stop, offload=True,
            storage=lambda _, host: _LowRankKeys(mine, host, plain, self.options.rank, odd, chunk, layer.rotate),
        )  # fmt: skip
        layer.state["landmarks"], layer.state["outliers"] = landmarks, odd
        layer.store.index_bytes = landmarks.nbytes + odd.nbytes

    def select(self, layer: Layer, queries: Tensor, budget: LayerBudget) -> Selection:
        """Take the outliers and the chunks whose landmarks weigh most."""
        if "landmarks" not in layer.state:
            return Selection()
        landmarks, chunk = layer.state["landmarks"], self.options.chunk_size
        room = max(budget.least - layer.store.static_tokens, 0) // chunk
        outliers = layer.state["outliers"][..., :room]
        grouped = queries.view(layer.rows, layer.kv_heads, -1, layer.head_dim)
        logits = (grouped @ landmarks.transpose(-1, -2)).float() * layer.scaling
        odd = torch.zeros(landmarks.shape[:3], dtype=torch.bool, device=logits.device).scatter_(2, outliers, True)
        weights = logits.masked_fill_(odd[:, :, None], -torch.inf).softmax(-1).amax(2)
        exact = layer.store.static_tokens + outliers.shape[2] * chunk
        best = budget.top(weights.masked_fill_(odd, -1), exact, unit=chunk)
        chosen = torch.cat([outliers, best], dim=-1)[..., None]
        ids = (chosen * chunk + torch.arange(chunk, device=chosen.device)).masked_fill(chosen < 0, -1).flatten(2)
        return Selection(ids, padded=budget.heads is not None, evaluations=float(landmarks.shape[2]))
