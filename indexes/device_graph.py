"""RoarGraph's construction in batched operations, for all graphs of a layer at once, on the device of the keys."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kvbench.indexes.kmeans import kmeans
from kvbench.kernels.cooccur import candidates, lists_of
from kvbench.kernels.occlude import occlude

LISTS = 16
"""Of the lists that a key is in, so many are looked at."""
CANDIDATES = 128
"""Keys that the occlusion test chooses a key's links from, at most."""
CELL = 64
"""Keys in a cell on average, and others of its cell that a key may be linked with."""
FEW = 3
"""Links of a key that is in no query's list."""
ROUNDS = 4
"""Rounds of repair after which what is left is linked from an entry."""


class Graph(NamedTuple):
    """Graphs over n keys: links int32 [S, n, degree], −1 behind, their numbers [S, n], and entries [S, E]."""

    links: Tensor
    lengths: Tensor
    entries: Tensor


def build(keys: Tensor, knn: Tensor, *, degree: int, eager: int, entries: int) -> Graph:
    """Graphs over keys [S, n, d] from the ids int32 [S, m, N_q] of the keys nearest to training queries.

    As `projection.build_by_cooccurrence` and with as good recall, by other means: a key in no list is linked with the
    nearest of its cell of a k-means, not with what a search finds; keys that no search reaches are hung on a reached
    one that they link to. The same input gives the same graphs.
    """
    n = keys.shape[1]
    lists = lists_of(knn, n)
    frequency = lists.frequency
    ids, scores = candidates(lists, LISTS, CANDIDATES)
    unlisted = frequency == 0
    ids[..., :CELL] = torch.where(unlisted[..., None], _cells(keys, CELL), ids[..., :CELL])
    most = torch.where(unlisted, -min(FEW, degree), degree).int()
    links, lengths = occlude(keys, ids, scores, most, degree)
    packed = (frequency.long() << 32) | (n - 1 - torch.arange(n, device=keys.device))
    best = n - 1 - (packed.topk(min(entries, n), dim=-1).values & 0xFFFFFFFF)
    graph = Graph(links, lengths, best.masked_fill(frequency.gather(1, best) == 0, -1).int())
    _link_back(graph, unlisted)
    _repair(graph, eager)
    return graph


