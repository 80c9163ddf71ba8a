"""InfLLM (arXiv 2402.04617): blocks of distant tokens, looked up by their representative tokens."""

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from kvbench.contract.budget import LayerBudget
from kvbench.contract.extension import Options
from kvbench.contract.host import host_empty
from kvbench.contract.layer import Layer, Rotation
from kvbench.contract.policy import KVCachePolicy, ModelView
from kvbench.contract.selection import Selection
from kvbench.contract.step import Clock, FixedStep, Part, lengths_at
from kvbench.contract.storage import TokenBuffer
from kvbench.kernels.attention import Segment, attend
from kvbench.kernels.insert import insert
from kvbench.kernels.merge import merge
from kvbench.kernels.score import scores
from kvbench.kernels.select import select_top
from kvbench.kernels.steps import GrowingStep
from kvbench.kernels.turn import turn
from kvbench.strategies.selecting.rotations import Pairs, pairs


def _to_start(rotary: Rotation, keys: Tensor, first: int) -> Tensor:
    """Keys [B, G, t, d] of the tokens from `first` on, rotated as if each stood at position 0."""
    positions = torch.arange(first, first + keys.shape[2])
    return rotary.rotate(rotary.unrotate(keys, positions), torch.zeros_like(positions))


class _DistantTokens(TokenBuffer):
    """Tokens whose keys have lost their positions."""

    def __init__(self, rotary: Rotation, keys: Tensor, values: Tensor) -> None:
        """Take over `keys` [B, G, t, d], rotated to position 0 already, and `values`."""
        self._rotary = rotary
        super().__init__(keys, values)

    def append(self, keys: Tensor, values: Tensor) -> None:
        super().append(_to_start(self._rotary, keys, self.length), values)


def _landmarks(keys: Tensor, distant: Tensor, queries: Tensor, local: int, block: int, representatives: int) -> Tensor:
    """The sum [B, G, t / block, d] of each block's representatives, for `keys` [B, G, t, d] of successive tokens.

    `distant` are the keys rotated to position 0, `queries` [B, G, m, d] the heads' sums from the first token on.
    """
    running = torch.nn.functional.pad(queries.double().cumsum(2), (0, 0, 1, 0))
    begin = torch.arange(1, keys.shape[2] + 1, device=keys.device)
    end = (begin + local).clamp(max=queries.shape[2])
    following = (running[:, :, end] - running[:, :, begin]) / (end - begin).clamp_min(1)[:, None]
    marks = (following * keys).sum(-1).view(*keys.shape[:2], -1, block)
    best = marks.topk(min(representatives, block), dim=-1).indices[..., None]
    blocks = distant.reshape(*marks.shape, keys.shape[3])
    return blocks.gather(3, best.expand(-1, -1, -1, -1, keys.shape[3])).sum(3)


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

    def begin(self, model: ModelView) -> None:
        """Refuse a model whose keys cannot be had before rotation, before it computes anything."""
        model.require_rotary()

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
        distant = _to_start(rotary, keys[:, :, :stop], 0)  # where the keys are, not on the host
        layer.store.set_aside(0, stop, offload=True, storage=lambda k, v: _DistantTokens(rotary, k.copy_(distant), v))
        summed = queries.view(layer.rows, layer.kv_heads, -1, *queries.shape[2:]).sum(2)
        layer.state["recent"] = summed[:, :, -(local + block) :].clone()
        self._note_blocks(layer, keys[:, :, init:stop], distant[:, :, init:], summed[:, :, init:])

    def _note_blocks(self, layer: Layer, keys: Tensor, distant: Tensor, queries: Tensor) -> None:
        """Append the blocks of `keys`, `distant` at position 0, given the heads' summed `queries` from there on."""
        _, local, block = layer.state["sizes"]
        landmarks = _landmarks(keys, distant, queries, local, block, self.options.representatives)
        known = layer.state.get("landmarks", landmarks[:, :, :0])
        layer.state["landmarks"] = torch.cat([known, landmarks], dim=2)
        layer.store.index_bytes = layer.state["landmarks"].nbytes + layer.state["recent"].nbytes

    def fixed_step(self, parts: Sequence[Part], clock: Clock) -> FixedStep | None:
        """Blocks on the host, the window in a ring.

        None for rows whose blocks differ in size, and for a rotary embedding that is not one of pairs of channels.
        """
        if len({part.layer.state["sizes"][2] for part in parts}) > 1:
            return None
        started = any("landmarks" in part.layer.state for part in parts)
        if not started:
            return GrowingStep(parts, clock)
        rotary = pairs(parts[0].layer, clock.positions.device)
        return None if rotary is None else InfLLMStep(parts, clock, self.options.representatives, rotary)

    def insert(self, layer: Layer, keys: Tensor, values: Tensor) -> None:
        """Offload the oldest block of the window once the window is full without it."""
        _, local, block = layer.state["sizes"]
        if "landmarks" in layer.state and layer.store.static_tokens >= local + block:
            first = layer.store.aside_stop
            moved, _ = layer.store.advance(block)
            assert layer.rotary is not None
            distant = _to_start(layer.rotary, moved, first)
            self._note_blocks(layer, moved, distant, layer.state["recent"][:, :, -(local + block - 1) :])

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


