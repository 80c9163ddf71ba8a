"""The model's rotary embedding as tables, for kernels that rotate to positions that lie on the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kvbench.contract.layer import Layer
from kvbench.contract.step import Clock


@dataclass(frozen=True)
class Pairs:
    """The channels that a rotary embedding rotates in pairs.

    `partner` int32 [d], a channel itself where it is `alone`; `first` bool [d], one of each pair, and the others, as
    ones in `halves` [2, 1, d]; `probe`: what tells the embedding from others.
    """

    partner: Tensor
    alone: Tensor
    first: Tensor
    halves: Tensor
    probe: tuple[float, ...]

    def factors(self, turn: Callable[[Tensor], Tensor], count: int) -> tuple[Tensor, Tensor]:
        """What `turn`, which rotates vectors [2, count, d], multiplies with: `cos` and `sin` of `Angles`."""
        ones, others = turn(self.halves.expand(-1, count, -1))
        return torch.where(self.first, ones, others), torch.where(self.first, others, ones).masked_fill(self.alone, 0)


@dataclass(frozen=True)
class Angles:
    """A vector x rotated to position p has cos[p, c]·x[c] + sin[p, c]·x[partner[c]] as its channel c.

    `cos` and `sin` float32 [positions, d], scaling included; `partner` as in `Pairs`.
    """

    cos: Tensor
    sin: Tensor
    partner: Tensor


def pairs(layer: Layer, device: torch.device) -> Pairs | None:
    """The pairs of a layer's rotary embedding; None where it does more than rotate pairs of channels."""
    dim = layer.head_dim
    probe = torch.eye(dim, device=device)[:, None].expand(-1, 2, -1)
    turned = layer.rotate(probe, torch.tensor([1, 1000], device=device))
    channel = torch.arange(dim, device=device)
    # row i has the images of channel i
    across = (turned != 0).any(1) & (channel[:, None] != channel)
    partner = torch.where(across.any(0), across.int().argmax(0), channel)
    if bool((across.sum(0) > 1).any()) or bool((partner[partner] != channel).any()):
        return None
    first = channel <= partner
    halves = torch.stack([first, ~first]).float()[:, None]
    return Pairs(partner.int(), partner == channel, first, halves, tuple(turned.flatten().tolist()))


def angles(layer: Layer, positions: int, clock: Clock) -> Angles | None:
    """The tables of a layer's rotary embedding, made once for all layers of one embedding; None as for `pairs`."""
    device = clock.positions.device
    found = pairs(layer, device)
    if found is None:
        return None
    key = "angles", positions, *found.probe
    if key not in clock.shared:
        places = torch.arange(positions, device=device)
        cos, sin = found.factors(lambda x: layer.rotate(x, places), positions)
        clock.shared[key] = Angles(cos.contiguous(), sin.contiguous(), found.partner)
    made: Angles = clock.shared[key]
    return made