def _cells(keys: Tensor, most: int) -> Tensor:
    """For each key at most `most` others of its cell, int32 [S, n, most], −1 elsewhere: a k-means of keys [S, n, d]."""
    n = keys.shape[1]
    cells = max(n // CELL, 1)
    _, assigned = kmeans(keys, cells, 1)
    order = assigned.int().sort(dim=-1, stable=True)
    sizes = torch.zeros(len(keys), cells, dtype=torch.int64, device=keys.device)
    sizes.scatter_add_(1, assigned, torch.ones_like(assigned))
    ends = sizes.cumsum(-1)
    place = torch.empty_like(assigned).scatter_(
        1, order.indices, torch.arange(n, device=keys.device).expand_as(assigned)
    )
    size = sizes.gather(1, assigned)
    begin = ends.gather(1, assigned) - size
    # of a large cell those that stand around the key
    first = (place - most // 2).clamp_min(begin).minimum((begin + size - most).clamp_min(begin))
    around = first.int()[..., None] + torch.arange(most, dtype=torch.int32, device=keys.device)
    members = order.indices.int()
    found = torch.stack([own[where] for own, where in zip(members, around.clamp_max(n - 1), strict=True)])
    own = torch.arange(n, dtype=torch.int32, device=keys.device)[:, None]
    return torch.where((around < (begin + size)[..., None]) & (found != own), found, -1)


def _link_back(graph: Graph, sources: Tensor) -> None:
    """Append, where there is place, the `sources` [S, n] to the links of the keys that they link to."""
    links, lengths = graph.links, graph.lengths
    _, n, degree = links.shape
    flat_links, flat_lengths = links.view(-1, degree), lengths.view(-1)
    nodes = sources.view(-1).nonzero().flatten()
    targets = flat_links[nodes, : min(FEW, degree)].long()
    there = targets >= 0
    targets = (targets + nodes[:, None] // n * n)[there]
    nodes = nodes[:, None].expand(there.shape)[there]
    if not len(nodes):
        return
    order = targets.sort(stable=True)
    rank = _rank(order.values)
    place = flat_lengths[order.values] + rank
    fits = place < degree
    flat_links[order.values[fits], place[fits]] = (nodes[order.indices][fits] % n).int()
    flat_lengths.scatter_add_(0, order.values[fits], torch.ones_like(order.values[fits], dtype=torch.int32))


def _rank(values: Tensor) -> Tensor:
    """Of sorted values [c], how many equal ones stand before each."""
    place = torch.arange(len(values), device=values.device)
    first = torch.ones_like(values, dtype=torch.bool)
    first[1:] = values[1:] != values[:-1]
    return place - torch.where(first, place, 0).cummax(0).values


class _Reached:
    """What an exhaustive search evaluates, as in `beam_search`: by one of the first `eager` links, or by two others."""

    def __init__(self, graph: Graph, eager: int) -> None:
        sets, n, degree = graph.links.shape
        device = graph.links.device
        self._links, self._n = graph.links.view(-1, degree), n
        self.counts = torch.zeros(sets * n, dtype=torch.int32, device=device)
        self.marks = torch.zeros(sets * n, dtype=torch.bool, device=device)
        self._weights = torch.where(torch.arange(degree, device=device) < eager, 2, 1).int()

    def spread(self, nodes: Tensor) -> None:
        """Mark `nodes` [c], numbered over all graphs, and all that is reached from them."""
        nodes = nodes[~self.marks[nodes]]
        self.marks[nodes] = True
        while len(nodes):
            targets = self._links[nodes].long()
            there = targets >= 0
            weights = self._weights.expand(targets.shape)[there]
            targets = (targets + nodes[:, None] // self._n * self._n)[there]
            self.counts.scatter_add_(0, targets, weights)
            # all that are reached and not marked: without sorting the targets, which are as many as links
            nodes = ((self.counts >= 2) & ~self.marks).nonzero().flatten()
            self.marks[nodes] = True


def _repair(graph: Graph, eager: int) -> None:
    """Link the keys that no search reaches from the first reached ones that they link to, so that it reaches all."""
    sets, n, degree = graph.links.shape
    eager = min(eager, degree)
    links, lengths = graph.links.view(-1, degree), graph.lengths.view(-1)
    base = torch.arange(sets, device=links.device)[:, None] * n
    first = graph.entries[:, 0].long() + base[:, 0]
    reached = _Reached(graph, eager)
    reached.spread((graph.entries.long() + base)[graph.entries >= 0])
    turn = 0
    while len(nodes := (~reached.marks).nonzero().flatten()):
        targets = links[nodes].long()
        near = torch.where(targets >= 0, targets + nodes[:, None] // n * n, nodes[:, None])
        marks = reached.marks[near]
        found, at = marks.max(1)
        parents = near.gather(1, at[:, None])[:, 0]
        if turn >= ROUNDS or not bool(found.any()):
            parents = torch.where(found, parents, first[nodes // n])
            found = torch.ones_like(found)
        order = parents[found].sort(stable=True)
        _hang(links, lengths, order.values, nodes[found][order.indices], eager, n)
        reached.spread(nodes[found])
        turn += 1


def _hang(links: Tensor, lengths: Tensor, parents: Tensor, nodes: Tensor, eager: int, n: int) -> None:
    """Link `nodes` [c] from their reached `parents` [c], which are sorted.

    They take the free places among a parent's first `eager` ones; more of them form a chain, which begins in the last
    of these places and ends at the key that had it.
    """
    rank = _rank(parents)
    place = lengths[parents] + rank
    free = place < eager
    links[parents[free], place[free]] = (nodes[free] % n).int()
    lengths.scatter_add_(0, parents[free], torch.ones_like(parents[free], dtype=torch.int32))
    parents, nodes = parents[~free], nodes[~free]
    if not len(nodes):
        return
    begins = torch.ones_like(nodes, dtype=torch.bool)
    begins[1:] = parents[1:] != parents[:-1]
    displaced = links[parents, eager - 1]
    following = torch.cat([nodes[1:] % n, nodes[:1] % n]).int()
    ends = torch.cat([begins[1:], begins[:1].new_ones(1)])
    own = lengths[nodes].clamp_max(eager - 1)
    links[nodes, own] = torch.where(ends, displaced, following)
    lengths[nodes] = torch.maximum(lengths[nodes], own + 1)
    links[parents[begins], eager - 1] = (nodes[begins] % n).int()


def packed(graph: Graph, spare: int) -> tuple[Tensor, Tensor]:
    """The links one key after another, int32, and where each key's start, int64 [S, n + 1].

    Every key has `spare` free places, −1, up to the degree.
    """
    sets, n, degree = graph.links.shape
    places = (graph.lengths + spare).clamp_max(degree)
    start = torch.zeros(sets, n + 1, dtype=torch.int64, device=places.device)
    start[:, 1:] = places.cumsum(1)
    start[1:] += start[:-1, -1].cumsum(0)[:, None]
    there = torch.arange(degree, device=places.device) < places[..., None]
    return graph.links[there], start