class _Places:
    """Where the tokens of each row stand at a step: the same for all layers with the same sizes and budgets.

    After `update`: `blocks` int32 [B] of each row; `slots` int32 [B, 1, W] of its static tokens in the ring, −1 for
    none; `counts` int32 [B, G], blocks that each head may attend to; `cos` and `sin` float32 [B, d], which move a query
    to the distance of the local window.
    """

    blocks: Tensor
    slots: Tensor
    counts: Tensor
    cos: Tensor
    sin: Tensor

    def __init__(
        self, layer: Layer, clock: Clock, rows: Tensor, block: int, ring: int, budget: Tensor, rotary: Pairs
    ) -> None:
        """`rows` int32 [B, 3] on the device: whether the row has blocks, its initial tokens and its window."""
        self._layer, self._positions, self._block, self._budget = layer, clock.positions, block, budget
        self._started, self._init, self._local = rows.unbind(1)
        self._order = torch.arange(ring, dtype=torch.int32, device=rows.device)
        self._rotary = rotary

    def update(self) -> None:
        """Look at the step's positions; the step's own token counts."""
        tokens = self._positions + 1
        beyond = (tokens - self._local - self._init).clamp_min(0)
        self.blocks = beyond // self._block * self._started
        stop = self._init + self.blocks * self._block
        places = self._order + stop[:, None]
        slots = torch.where(places < tokens[:, None], places % len(self._order), -1)
        self.slots = slots[:, None]
        static = tokens - stop + self._init
        self.counts = (self._budget - static[:, None]).clamp_min(0) // self._block
        self.cos, self.sin = self._rotary.factors(self._turned, self._positions.shape[0])

    def _turned(self, x: Tensor) -> Tensor:
        return self._layer.rotate(self._layer.unrotate(x, self._positions), self._local)


