"""KVzip (arXiv 2505.23416): keep the keys that the model needs to repeat the prompt."""

from collections.abc import Callable

import torch
from pydantic import Field
from torch import Tensor

from kvbench.contract import extension
from kvbench.contract.errors import KVBenchError
from kvbench.contract.layer import Layer
from kvbench.contract.policy import KVCachePolicy, ModelView, Replay

_QUERIES = 256
"""Queries scored at a time, at most; their weights take no more memory than the layer's keys and values."""


Weigh = Callable[[Tensor, int], Tensor]
"""Changes weights [B, G, H / G, m, n] of the replay's queries from the `first` one on."""


class KVzip(KVCachePolicy):
    """Replays the prompt chunk by chunk behind itself and keeps the pairs that this reconstruction attends to most.

    A key's importance is the highest softmax weight that any query of the replay, of any query head of its group, gives
    it; the softmax runs over the keys of the system prompt and of the chunk, and the replayed ones up to the query, as
    the authors' chunked scoring does. A layer's budget is shared by its heads in the order of importance, so heads keep
    different numbers, unless the budget gives each its own; the paper lets layers compete as well. Where the prompt
    begins as the tokenizer's chat template has it, what stands before the user's message is neither replayed nor
    evicted, and counts towards the budget. A replayed chunk follows the authors' words and what the template puts after
    a user's message. Generated tokens are kept.
    """

    name = "kvzip"
    summary = "Replays the prompt and keeps the keys that repeating it attends to; heads keep different numbers."
    reference = "Kim et al., KVzip: Query-Agnostic KV Cache Compression with Context Reconstruction, arXiv 2505.23416"
    query_window = 0
    grows = True
    head_budgets = True
    _opening: tuple[int, ...] = ()
    _closing: tuple[int, ...] = ()

    class Options(extension.Options):
        """Options of KVzip."""

        chunk: int = Field(2000, ge=1, description="tokens replayed at a time")
        tail: int = Field(8, ge=0, description="tokens of the preceding chunk that lead into a chunk")
        instruction: str = Field("\n\nRepeat the previous context exactly.", description="text before the first chunk")
        continuation: str = Field(
            "\n\nRepeat the part of the previous context exactly, starting with ",
            description="text before the tail of a later chunk",
        )
        template: bool = Field(
            True, description="keep the chat template's system prompt, and end the texts as the template ends a message"
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
        if self.options.template:
            self._opening, self._closing = model.opening, model.closing

    def static_tokens(self, context: int) -> tuple[int, int]:
        """The chat template's system prompt."""
        return min(len(self._opening), context), 0

    def after_prompt(self, layers: list[Layer], ids: Tensor, replay: Replay) -> None:
        """Score every key by the replay of its chunk and evict the least important ones."""
        if all(layer.budget.covers_all for layer in layers):
            return
        tokens, system = ids.shape[1], self.score(layers, ids, replay)
        for layer in layers:
            importance = layer.state.pop("importance")
            if layer.budget.heads is not None:
                layer.keep_top(importance, system)
            elif not layer.budget.covers_all:
                room = max(layer.budget.tokens - system, 0) * layer.kv_heads
                best = importance.flatten(1).topk(room, dim=-1).indices
                kept = torch.zeros_like(importance.flatten(1), dtype=torch.bool).scatter_(1, best, True)
                kept = kept.view(layer.rows, layer.kv_heads, tokens - system)
                layer.store.keep(torch.cat([kept.new_ones(*kept.shape[:2], system), kept], dim=2))

    def score(self, layers: list[Layer], ids: Tensor, replay: Replay) -> int:
        """Put the importance [B, G, n − s] of all but the prompt's first s tokens in `layer.state`; gives s."""
        chunk, tokens, system = self.options.chunk, ids.shape[1], self._system_tokens(ids)
        for layer in layers:
            layer.static = system, 0
            layer.state["importance"] = torch.empty(
                layer.rows, layer.kv_heads, tokens - system, device=layer.store.device
            )
        for start in range(system, tokens, chunk):
            stop = min(start + chunk, tokens)
            tail = ids[:, max(start - self.options.tail, system) : start]
            text, closing = (
                torch.tensor(part, dtype=ids.dtype, device=ids.device).expand(len(ids), -1)
                for part in (self._texts[start > system], self._closing)
            )
            more = torch.cat([text, tail, closing, ids[:, start:stop]], dim=1)

            def observe(layer: Layer, queries: Tensor, keys: Tensor, start: int = start, stop: int = stop) -> None:
                found = self.importance(layer, queries, keys, start, stop, system)
                layer.state["importance"][:, :, start - system : stop - system] = found

            replay(more, observe)
        return system

    def _system_tokens(self, ids: Tensor) -> int:
        """How many tokens of the prompts [B, n] stand before the user's message; none where they are no chats.

        The last token of the template's opening may have merged with the message.
        """
        size = min(len(self._opening), ids.shape[1])
        same = (ids[:, :size] == torch.tensor(self._opening[:size], dtype=ids.dtype, device=ids.device)).all(0)
        equal = int(same.long().cumprod(0).sum())
        return equal if len(self._opening) - 1 <= equal < ids.shape[1] else 0

    def importance(self, layer: Layer, queries: Tensor, replayed: Tensor, start: int, stop: int, system: int) -> Tensor:
        """Highest weights [B, G, stop − start] that the replay's queries give to the prompt's keys from start on."""
        return self.highest(layer, queries, replayed, (start, stop, system), None)

    @staticmethod
    def highest(
        layer: Layer, queries: Tensor, replayed: Tensor, span: tuple[int, int, int], weigh: Weigh | None
    ) -> Tensor:
        """The same for the `span` start, stop and system, of weights that `weigh` has changed where it is given."""
        start, stop, system = span
        stored = layer.store.static_parts()[0][0]
        keys = torch.cat([stored[:, :, start:stop], stored[:, :, :system], replayed], dim=2)
        count, size = queries.shape[2], stop - start
        columns = torch.arange(size + system + count, device=keys.device)
        highest = torch.zeros(layer.rows, layer.kv_heads, size, device=keys.device)
        at_once = max(min(_QUERIES, stored.nbytes // (4 * layer.rows * layer.heads * len(columns))), 1)
        for first in range(0, count, at_once):
            part = queries[:, :, first : first + at_once]
            grouped = part.reshape(layer.rows, layer.kv_heads, -1, layer.head_dim)
            logits = (grouped @ keys.transpose(-1, -2)).float().mul_(layer.scaling)
            rows = torch.arange(first, first + part.shape[2], device=keys.device)
            future = (columns > size + system + rows[:, None]).repeat(layer.heads // layer.kv_heads, 1)
            weights = logits.masked_fill_(future, -torch.inf).softmax(-1)[..., :size]
            if weigh is not None:
                shape = layer.rows, layer.kv_heads, -1, part.shape[2], size
                weights = weigh(weights.reshape(shape), first).flatten(2, 3)
            highest = torch.maximum(highest, weights.amax(2))
        return highest
