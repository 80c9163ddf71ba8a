"""DuoAttention (arXiv 2410.10819): retrieval heads attend to everything, streaming heads to sinks and recent tokens."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from kvbench.contract.budget import LayerBudget
from kvbench.contract.errors import KVBenchError
from kvbench.contract.extension import Options
from kvbench.contract.layer import Layer
from kvbench.contract.policy import KVCachePolicy, ModelView, Replay
from kvbench.contract.reading import parse_json, read_bytes, reading
from kvbench.contract.selection import Selection
from kvbench.contract.step import Clock, FixedStep, Part, lengths_at
from kvbench.contract.storage import Storage, TokenBuffer
from kvbench.kernels.attention import ragged
from kvbench.kernels.insert import insert
from kvbench.kernels.steps import GrowingStep
from kvbench.strategies.evicting.snapkv import window_attention


class _SomeHeads(Storage):
    """Tokens of the key/value heads in `heads`, bool [B, G], alone; the others' are gone."""

    def __init__(self, heads: Tensor, keys: Tensor, values: Tensor) -> None:
        self._heads = heads
        self._tokens = TokenBuffer(keys[heads][None], values[heads][None])

    @property
    def length(self) -> int:  # type: ignore[override]
        return self._tokens.length

    @property
    def nbytes(self) -> int:
        return self._tokens.nbytes + self._heads.nbytes

    @property
    def keys(self) -> Tensor:
        return self._spread(self._tokens.keys[0], 0.0)

    @property
    def values(self) -> Tensor:
        return self._spread(self._tokens.values[0], 0.0)

    def _spread(self, mine: Tensor, fill: float) -> Tensor:
        whole = mine.new_full((*self._heads.shape, *mine.shape[1:]), fill)
        whole[self._heads] = mine
        return whole

    def append(self, keys: Tensor, values: Tensor) -> None:
        self._tokens.append(keys[self._heads][None], values[self._heads][None])

    def scores(self, queries: Tensor, scaling: float) -> Tensor:
        grouped = queries.view(*self._heads.shape, -1, queries.shape[3])[self._heads]
        logits = (grouped @ self._tokens.keys[0].transpose(-1, -2)).float() * scaling
        return self._spread(logits, -torch.inf).flatten(1, 2)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        values = self._tokens.values[0]
        grouped = weights.view(*self._heads.shape, -1, weights.shape[2])[self._heads].to(values.dtype)
        return self._spread(grouped @ values, 0.0).float().flatten(1, 2)[:, :, None]