class InfLLMStep(FixedStep):
    """InfLLM's step in fixed shapes: blocks lie on the host, initial tokens and a ring for the window on the device.

    Every `block` steps, between two steps, the ring's oldest block goes to the host. Rows that have no block yet and
    whose budget covers everything keep all their tokens in the ring.
    """

    def __init__(self, parts: Sequence[Part], clock: Clock, representatives: int, rotary: Pairs) -> None:
        layer = parts[0].layer
        self._layer, self._clock, self._scaling, self._representatives = layer, clock, layer.scaling, representatives
        device, shape = clock.positions.device, (clock.batch, layer.kv_heads)
        self._block = int(layer.state["sizes"][2])
        rows = torch.zeros(clock.batch, 3, dtype=torch.int32)
        budget = torch.zeros(shape, dtype=torch.int32, device=device)
        self._parts: list[tuple[slice | Tensor, int, int, int]] = []
        ring = blocks = most = 1
        for part in parts:
            own, (init, local, block) = part.layer, part.layer.state["sizes"]
            where = slice(None) if part.rows is None else part.rows.cpu()
            last = own.tokens + clock.new_tokens
            if "landmarks" in own.state:
                rows[where] = torch.tensor([1, init, local], dtype=torch.int32)
                self._parts.append((where if part.rows is None else part.rows.to(device), own.tokens, init, local))
                ring, blocks = max(ring, local + block), max(blocks, (last - local - init) // block)
                most = max(most, own.budget.most)
            else:
                rows[where] = torch.tensor([0, 0, local], dtype=torch.int32)
                ring = max(ring, last)
            budget[where if part.rows is None else part.rows.to(device)] = torch.as_tensor(
                own.budget.tokens if own.budget.heads is None else own.budget.heads
            ).to(budget)
        keys, values = layer.store.static_parts()[0][:2]
        self._most = max(min(most // self._block, blocks), 1)
        self._ring = [like.new_zeros(*shape, ring, like.shape[3]) for like in (keys, values)]
        self._recent = keys.new_zeros(*shape, ring, keys.shape[3])
        self._first = [like.new_zeros(*shape, max(int(rows[:, 1].max()), 1), like.shape[3]) for like in (keys, values)]
        room = blocks * self._block
        self._host = [host_empty((*shape, room, like.shape[3]), like.dtype, device).zero_() for like in (keys, values)]
        self._landmarks = keys.new_zeros(*shape, blocks, keys.shape[3])
        self._partner = rotary.partner
        for part in parts:
            self._take(part)
        self._rows = rows.to(device)
        self._init = self._rows[:, 1].contiguous()
        self._outputs = torch.zeros(2, clock.batch, layer.heads, 1, values.shape[3], device=device)
        self._lses = torch.zeros(2, clock.batch, layer.heads, device=device)
        self._budget = budget
        # layers of one rotation, the same sizes and budgets share what follows from the positions
        key = ("infllm", ring, *rows.flatten().tolist(), *budget.flatten().tolist(), *rotary.probe)
        self._leads = key not in clock.shared
        if self._leads:
            clock.shared[key] = _Places(layer, clock, self._rows, self._block, ring, budget, rotary)
        self._places: _Places = clock.shared[key]

    def _take(self, part: Part) -> None:
        """Copy a part's tokens to their places and empty its store."""
        layer, store = part.layer, part.layer.store
        rows = slice(None) if part.rows is None else part.rows.to(self._recent.device)
        host_rows = slice(None) if part.rows is None else part.rows.cpu()
        for target, tokens in zip(self._ring, store.static_parts()[0][:2], strict=True):
            _put(target, rows, store.static_ids % target.shape[2], tokens)
        if "landmarks" in layer.state:
            init = layer.state["sizes"][0]
            recent, landmarks = layer.state["recent"], layer.state["landmarks"]
            slots = torch.arange(layer.tokens - recent.shape[2], layer.tokens, device=recent.device)
            _put(self._recent, rows, slots % self._recent.shape[2], recent)
            self._landmarks[rows, :, : landmarks.shape[2]] = landmarks
            for first, host, tokens in zip(
                self._first, self._host, (store.aside_keys, store.aside_values), strict=True
            ):
                first[rows, :, :init] = tokens[:, :, :init].to(first.device)
                host[host_rows, :, : tokens.shape[2] - init] = tokens[:, :, init:]
        store.release_static(0)
        store.release_aside()
        layer.state.clear()

    def between(self, taken: int) -> None:
        """Move the oldest block of the ring to the host where the step's token leaves the window full without it."""
        for rows, prompt, init, local in self._parts:
            tokens = prompt + taken
            full = max(tokens - local - init, 0) // self._block
            if full == max(tokens - 1 - local - init, 0) // self._block:
                continue
            first = init + (full - 1) * self._block
            ring = self._recent.shape[2]
            later = torch.arange(first, tokens - 1, device=self._recent.device) % ring
            slots = later[: self._block]
            keys, values = (part[rows][:, :, slots] for part in self._ring)
            assert self._layer.rotary is not None
            distant = _to_start(self._layer.rotary, keys, first)
            self._landmarks[rows, :, full - 1] = _landmarks(
                keys, distant, self._recent[rows][:, :, later], local, self._block, self._representatives
            )[:, :, 0]
            host_rows = rows if isinstance(rows, slice) else rows.cpu()
            for host, tokens_of in zip(self._host, (distant, values), strict=True):
                host[host_rows, :, first - init : first - init + self._block] = tokens_of.to(host.device)

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Take the token in, look blocks up, and attend to them at a distance and to the window."""
        places, positions, ring = self._places, self._clock.positions, self._recent.shape[2]
        if self._leads:
            places.update()
        groups = keys.shape[1]
        insert(self._ring[0], self._ring[1], keys, values, positions, window=ring)
        distant, asked, summed = turn(queries, places.cos, places.sin, self._partner, groups)
        insert(self._recent, self._recent, summed, summed, positions, window=ring)
        relevance = scores(asked, self._landmarks, places.blocks).sum(1, keepdim=True)
        best = select_top(relevance.expand(-1, groups, -1), places.counts, self._most)
        attend(
            distant, Segment(self._first[0], self._first[1], self._init),
            Segment(self._host[0], self._host[1], ids=best, unit=self._block),
            scaling=self._scaling, output=self._outputs[0], lse=self._lses[0],
        )  # fmt: skip
        window = Segment(self._ring[0], self._ring[1], ids=places.slots.expand(-1, groups, -1))
        attend(queries, window, scaling=self._scaling, output=self._outputs[1], lse=self._lses[1])
        return merge(self._outputs, self._lses, dtype=queries.dtype)[0]

    def bytes(self) -> dict[str, int]:
        """Window and initial tokens on the device, blocks on the host; the index: representatives, recent queries."""
        return {
            "resident": sum(part.nbytes for part in (*self._ring, *self._first)),
            "offloaded": sum(part.nbytes for part in self._host),
            "index": self._landmarks.nbytes + self._recent.nbytes,
        }

    def reads(self, tokens: int) -> dict[str, int]:
        """The static tokens and all representatives from the device, the chosen blocks from the host."""
        token = sum(part.nbytes // (part.shape[0] * part.shape[1] * part.shape[2]) for part in self._ring)
        started, init, local = (part.tolist() for part in self._rows.cpu().unbind(1))
        rows = lengths_at(self._clock.positions, tokens).tolist()
        device = host = 0
        for row, budgets in enumerate(self._budget.tolist()):
            own = rows[row]
            blocks = max(own - local[row] - init[row], 0) // self._block * started[row]
            static = own - blocks * self._block
            device += len(budgets) * (static * token + blocks * self._landmarks.shape[3] * self._landmarks.itemsize)
            chosen = (min(max(budget - static, 0) // self._block, blocks) for budget in budgets)
            host += sum(chosen) * self._block * token
        return {"device": device, "host": host}

    def changed(self) -> Sequence[Tensor]:
        """Nothing: a repeated step writes the same token over the same one, which is no longer attended to."""
        return []


def _put(target: Tensor, rows: slice | Tensor, slots: Tensor, tokens: Tensor) -> None:
    """Write `tokens` [b, G, t, d] to `slots` [t] of the target's `rows`."""
    spread = target[rows]
    spread[:, :, slots] = tokens
    target[rows] = spread
