"""Double Sparsity (arXiv 2408.07092): score tokens on the few key channels that matter most, held in four bits."""

from collections.abc import Sequence

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from kvbench.contract.layer import Layer
from kvbench.contract.selection import Selection
from kvbench.contract.step import Clock, FixedStep, Part
from kvbench.kernels.insert import insert
from kvbench.strategies.compressing.kivi_storage import pack, unpack
from kvbench.strategies.selecting.aside import TopStep
from kvbench.strategies.selecting.static_set import StaticSetOptions
from kvbench.strategies.selecting.tiers import SelectingPolicy

_LAST = 15
"""The largest code."""


def _encoded(keys: Tensor, channels: Tensor, ranges: Tensor) -> Tensor:
    """Codes, uint8 [B, G, n, c / 2], of the `channels` [B, G, c] of keys [B, G, n, d] by `ranges` [B, G, 2, c]."""
    mine = keys.gather(3, channels[:, :, None].expand(-1, -1, keys.shape[2], -1)).float()
    low, span = ranges[:, :, :1], ranges[:, :, 1:]
    return pack(((mine - low) * (_LAST / span)).round_().clamp_(0, _LAST).to(torch.uint8), 4)


def _label_scores(queries: Tensor, channels: Tensor, ranges: Tensor, codes: Tensor) -> Tensor:
    """Approximate inner products, float32 [B, H, n], of queries [B, H, 1, d], less what is the same for all tokens."""
    batch, groups = channels.shape[:2]
    grouped = queries.reshape(batch, groups, -1, queries.shape[3]).float()
    asked = grouped.gather(3, channels[:, :, None].expand(-1, -1, grouped.shape[2], -1)) * ranges[:, :, 1:]
    return (asked @ unpack(codes, 4).float().transpose(-1, -2)).view(batch, queries.shape[1], -1)


class DoubleSparsity(SelectingPolicy):
    """Attends, per query head, to the tokens of the best scores on a few channels, beside sinks and window.

    The channels of a key/value head are those of the largest mean |q_c| · mean |k_c|; the keys' values in them, the
    labels, are rounded to four bits between the prompt's minimum and maximum of each channel. The paper calibrates the
    channels offline; here the prompt's last queries and its keys do. Later tokens are rounded by the same ranges.
    """

    name = "double_sparsity"
    summary = "Top-k by scores on a few key channels in four bits, per query head; keeps everything on the device."
    reference = "Yang et al., Post-Training Sparse Attention with Double Sparsity, arXiv 2408.07092"
    query_aware = "chooses its channels by the prompt's last queries"
    head_budgets = True

    class Options(StaticSetOptions):
        """Options of Double Sparsity."""

        channels: float = Field(
            0.0625, gt=0, le=1, description="share of the key channels that are scored; two at least"
        )
        calibration: int = Field(64, ge=1, description="last queries of the prompt that choose the channels")

    def __init__(self, options: BaseModel | None = None) -> None:
        super().__init__(options)
        self.query_window = self.options.calibration

    def build(self, layer: Layer, queries: Tensor, keys: Tensor, values: Tensor) -> None:
        """Choose the channels and round the labels."""
        count = min(max(2 * round(self.options.channels * layer.head_dim / 2), 2), layer.head_dim)
        asked = queries.reshape(layer.rows, layer.kv_heads, -1, layer.head_dim).float().abs().mean(2)
        # one head after the other, to spare memory
        weight = asked * torch.stack([own.float().abs().mean(1) for own in keys.unbind(1)], dim=1)
        channels = weight.topk(count, dim=-1).indices.sort(-1).values
        mine = keys.gather(3, channels[:, :, None].expand(-1, -1, keys.shape[2], -1)).float()
        low, high = mine.aminmax(dim=2)
        span = (high - low).clamp_min(torch.finfo(torch.float32).eps)
        layer.state["channels"], layer.state["ranges"] = channels, torch.stack([low, span], dim=2)
        layer.state["codes"] = _encoded(keys, channels, layer.state["ranges"])
        self._count_bytes(layer)

    def grow(self, layer: Layer, keys: Tensor, values: Tensor) -> None:
        """Round the labels of further keys."""
        more = _encoded(keys, layer.state["channels"], layer.state["ranges"])
        layer.state["codes"] = torch.cat([layer.state["codes"], more], dim=2)
        self._count_bytes(layer)

    @staticmethod
    def _count_bytes(layer: Layer) -> None:
        layer.store.index_bytes = sum(part.nbytes for part in layer.state.values())

    def choose(self, layer: Layer, queries: Tensor, wanted: int) -> Selection:
        """Take the best scores on the labels."""
        state = layer.state
        found = _label_scores(queries, state["channels"], state["ranges"], state["codes"])
        # of tokens with equal labels the first, as in a fixed step
        best = found.sort(dim=-1, descending=True, stable=True).indices[..., :wanted]
        return Selection(best + layer.store.aside_start, evaluations=float(found.shape[2]))

    def aside_step(self, parts: Sequence[Part], clock: Clock) -> FixedStep:
        """Labels of all tokens on the device."""
        return _LabelStep(self, parts, clock)


class _LabelStep(TopStep):
    def __init__(self, policy: DoubleSparsity, parts: Sequence[Part], clock: Clock) -> None:
        states, device = [dict(part.layer.state) for part in parts], clock.positions.device
        super().__init__(policy, parts, clock)
        count = states[0]["channels"].shape[2]
        shape = self.batch, self.kv_heads
        self._channels = torch.zeros(*shape, count, dtype=torch.int64, device=device)
        self._ranges = torch.ones(*shape, 2, count, device=device)
        self._codes = torch.zeros(*shape, self.capacity, count // 2, dtype=torch.uint8, device=device)
        self._slot = torch.arange(self.capacity, device=device)
        for part, state in zip(parts, states, strict=True):
            rows = torch.arange(self.batch, device=device) if part.rows is None else part.rows.to(device)
            self._channels[rows], self._ranges[rows] = state["channels"], state["ranges"]
            stop = part.layer.tokens - self.sinks
            known = self.aside_keys[rows, :, :stop]
            self._codes[rows, :, :stop] = _encoded(known, state["channels"], state["ranges"])
            part.layer.state.clear()

    def observe(self, keys: Tensor, values: Tensor) -> None:
        """Round the token's labels; they are looked at once it is set aside."""
        codes = _encoded(keys, self._channels, self._ranges)
        insert(self._codes, self._codes, codes, codes, self._clock.positions - self.sinks)

    def scores(self, queries: Tensor) -> Tensor:
        """Scores on the labels."""
        found = _label_scores(queries, self._channels, self._ranges, self._codes)
        return found.masked_fill_(self._slot >= self.window.aside[:, None, None], -torch.inf)

    def index_bytes(self) -> int:
        """Labels, channels and ranges."""
        return self._codes.nbytes + self._channels.nbytes + self._ranges.nbytes

    def index_reads(self, share: float) -> dict[str, int]:
        """All labels."""
        return {"device": int(self._codes.nbytes * share) + self._channels.nbytes + self._ranges.nbytes, "host": 0}