class DuoAttention(KVCachePolicy):
    """Gives the whole context to as many retrieval heads as the model's budget allows; all others stream.

    The paper learns each head's score by optimisation on synthetic data, so that streaming moves the model's output
    least; here a score comes from a `profile`, or is measured on the prompt: how far, squared and summed over the
    query heads of the key/value head, the outputs of its last queries would move if it streamed. The heads of all
    layers compete, so a layer may attend to more than its share of the budget; the total stays within it
    when the prompt ends, and grows with the context for retrieval heads only. An allocator that gives each head its
    own budget ranks the heads instead: those that it gives most become retrieval heads. The published 64 sinks and 256
    recent tokens hold from 8K tokens on.
    """

    name = "duo_attention"
    summary = "Retrieval heads attend to everything, streaming heads to sinks and recent tokens, by a measured profile."
    reference = (
        "Xiao et al., DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads, "
        "arXiv 2410.10819"
    )

    across_layers = True
    head_budgets = True

    class Options(Options):
        """Options of DuoAttention."""

        sinks: int | None = Field(None, ge=0, description="first tokens; by default 64, at most 1/128 of the context")
        recent: int | None = Field(None, ge=1, description="recent tokens; by default 256, at most 1/32 of the context")
        profile: Path | None = Field(
            None, description="JSON file: for each governed layer a list of its key/value heads' scores"
        )
        window: int = Field(64, ge=1, description="last queries that measure the heads where there is no profile")

    def __init__(self, options: BaseModel | None = None) -> None:
        super().__init__(options)
        self.query_window = 0 if self.options.profile else self.options.window
        if not self.options.profile:
            self.query_aware = "measures its heads on the prompt's last queries"
        self._profile: Tensor | None = None

    def static_tokens(self, context: int) -> tuple[int, int]:
        """Sinks and recent tokens of every head."""
        sinks, recent = self.options.sinks, self.options.recent
        return (
            min(64, context // 128) if sinks is None else sinks,
            max(1, min(256, context // 32)) if recent is None else recent,
        )

    def most_attended(self, layer: Layer) -> int | None:
        """Retrieval heads attend to all generated tokens, beyond the budget."""
        if layer.budget.covers_all:
            return layer.tokens
        return layer.budget.tokens + layer.tokens - layer.prompt_tokens

    def begin(self, model: ModelView) -> None:
        """Read the profile and check that it fits the model."""
        path = self.options.profile
        if path is None:
            return
        shape = f"{len(model.numbers)} lists of {model.kv_heads} numbers, one list for each governed layer"
        with reading(lambda reason: f"The profile {path} is not readable ({reason}): expected JSON with {shape}."):
            scores = torch.tensor(parse_json(read_bytes(path.expanduser())), dtype=torch.float64)
        if scores.shape != (len(model.numbers), model.kv_heads):
            raise KVBenchError(f"The profile {path} has the shape {list(scores.shape)}: {model.name} needs {shape}.")
        self._profile = scores

    def prefill(self, layer: Layer, queries: Tensor, keys: Tensor, values: Tensor) -> None:
        """Measure how far each head's outputs would move if it streamed."""
        if layer.budget.heads is not None:
            if self._profile is not None:
                raise KVBenchError(
                    f"The profile {self.options.profile} and a budget that gives each head its own number of tokens "
                    "both say which heads are retrieval heads: leave one of them out."
                )
        elif self._profile is None:
            sinks, recent = layer.static
            key = torch.arange(layer.tokens, device=keys.device)
            query = key[-queries.shape[2] :, None]
            kept = (key < sinks) | (key > query - recent)
            scores = []
            for group, own in enumerate(queries.chunk(layer.kv_heads, dim=1)):  # one by one, to spare memory
                weights = window_attention(own, keys[:, group : group + 1], layer.scaling)
                streamed = weights * kept
                streamed /= streamed.sum(-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
                moved = weights.sub_(streamed) @ values[:, group : group + 1].float()
                scores.append(moved.square().sum((1, 2, 3), dtype=torch.float64) / len(query))
            layer.state["score"] = torch.stack(scores, dim=1)

    def after_prompt(self, layers: list[Layer], ids: Tensor, replay: Replay) -> None:
        """Make the best heads of the model retrieval heads and cut the others down."""
        sinks, recent = layers[0].static
        tokens, streamed = layers[0].tokens, sinks + recent
        if all(layer.budget.covers_all for layer in layers) or tokens <= streamed:
            return
        heads = layers[0].kv_heads
        spare = sum(layer.budget.tokens - streamed for layer in layers) * heads
        whole = min(spare // (tokens - streamed), len(layers) * heads)
        if self._profile is not None:
            scores = self._profile.flatten().expand(layers[0].rows, -1)
        elif any(layer.budget.heads is not None for layer in layers):
            alike = torch.ones(layers[0].rows, heads, dtype=torch.int64)
            budgets = [layer.budget for layer in layers]
            given = [alike * budget.tokens if budget.heads is None else budget.heads.cpu() for budget in budgets]
            scores = torch.cat(given, dim=1)
        else:
            scores = torch.cat([layer.state.pop("score").cpu() for layer in layers], dim=1)
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, scores.topk(whole, dim=1).indices, True)
        for layer, mine in zip(layers, torch.split(chosen, heads, dim=1), strict=True):
            layer.state["heads"] = mine.clone().to(layer.store.device)
            storage = partial(_SomeHeads, layer.state["heads"])
            layer.store.set_aside(sinks, tokens - recent, offload=False, storage=storage)

    def fixed_step(self, parts: Sequence[Part], clock: Clock) -> FixedStep | None:
        """Heads of unequal length in one flat store."""
        streams = any("heads" in part.layer.state for part in parts)
        return DuoStep(parts, clock) if streams else GrowingStep(parts, clock)

    def insert(self, layer: Layer, keys: Tensor, values: Tensor) -> None:
        """Move what leaves the recent window to the retrieval heads; the others forget it."""
        if "heads" in layer.state:
            layer.store.advance(keys.shape[2])

    def select(self, layer: Layer, queries: Tensor, budget: LayerBudget) -> Selection:
        """Let the retrieval heads attend to everything."""
        if "heads" not in layer.state:
            return Selection()
        return Selection(everything=True, heads=layer.state["heads"])


class DuoStep(FixedStep):
    """The step in fixed shapes: each head has its own rows of one flat store, to which it appends or whose last rows
    are its ring of recent tokens."""

    def __init__(self, parts: Sequence[Part], clock: Clock) -> None:
        first = parts[0].layer
        shape = clock.batch, first.kv_heads
        self._scaling = first.scaling
        held = torch.zeros(shape, dtype=torch.int64)
        # a new token goes to row `begin` + `count` mod `window` of its head
        begin, count, window = torch.zeros_like(held), torch.zeros_like(held), torch.full_like(held, 2**30)
        for part in parts:
            layer, rows = part.layer, slice(None) if part.rows is None else part.rows.cpu()
            static, recent = layer.store.static_tokens, layer.static[1]
            whole = layer.state["heads"].cpu() if "heads" in layer.state else torch.ones(layer.rows, shape[1]).bool()
            held[rows] = torch.where(whole, layer.tokens, static)
            begin[rows] = torch.where(whole, 0, static - recent)
            count[rows] = torch.where(whole, layer.tokens, 0)
            window[rows] = torch.where(whole, 2**30, recent)
        self._grows = window == 2**30
        capacity = held + self._grows * clock.new_tokens
        offsets = (capacity.flatten().cumsum(0) - capacity.flatten()).view(shape)
        keys, values, _ = first.store.static_parts()[0]
        self._keys, self._values = (like.new_zeros(int(capacity.sum()), like.shape[3]) for like in (keys, values))
        for part in parts:
            self._take(part, offsets)
        device = clock.positions.device
        self._begin, self._count, self._window, self._lengths, self._more = (
            numbers.to(device, torch.int32) for numbers in (begin + offsets, count, window, held, self._grows)
        )
        self._offsets = offsets.to(device)
        self._fixed, self._positions = int(held[~self._grows].sum()), clock.positions

    def _take(self, part: Part, offsets: Tensor) -> None:
        """Copy a part's tokens to their rows, a retrieval head's in their order, and empty its store."""
        store = part.layer.store
        (keys, values, _), ids = store.static_parts()[0], store.static_ids
        order = ids.argsort()
        aside = (store.aside_keys, store.aside_values) if store.aside_stop > store.aside_start else None
        numbers = range(part.layer.rows) if part.rows is None else part.rows.tolist()
        before = int((ids < store.aside_start).sum()) if aside else 0
        for row, number in enumerate(numbers):
            for group in range(keys.shape[1]):
                grows, start = bool(self._grows[number, group]), int(offsets[number, group])
                for place, (target, static) in enumerate(((self._keys, keys), (self._values, values))):
                    own = static[row, group][order]
                    pieces = [own[:before], aside[place][row, group], own[before:]] if aside and grows else [own]
                    for piece in pieces:
                        target[start : start + len(piece)] = piece
                        start += len(piece)
                    start = int(offsets[number, group])
        store.release_static(0)
        store.release_aside()
        part.layer.state.clear()

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Append in retrieval heads, replace the oldest recent token in the others, and attend."""
        wide = (*keys.shape[:2], -1, -1)
        insert(
            self._keys[None, None].expand(wide), self._values[None, None].expand(wide), keys, values,
            self._begin + self._count.remainder(self._window),
        )  # fmt: skip
        self._count.add_(1)
        self._lengths.add_(self._more)
        return ragged(
            queries, self._keys, self._values, self._offsets, self._lengths, scaling=self._scaling, dtype=queries.dtype
        )[0]

    def bytes(self) -> dict[str, int]:
        """Keys and values, on the device."""
        return {"resident": self._keys.nbytes + self._values.nbytes, "offloaded": 0, "index": 0}

    def reads(self, tokens: int) -> dict[str, int]:
        """The streaming heads' tokens, and all of the others'."""
        token = (self._keys.nbytes + self._values.nbytes) // len(self._keys)
        rows = lengths_at(self._positions, tokens).cpu()
        return {"device": token * (self._fixed + int((self._grows.sum(-1) * rows).sum())), "host": 0}

    def changed(self) -> Sequence[Tensor]:
        """Places and lengths: a repeated step replaces the same token by the same one."""
        return [self._count, self._lengths]
