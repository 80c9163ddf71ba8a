"""InfLLM (arXiv 2402.04617): blocks of distant tokens, looked up by their representative tokens."""

import torch
from pydantic import Field
from torch import Tensor

from kvbench.budget import LayerBudget
from kvbench.extension import Options
from kvbench.policy import KVCachePolicy, Layer, Selection
from kvbench.rotary import Rotary
from kvbench.storage import TokenBuffer


def _to_start(rotary: Rotary, keys: Tensor, first: int) -> Tensor:
    """Keys [B, G, t, d] of the tokens from `first` on, rotated as if each stood at position 0."""
    positions = torch.arange(first, first + keys.shape[2])
    return rotary.rotate(rotary.unrotate(keys, positions), torch.zeros_like(positions))


class _DistantTokens(TokenBuffer):
    """Tokens whose keys have lost their positions."""

    def __init__(self, rotary: Rotary, keys: Tensor, values: Tensor) -> None:
        self._rotary = rotary
        super().__init__(_to_start(rotary, keys, 0), values)

    def append(self, keys: Tensor, values: Tensor) -> None:
        super().append(_to_start(self._rotary, keys, self.length), values)


class InfLLM(KVCachePolicy):
    """Offloads blocks between the initial tokens and the local window; one set of blocks serves all heads.

    A block's representatives are the tokens that the next `local` queries score highest; a block's relevance is the
    sum, over heads and representatives, of their products with the query, and so needs only the representatives' sum.
    Tokens outside the local window, initial ones included, all stand at a distance of `local` tokens. Here the prompt
    itself is computed exactly, where the paper reads it block by block through the same lookup; tokens of a block that
    is not full yet stay in the window. The published sizes hold from 128K tokens on (initial tokens and blocks from
    16K); shorter contexts get shorter ones.
    """

    name = "infllm"
    summary = "Looks up blocks of offloaded tokens by representative tokens, one set of blocks for all heads."
    reference = (
        "Xiao et al., InfLLM: Training-Free Long-Context Extrapolation for LLMs with an Efficient Context Memory, "
        "arXiv 2402.04617"
    )

    class Options(Options):
        """Options of InfLLM."""

        init: int | None = Field(None, ge=0, description="initial tokens; by default 128, at most 1/128 of the context")
        local: int | None = Field(None, ge=1, description="local window; by default 4096, at most 1/32 of the context")
        block_size: int | None = Field(
            None, ge=1, description="tokens in a block; by default 128, at most 1/128 of the context, at least 8"
        )
        representatives: int = Field(4, ge=1, description="representative tokens of a block")

        def sizes(self, context: int) -> tuple[int, int, int]:
            """Initial tokens, local window and block, in tokens, for a prompt of `context` tokens."""
            init = min(128, context // 128) if self.init is None else self.init
            local = max(1, min(4096, context // 32)) if self.local is None else self.local
            return init, local, max(8, min(128, context // 128)) if self.block_size is None else self.block_size

    def static_tokens(self, context: int) -> tuple[int, int]:
        """Initial tokens, and the local window with a block that is not full yet."""
        init, local, block = self.options.sizes(context)
        return init, local + block - 1

    def prefill(self, layer: Layer, queries: Tensor, keys: Tensor, values: Tensor) -> None:
        """Offload the initial tokens and all full blocks before the local window; note the blocks' representatives."""
        init, local, block = self.options.sizes(layer.tokens)
        stop = init + max(layer.tokens - local - init, 0) // block * block
        if layer.budget.covers_all or stop == init:
            return
        assert layer.rotary is not None
        rotary = layer.rotary
        layer.store.set_aside(0, stop, offload=True, storage=lambda k, v: _DistantTokens(rotary, k, v))
        summed = queries.view(layer.rows, layer.kv_heads, -1, *queries.shape[2:]).sum(2)
        layer.state["recent"] = summed[:, :, -(local + block) :].clone()
        self._note_blocks(layer, init, keys[:, :, init:stop], summed[:, :, init:])

    def _note_blocks(self, layer: Layer, first: int, keys: Tensor, queries: Tensor) -> None:
        """Append the blocks of `keys`, tokens from `first` on, given the heads' summed `queries` from there on."""
        _, local, block = self.options.sizes(layer.prompt_tokens)
        running = torch.nn.functional.pad(queries.double().cumsum(2), (0, 0, 1, 0))
        begin = torch.arange(1, keys.shape[2] + 1, device=keys.device)
        end = (begin + local).clamp(max=queries.shape[2])
        following = (running[:, :, end] - running[:, :, begin]) / (end - begin).clamp_min(1)[:, None]
        marks = (following * keys).sum(-1).view(*keys.shape[:2], -1, block)
        best = marks.topk(min(self.options.representatives, block), dim=-1).indices[..., None]
        assert layer.rotary is not None
        blocks = _to_start(layer.rotary, keys, first).view(*marks.shape, layer.head_dim)
        landmarks = blocks.gather(3, best.expand(-1, -1, -1, -1, layer.head_dim)).sum(3)
        known = layer.state.get("landmarks", landmarks[:, :, :0])
        layer.state["landmarks"] = torch.cat([known, landmarks], dim=2)
        layer.store.index_bytes = layer.state["landmarks"].nbytes + layer.state["recent"].nbytes

    def insert(self, layer: Layer, keys: Tensor, values: Tensor) -> None:
        """Offload the oldest block of the window once the window is full without it."""
        _, local, block = self.options.sizes(layer.prompt_tokens)
        if "landmarks" in layer.state and layer.store.static_tokens >= local + block:
            first = layer.store.aside_stop
            moved, _ = layer.store.advance(block)
            self._note_blocks(layer, first, moved, layer.state["recent"][:, :, -(local + block - 1) :])

    def select(self, layer: Layer, queries: Tensor, budget: LayerBudget) -> Selection:
        """Take the initial tokens and the blocks whose representatives match the query of all heads best."""
        if "landmarks" not in layer.state:
            return Selection()
        init, local, block = self.options.sizes(layer.prompt_tokens)
        shape = (layer.rows, layer.kv_heads, -1, 1, layer.head_dim)
        recent = torch.cat([layer.state["recent"], queries.view(shape).sum(2)], dim=2)
        layer.state["recent"] = recent[:, :, -(local + block) :]
        distant = layer.rotate(layer.unrotate(queries, torch.tensor([layer.tokens - 1])), torch.tensor([local]))
        landmarks = layer.state["landmarks"]
        relevance = (distant.view(shape).sum(2) @ landmarks.transpose(-1, -2)).sum((1, 2))
        blocks = landmarks.shape[2]
        wanted = budget.beside(layer.store.static_tokens + init, blocks * block) // block
        chosen = relevance.topk(wanted, dim=-1).indices
        ids = (init + chosen[..., None] * block + torch.arange(block, device=chosen.device)).flatten(1)
        ids = torch.cat([torch.arange(init, device=ids.device).expand(layer.rows, -1), ids], dim=1)
        ids = ids[:, None].expand(-1, layer.kv_heads, -1)
        return Selection(ids, queries=distant, evaluations=float(blocks))
