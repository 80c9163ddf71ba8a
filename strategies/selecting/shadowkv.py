"""ShadowKV (arXiv 2410.21465): low-rank keys on the device, values on the host, chunks found by their mean keys."""

from collections.abc import Callable, Sequence

import torch
from pydantic import Field
from torch import Tensor

from kvbench.contract.budget import LayerBudget
from kvbench.contract.extension import Options
from kvbench.contract.host import host_empty
from kvbench.contract.layer import Layer
from kvbench.contract.policy import KVCachePolicy, ModelView
from kvbench.contract.selection import Selection
from kvbench.contract.step import Clock, FixedStep, Part, lengths_at
from kvbench.contract.storage import Storage, pick
from kvbench.kernels.attention import Segment, attend
from kvbench.kernels.insert import insert
from kvbench.kernels.low_rank import LowRankKeys, rebuild
from kvbench.kernels.score import scores
from kvbench.kernels.select import select_top
from kvbench.kernels.steps import GrowingStep, HeldStep
from kvbench.kernels.weights import group_weights
from kvbench.strategies.selecting.rotations import Angles, angles


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

    def hand_over(self, held: LowRankKeys, values: Tensor | None, rows: slice | Tensor) -> Tensor:
        """Copy everything into the `rows` of structures of fixed shapes; gives the values' own memory or `values`."""
        for target, own in (
            (held.coefficients, self._coefficients), (held.exact, self._exact), (held.rank, self._place)
        ):  # fmt: skip
            place = rows, *(slice(0, size) for size in own.shape[1:])
            target[place] = own
        held.basis[rows, :, : self._basis.shape[2]] = self._basis
        held.across[rows, :, : self._basis.shape[2]] = self._basis[..., held.partner.long()]
        if values is None:
            return self._values
        values[rows if isinstance(rows, slice) else rows.to(values.device), :, : self.length] = self._values
        return values

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Tokens, rank and tokens kept exact."""
        return self.length, self._basis.shape[2], self._exact.shape[2]

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

    def begin(self, model: ModelView) -> None:
        """Refuse a model whose keys cannot be had before rotation, before it computes anything."""
        model.require_rotary()

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

    def fixed_step(self, parts: Sequence[Part], clock: Clock) -> FixedStep | None:
        """Keys rebuilt and values fetched by a kernel; None for a rotary embedding that is not one of pairs."""
        known = [part.layer for part in parts if "landmarks" in part.layer.state]
        if not known:
            return GrowingStep(parts, clock)
        turned = angles(known[0], max(layer.store.aside_stop for layer in known), clock)
        return None if turned is None else ShadowStep(parts, clock, turned, self.options.chunk_size)

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


class _Room:
    """How many chunks each row and head may attend to at a step: the same for all layers of one budget.

    After `update`: `static` int32 [B], static tokens before the step's own; `lengths` int32 [B] with it; `outliers`
    int32 [B] and `counts` int32 [B, G], chunks with the outliers; `tokens` int32 [B, G], tokens in them.
    """

    static: Tensor
    lengths: Tensor
    outliers: Tensor
    counts: Tensor
    tokens: Tensor

    def __init__(self, positions: Tensor, rows: Tensor, heads: Tensor, chunk: int) -> None:
        """`rows` int32 [B, 3]: tokens set aside, outliers and the smallest head's budget; `heads` int32 [B, G]."""
        self._positions, self._heads, self._chunk = positions, heads, chunk
        self._aside, self._odd, self._least = rows.unbind(1)

    def update(self) -> None:
        """Look at the step's positions; the step's own token is static."""
        self.static = self._positions - self._aside
        self.lengths = self.static + 1
        self.outliers = ((self._least - self.lengths).clamp_min(0) // self._chunk).minimum(self._odd)
        left = self._heads - (self.lengths + self.outliers * self._chunk)[:, None]
        self.counts = torch.where(
            self._aside[:, None] > 0, self.outliers[:, None] + left.clamp_min(0) // self._chunk, 0
        ).int()  # fmt: skip
        self.tokens = self.counts * self._chunk


class ShadowStep(HeldStep):
    """ShadowKV's step in fixed shapes: one kernel rebuilds the chosen chunks' keys and fetches their values."""

    def __init__(self, parts: Sequence[Part], clock: Clock, turned: Angles, chunk: int) -> None:
        layer, device = parts[0].layer, clock.positions.device
        known = [part for part in parts if "landmarks" in part.layer.state]
        sizes = []
        for part in known:
            assert isinstance(part.layer.store.aside, _LowRankKeys)
            sizes.append(part.layer.store.aside.sizes)
        tokens, rank, exact = (max(size) for size in zip(*sizes, strict=True))
        sample, values = layer.store.static_parts()[0][:2]
        groups, dim, wide = layer.kv_heads, layer.head_dim, values.shape[3]
        batch, chunks = clock.batch, tokens // chunk
        self._clock, self._groups, self._chunk = clock, groups, chunk
        super().__init__(parts, clock, clock.new_tokens)
        basis = sample.new_zeros(batch, groups, rank, dim)
        self._low = LowRankKeys(
            sample.new_zeros(batch, tokens, rank), basis, torch.zeros_like(basis),
            turned.cos, turned.sin, turned.partner,
            torch.full((batch, groups, chunks), -1, dtype=torch.int32, device=device),
            sample.new_zeros(batch, groups, exact, dim), chunk,
        )  # fmt: skip
        self._landmarks = sample.new_zeros(batch, groups, chunks, dim)
        rows = torch.zeros(batch, 3, dtype=torch.int32)
        self._budget = torch.zeros(batch, groups, dtype=torch.int32, device=device)
        whole = len(known) == 1 and known[0].rows is None
        self._host = values.new_empty(0) if whole else host_empty((batch, groups, tokens, wide), values.dtype, device)
        most = 1
        for part in known:
            own, store = part.layer, part.layer.store
            where = slice(None) if part.rows is None else part.rows.to(device)
            assert isinstance(store.aside, _LowRankKeys)
            self._host = store.aside.hand_over(self._low, None if whole else self._host, where)
            marks = own.state["landmarks"]
            self._landmarks[where, :, : marks.shape[2]] = marks
            facts = store.aside_stop, own.state["outliers"].shape[2], own.budget.least
            rows[slice(None) if part.rows is None else part.rows.cpu()] = torch.tensor(facts, dtype=torch.int32)
            self._budget[where] = torch.as_tensor(
                own.budget.tokens if own.budget.heads is None else own.budget.heads
            ).to(self._budget)
            most = max(most, min((own.budget.most - own.static[1]) // chunk, marks.shape[2]))
            store.release_aside()
            own.state.clear()
        self._most, self._known = most, rows[:, 0].to(device)
        self._positions = clock.positions
        self._chunks = (rows[:, 0] // chunk).to(device)
        key = ("shadowkv", chunk, *rows.flatten().tolist(), *self._budget.flatten().tolist())
        self._leads = key not in clock.shared
        if self._leads:
            clock.shared[key] = _Room(clock.positions, rows.to(device), self._budget, chunk)
        self._room: _Room = clock.shared[key]
        scratch = ("shadowkv", batch, groups, most * chunk, dim, wide, sample.dtype)
        if scratch not in clock.shared:  # what one layer rebuilds the next need not keep
            clock.shared[scratch] = [sample.new_zeros(batch, groups, most * chunk, size) for size in (dim, wide)]
        self._keys, self._values = clock.shared[scratch]

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Take the token in, choose chunks, rebuild their keys, and attend."""
        room, held, low = self._room, self.held, self._low
        if self._leads:
            room.update()
        insert(held.keys, held.values, keys, values, room.static)
        logits = scores(queries, self._landmarks, self._chunks, scaling=self.scaling)
        weights = group_weights(logits, self._groups, "max", self._chunks, forced=(low.rank, room.outliers))
        chosen = select_top(weights, room.counts, self._most)
        rebuild(chosen, low, self._host, self._keys, self._values)
        return attend(
            queries, Segment(self._keys, self._values, room.tokens), Segment(held.keys, held.values, room.lengths),
            scaling=self.scaling, dtype=queries.dtype,
        )[0]  # fmt: skip

    def bytes(self) -> dict[str, int]:
        """Low-rank keys, exact keys and static tokens on the device; values on the host; landmarks."""
        low = (self._low.coefficients, self._low.basis, self._low.across, self._low.exact, self._low.rank)
        resident = self.held.nbytes + sum(part.nbytes for part in low)
        return {"resident": resident, "offloaded": self._host.nbytes, "index": self._landmarks.nbytes}

    def reads(self, tokens: int) -> dict[str, int]:
        """Static tokens, landmarks, the chosen tokens' coefficients and values, and the basis."""
        known, low = float(self._known.float().mean()), self._low
        fresh = lengths_at(self._positions, tokens) - self._known
        row = low.coefficients.element_size()
        static = int((tokens - known) * (self.held.nbytes // self.held.keys.shape[2]))
        chosen = (self._budget - fresh[:, None]).clamp_min(0).minimum(self._known[:, None]).sum()
        marks = int(self._landmarks.nbytes * known / max(low.coefficients.shape[1], 1))
        device = static + marks + low.basis.nbytes + int(chosen) * low.coefficients.shape[2] * row
        return {"device": device, "host": int(chosen) * self._host.shape[3] * self._host.element_size()}

    def changed(self) -> Sequence[Tensor]:
        """Nothing: a repeated step writes the same token to the same place."""
        return []
