"""The model's rotary embedding as tables, for kernels that rotate keys to positions that lie on the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvbench.contract.layer import Layer
from kvbench.contract.step import Clock


@dataclass(frozen=True)
class Angles:
    """A vector x rotated to position p has cos[p, c]·x[c] + sin[p, c]·x[partner[c]] as its channel c.

    `cos` and `sin` float32 [positions, d], scaling included; `partner` int32 [d], a channel itself where none is.
    """

    cos: Tensor
    sin: Tensor
    partner: Tensor


def angles(layer: Layer, positions: int, clock: Clock) -> Angles | None:
    """The tables of a layer's rotary embedding, made once for all layers of one embedding.

    None where it is more than a rotation of pairs of channels.
    """
    device = clock.positions.device
    basis = torch.eye(layer.head_dim, device=device)
    probe = basis[:, None].expand(-1, 2, -1)
    turned = layer.rotate(probe, torch.tensor([1, 1000], device=device))
    key = "angles", positions, *turned.flatten().tolist()
    if key not in clock.shared:
        clock.shared[key] = _tables(layer, positions, turned)
    found: Angles | None = clock.shared[key]
    return found


def _tables(layer: Layer, positions: int, turned: Tensor) -> Angles | None:
    dim, device = layer.head_dim, turned.device
    # row i has the images of channel i
    across = (turned != 0).any(1) & ~torch.eye(dim, dtype=torch.bool, device=device)
    partner = torch.where(across.any(0), across.int().argmax(0), torch.arange(dim, device=device))
    if bool((across.sum(0) > 1).any()) or bool((partner[partner] != torch.arange(dim, device=device)).any()):
        return None
    first = torch.arange(dim, device=device) <= partner  # one of each pair
    places = torch.arange(positions, device=device)
    ones, others = (layer.rotate(half.float().expand(positions, -1), places) for half in (first, ~first))
    alone = partner == torch.arange(dim, device=device)
    cos, sin = torch.where(first, ones, others), torch.where(first, others, ones).masked_fill(alone, 0)
    return Angles(cos.contiguous(), sin.contiguous(), partner.int())
