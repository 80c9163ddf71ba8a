"""CAGRA: a graph of each key's nearest keys, pruned by rank, with links back; built in batched operations."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from kvbench.indexes.graph import rows_of
from kvbench.indexes.vamana import Vamana, VamanaOptions
from kvbench.kernels.detours import by_detours
from kvbench.kernels.top_keys import top_keys


class Cagra(Vamana):
    """CAGRA's graph over the keys, one per key/value head: every key has `degree` links.

    1. The exact `intermediate` nearest keys of each key (Euclidean), best first.
    2. Rank-based pruning: links are put in the order of their detours, the number of links i → k → j whose two ranks
       are both better than that of i → j.
    3. Half of a key's links are its first ones, the other half comes from the keys that link to it, the best ranked
       first; its own next links fill up.

    Searched by inner product, best first, from keys spread evenly. Keys are inserted as in Vamana.
    """

    name: ClassVar[str] = "cagra"
    summary: ClassVar[str] = "CAGRA's graph of nearest keys, built in parallel"
    reference: ClassVar[str] = "Ootomo et al., CAGRA, ICDE 2024 (arXiv:2308.15136)"

    class Options(VamanaOptions):
        """Options of `cagra`."""

        degree: int = Field(32, ge=2, le=4096, description="links per key (d)")
        intermediate: int = Field(64, ge=1, le=4096, description="nearest keys from which a key's links are chosen")
        starts: int = Field(32, ge=1, description="keys where a search enters, spread evenly")

    @property
    def builds_on_device(self) -> bool:
        """All of it."""
        return True

    def _build(self, queries: NDArray[np.float32] | None) -> None:
        keys = np.stack([self.keys.float32(group) for group in range(self.keys.groups)])
        self._build_on(torch.from_numpy(keys), None)

    def _build_on(self, keys: Tensor, queries: Tensor | None) -> None:
        groups, n, _ = keys.shape
        self._encode()
        self._enter()
        links = build(keys, min(int(self.options.intermediate), n - 1), self._degree)
        self.links = links.cpu().numpy().reshape(-1)
        self.start = rows_of(groups, n, self._degree)

    def _enter(self) -> None:
        count = min(int(self.options.starts), self.keys.n)
        spread = np.linspace(0, self.keys.n - 1, count).astype(np.int32)
        self.entries = np.repeat(spread[None], self.keys.groups, axis=0)


def build(keys: Tensor, intermediate: int, degree: int) -> Tensor:
    """Links int32 [G, n, degree], −1 behind them, of keys [G, n, d], on the device of the keys."""
    if not intermediate:
        return torch.full((*keys.shape[:2], degree), -1, dtype=torch.int32, device=keys.device)
    near = nearest_others(keys, intermediate)
    return torch.stack([_with_links_back(graph, degree) for graph in by_detours(near, degree)])


def nearest_others(keys: Tensor, count: int) -> Tensor:
    """The `count` keys nearest to each of keys [G, n, d] (Euclidean), itself apart, best first: int32 [G, n, count]."""
    halves = keys.float().square().sum(-1) / 2
    found = top_keys(keys, keys, count + 1, offsets=halves)
    own = torch.arange(keys.shape[1], dtype=torch.int32, device=keys.device)[:, None]
    itself = found == own
    # of many equal keys a key may not find itself: then the last one goes
    itself[..., -1] |= ~itself.any(-1)
    return found[~itself].view(*found.shape[:2], count)


def _with_links_back(links: Tensor, degree: int) -> Tensor:
    """Half of each key's links [n, c ≤ degree], then the keys that link to it, then its others: int32 [n, degree]."""
    n, c = links.shape
    device = links.device
    half = min(c, -(-degree // 2))
    # edges by target, rank of the link, source
    source = torch.arange(n, device=device)[:, None].expand(n, c).T.reshape(-1)
    target = links.T.reshape(-1).long()
    order = target.sort(stable=True)
    sources, targets = source[order.indices], order.values
    place = torch.arange(len(targets), device=device)
    sizes = torch.zeros(n, dtype=torch.int64, device=device).scatter_add_(0, targets, torch.ones_like(targets))
    place -= (sizes.cumsum(0) - sizes)[targets]
    back = torch.full((n, degree + 1), -1, dtype=torch.int32, device=device)
    back[targets, place.clamp_max(degree)] = sources.int()
    whole = torch.cat([links[:, :half], back[:, :degree], links[:, half:]], dim=1)
    return _first_of_each(whole, degree)


def _first_of_each(ids: Tensor, count: int) -> Tensor:
    """The first `count` different ids of each row [n, c], −1 apart and behind them."""
    ordered = ids.sort(dim=-1, stable=True)
    again = torch.zeros_like(ids, dtype=torch.bool)
    again[:, 1:] = ordered.values[:, 1:] == ordered.values[:, :-1]
    again = torch.zeros_like(again).scatter(1, ordered.indices, again) | (ids < 0)
    order = again.to(torch.uint8).sort(dim=-1, stable=True).indices[:, :count]
    found = ids.gather(1, order).masked_fill(again.gather(1, order), -1)
    return torch.nn.functional.pad(found, (0, count - found.shape[1]), value=-1)
