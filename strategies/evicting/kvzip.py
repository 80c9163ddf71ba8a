"""KVzip (arXiv 2505.23416): keep the keys that the model needs to repeat the prompt."""

import torch
from pydantic import Field
from torch import Tensor

from kvbench.contract.errors import KVBenchError
from kvbench.contract.extension import Options
from kvbench.contract.layer import Layer
from kvbench.contract.policy import KVCachePolicy, ModelView, Replay

_QUERIES = 256
"""Queries scored at a time, which bounds the memory of their weights."""


class KVzip(KVCachePolicy):
    """Replays the prompt chunk by chunk behind itself and keeps the pairs that this reconstruction attends to most.

    A key's importance is the highest softmax weight that any query of the replay, of any query head of its group, gives
    it; the softmax runs over the chunk's keys and the replayed ones up to the query, as the paper's chunked scoring
    does. A layer's budget is shared by its heads in the order of importance, so heads keep different numbers, unless
    the budget gives each its own; the paper lets layers compete as well. The texts before the replay are the paper's,
    without a chat template. Generated tokens are kept.
    """

    name = "kvzip"
    summary = "Replays the prompt and keeps the keys that repeating it attends to; heads keep different numbers."
    reference = "Kim et al., KVzip: Query-Agnostic KV Cache Compression with Context Reconstruction, arXiv 2505.23416"
    query_window = 0
    grows = True
    head_budgets = True

    class Options(Options):
        """Options of KVzip."""

        chunk: int = Field(2048, ge=1, description="tokens replayed at a time")
        tail: int = Field(8, ge=0, description="tokens of the preceding chunk that lead into a chunk")
        instruction: str = Field("\n\nRepeat the previous context:", description="text before the first chunk")
        continuation: str = Field(
            "\n\nRepeat the previous context starting with", description="text before the tail of a later chunk"
        )

    def begin(self, model: ModelView) -> None:
        """Turn the instructions into token ids."""
        texts = self.options.instruction, self.options.continuation
        if model.tokenize is None and any(texts):
            raise KVBenchError(
                "Policy 'kvzip' puts an instruction before the replayed prompt and needs a tokenizer: give "
                "attach(..., tokenizer=...), or set its options instruction and continuation to ''."
            )
        self._texts = [model.tokenize(text) if model.tokenize and text else [] for text in texts]

    def after_prompt(self, layers: list[Layer], ids: Tensor, replay: Replay) -> None:
        """Score every key by the replay of its chunk and evict the least important ones."""
        if all(layer.budget.covers_all for layer in layers):
            return
        chunk, tokens = self.options.chunk, ids.shape[1]
        for layer in layers:
            layer.state["importance"] = torch.empty(layer.rows, layer.kv_heads, tokens, device=ids.device)
        for start in range(0, tokens, chunk):
            stop = min(start + chunk, tokens)
            text = torch.tensor(self._texts[start > 0], dtype=ids.dtype, device=ids.device).expand(len(ids), -1)
            more = torch.cat([text, ids[:, max(start - self.options.tail, 0) : stop]], dim=1)

            def observe(layer: Layer, queries: Tensor, keys: Tensor, start: int = start, stop: int = stop) -> None:
                layer.state["importance"][:, :, start:stop] = self._importance(layer, queries, keys, start, stop)

            replay(more, observe)
        for layer in layers:
            importance = layer.state.pop("importance")
            if layer.budget.heads is not None:
                layer.keep_top(importance)
            elif not layer.budget.covers_all:
                importance = importance.flatten(1)
                best = importance.topk(layer.budget.tokens * layer.kv_heads, dim=-1).indices
                kept = torch.zeros_like(importance, dtype=torch.bool).scatter_(1, best, True)
                layer.store.keep(kept.view(layer.rows, layer.kv_heads, tokens))

    @staticmethod
    def _importance(layer: Layer, queries: Tensor, replayed: Tensor, start: int, stop: int) -> Tensor:
        """Highest weights [B, G, stop − start] that the replay's queries give to the prompt's keys from start on."""
        keys = torch.cat([layer.store.static_parts()[0][0][:, :, start:stop], replayed], dim=2)
        count, size = queries.shape[2], stop - start
        columns = torch.arange(size + count, device=keys.device)
        highest = torch.zeros(layer.rows, layer.kv_heads, size, device=keys.device)
        for first in range(0, count, _QUERIES):
            part = queries[:, :, first : first + _QUERIES]
            grouped = part.reshape(layer.rows, layer.kv_heads, -1, layer.head_dim)
            logits = (grouped @ keys.transpose(-1, -2)).float().mul_(layer.scaling)
            rows = torch.arange(first, first + part.shape[2], device=keys.device)
            future = (columns > size + rows[:, None]).repeat(layer.heads // layer.kv_heads, 1)
            weights = logits.masked_fill_(future, -torch.inf).softmax(-1)[..., :size]
            highest = torch.maximum(highest, weights.amax(2))
        return highest
