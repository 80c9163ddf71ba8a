"""InfLLM (arXiv 2402.04617): blocks of distant tokens, looked up by their representative tokens."""

import torch
from pydantic import Field
from torch import Tensor

from kvbench.contract.budget import LayerBudget
from kvbench.contract.extension import Options
from kvbench.contract.layer import Layer, Rotation
from kvbench.contract.policy import KVCachePolicy
from kvbench.contract.selection import Selection
from kvbench.contract.storage import TokenBuffer


def _to_start(rotary: Rotation, keys: Tensor, first: int) -> Tensor:
    """Keys [B, G, t, d] of the tokens from `first` on, rotated as if each stood at position 0."""
    positions = torch.arange(first, first + keys.shape[2])
    return rotary.rotate(rotary.unrotate(keys, positions), torch.zeros_like(positions))


class _DistantTokens(TokenBuffer):
    """Tokens whose keys have lost their positions."""

    def __init__(self, rotary: Rotation, keys: Tensor, values: Tensor) -> None:
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
    is not full yet stay in the window. Of the published 6,272 tokens two thirds are the local window; so they are here
    of any budget, up to the published 4,096. Initial tokens and blocks have the published sizes from 16K tokens on.
    Where heads have different budgets, the window is the smallest head's, and each head attends to as many blocks of
    the one ranking as its budget allows.
    """

    name = "infllm"
    summary = "Looks up blocks of offloaded tokens by representative tokens, one set of blocks for all heads."
    head_budgets = True
    reference = (
        "Xiao et al., InfLLM: Training-Free Long-Context Extrapolation for LLMs with an Efficient Context Memory, "
        "arXiv 2402.04617"
    )

    class Options(Options):
        """Options of InfLLM."""

        init: int | None = Field(None, ge=0, description="initial tokens; by default 128, at most 1/128 of the context")
        local: int | None = Field(
            None,
            ge=1,
            description="local window; by default two thirds of the budget, within 1/64 of the context and 4096",
        )
        block_size: int | None = Field(
            None, ge=1, description="tokens in a block; by default 128, at most 1/128 of the context, at least 8"
        )
        representatives: int = Field(4, ge=1, description="representative tokens of a block")

        def sizes(self, context: int, budget: int) -> tuple[int, int, int]:
            """Initial tokens, local window and block, in tokens, for prompts of `context` and `budget` tokens."""
            init = min(128, context // 128) if self.init is None else self.init
            block = max(8, min(128, context // 128)) if self.block_size is None else self.block_size
            share = max((budget - init - block + 1) * 2 // 3, context // 64, 1)
            return init, min(4096, share) if self.local is None else self.local, block

    def static_tokens(self, context: int) -> tuple[int, int]:
        """Initial tokens, and the smallest local window with a block that is not full yet."""
        init, local, block = self.options.sizes(context, 0)
        return init, local + block - 1

    def prefill(self, layer: Layer, queries: Tensor, keys: Tensor, values: Tensor) -> None:
        """Offload the initial tokens and all full blocks before the local window; note the blocks' representatives."""
        init, local, block = layer.state["sizes"] = self.options.sizes(layer.tokens, layer.budget.least)
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
        _, local, block = layer.state["sizes"]
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
        _, local, block = layer.state["sizes"]
        if "landmarks" in layer.state and layer.store.static_tokens >= local + block:
            first = layer.store.aside_stop
            moved, _ = layer.store.advance(block)
            self._note_blocks(layer, first, moved, layer.state["recent"][:, :, -(local + block - 1) :])

    def select(self, layer: Layer, queries: Tensor, budget: LayerBudget) -> Selection:
        """Take the initial tokens and the blocks whose representatives match the query of all heads best."""
        if "landmarks" not in layer.state:
            return Selection()
        init, local, block = layer.state["sizes"]
        shape = (layer.rows, layer.kv_heads, -1, 1, layer.head_dim)
        recent = torch.cat([layer.state["recent"], queries.view(shape).sum(2)], dim=2)
        layer.state["recent"] = recent[:, :, -(local + block) :]
        distant = layer.rotate(layer.unrotate(queries, torch.tensor([layer.tokens - 1])), torch.tensor([local]))
        landmarks = layer.state["landmarks"]
        relevance = (distant.view(shape).sum(2) @ landmarks.transpose(-1, -2)).sum((1, 2))
        blocks = landmarks.shape[2]
        static = layer.store.static_tokens + init
        best = relevance.topk(budget.beside(static, blocks * block) // block, dim=-1).indices
        chosen = budget.cut(best[:, None].expand(-1, layer.kv_heads, -1), static, unit=block)[..., None]
        ids = (init + chosen * block + torch.arange(block, device=chosen.device)).masked_fill(chosen < 0, -1).flatten(2)
        first = torch.arange(init, device=ids.device).expand(*ids.shape[:2], -1)
        return Selection(
            torch.cat([first, ids], dim=2), queries=distant, padded=budget.heads is not None, evaluations=float(blocks)
        )
