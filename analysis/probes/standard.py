"""Probes that any run can switch on: recall, recovered attention mass, density, output error."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Generator, Sequence
from statistics import median
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from kvbench.analysis.probes.context import ContextProbe
from kvbench.contract.attention import Attention, softmax_parts
from kvbench.contract.budget import LayerBudget
from kvbench.contract.extension import Options
from kvbench.contract.layer import Layer
from kvbench.contract.markers import hookimpl
from kvbench.contract.probe import Probe, StepTrace
from kvbench.contract.selection import Selection

SINKS = 4
"""First tokens that count as sinks where a metric leaves the sinks out, the same for every policy."""

TOLERANCE = 1e-6
"""Tokens beyond a budget that are rounding of means."""

Wrapper = Generator[None, Any, Any]

_ATTENDED, _FIRST = "kvbench.analysis.attended", "kvbench.analysis.first"
MOST_WAITING = 4096
"""Values that stay on the device at most before they are read."""
_PARTS = ("retrieval_s", "attention_s", "insertion_s")


class _Means:
    """Means of named quantities over every row, head, layer and step, and for a batch of one their trace.

    What is added stays on its device until it is read, or there is much of it: a step waits for no number.
    """

    def __init__(self) -> None:
        self._sums: dict[str, float] = defaultdict(float)
        self._counts: dict[str, int] = defaultdict(int)
        self._trace: dict[str, dict[tuple[int, int], list[float]]] = defaultdict(dict)
        self._waiting: list[tuple[str, Tensor, int]] = []
        self._traced: list[tuple[str, int, int, Tensor]] = []

    def add(self, name: str, layer: Layer, values: Tensor) -> None:
        """Add values [B, H], [B, H, 1] or one for all; NaN where a head has none."""
        self.add_unseen(name, values, 1)
        if layer.rows == 1:
            self._traced.append((name, layer.tokens, layer.number, values.reshape(-1)))

    def add_unseen(self, name: str, values: Tensor, times: int) -> None:
        """Add values for so many layers, which leave no trace."""
        count = values.isfinite().sum()
        self._waiting.append((name, torch.stack([values.nansum(dtype=torch.float64), count.double()]), times))
        if len(self._waiting) >= MOST_WAITING:
            self._settle()

    def result(self) -> dict[str, float | None]:
        self._settle()
        return {name: self._sums[name] / self._counts[name] for name in self._sums if self._counts[name]}

    def trace(self) -> dict[str, dict[tuple[int, int], list[float]]]:
        """Every quantity by step and layer."""
        self._settle()
        return self._trace

    def _settle(self) -> None:
        waiting, self._waiting = self._waiting, []
        for (name, _, times), (total, count) in zip(waiting, _numbers([pair for _, pair, _ in waiting]), strict=True):
            self._sums[name] += times * total
            self._counts[name] += times * int(count)
        traced, self._traced = self._traced, []
        for (name, tokens, number, _), found in zip(traced, _numbers([one for *_, one in traced]), strict=True):
            self._trace[name][tokens, number] = found


def _numbers(tensors: Sequence[Tensor]) -> list[list[float]]:
    """What tensors [m] hold, read from each device once for all of one length and type."""
    alike: dict[Any, list[int]] = defaultdict(list)
    for place, tensor in enumerate(tensors):
        alike[tensor.device, tensor.dtype, len(tensor)].append(place)
    found: list[list[float]] = [[] for _ in tensors]
    for places in alike.values():
        for place, values in zip(places, torch.stack([tensors[place] for place in places]).tolist(), strict=True):
            found[place] = values
    return found


class MeasuringProbe(ContextProbe):
    """A probe of quantities per row, head, layer and step."""

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self._means = _Means()

    def result(self) -> dict[str, float | None]:
        """Every quantity, averaged over steps, layers and heads."""
        return self._means.result()

    def trace(self) -> StepTrace:
        """Every quantity by step, layer and head; the steps of a batch of several rows are not kept."""
        return {name: dict[tuple[int, int], Sequence[float]](steps) for name, steps in self._means.trace().items()}


class Recall(MeasuringProbe):
    """Recall@k of the policy's choice against the exact top-k by inner product, and the share of keys it scanned.

    Over the tokens that the policy chooses from (neither sinks nor window), per query head; k is the smaller of the
    option `k` and the number that the head's budget lets it choose, so that exact search scores 1. Heads whose budget
    leaves no choice are left out.
    """

    name = "recall"
    summary = "Recall@k of the attended tokens against the exact top-k by q·k, and the scanned fraction."

    class Options(Options):
        """Options of the recall probe."""

        k: int = Field(100, ge=1, description="size of the exact top-k")

    def select(self, layer: Layer, queries: Tensor, budget: LayerBudget) -> Wrapper:
        """Compare the selection with the exact top-k."""
        selection: Selection = yield
        step = self.step(layer, queries, selection)
        k = min(self.options.k, step.wanted)
        if k:
            masked = step.logits.masked_fill(~step.candidates, -torch.inf)
            best = masked.topk(k, dim=-1).indices
            hits = step.attended.gather(2, best)
            own = torch.full(hits.shape[:2], k) if step.counts is None else step.counts.clamp_max(k)
            own = own.to(hits.device)[..., None]
            hits = hits & (torch.arange(k, device=hits.device) < own)
            self._means.add("recall_at_k", layer, hits.sum(-1).double() / own.squeeze(-1))
        if selection.evaluations is not None:
            scanned = torch.as_tensor(selection.evaluations, dtype=torch.float64) / max(int(step.candidates.sum()), 1)
            self._means.add("scanned_fraction", layer, scanned)
        return selection

    def result(self) -> dict[str, float | None]:
        """`recall_at_k` and, for policies that search, `scanned_fraction`."""
        return {"recall_at_k": None, **self._means.result()}


class Recovery(MeasuringProbe):
    """Share of exact attention's mass on the tokens attended, and on as many tokens chosen in two other ways.

    For the c tokens that a head attends to at a step: `recovered_mass`; the most that any c tokens hold,
    `dynamic_mass` (the exact top-c of this step); and what the first step's exact top-c holds when it is used again,
    `static_mass`. Each also with the first four tokens left out, of the mass and of the count (arXiv 2409.10516).
    """

    name = "recovery"
    summary = "Recovered attention mass of the attended tokens, of the exact top and of the first step's, ± sinks."
    reference = "Liu et al., RetrievalAttention, arXiv 2409.10516"

    def select(self, layer: Layer, queries: Tensor, budget: LayerBudget) -> Wrapper:
        """Sum the exact weights of the attended tokens, of the largest, and of the first step's largest."""
        selection: Selection = yield
        step = self.step(layer, queries, selection)
        weights = step.weights
        if _FIRST not in layer.state:  # in order, once for all steps
            layer.state[_FIRST] = [_order(weights[..., sinks:]) for sinks in (0, SINKS)]
        for first, (name, sinks) in zip(layer.state[_FIRST], (("", 0), ("_without_sinks", SINKS)), strict=True):
            rest, attended = weights[..., sinks:], step.attended[..., sinks:]
            total = rest.sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
            count = attended.sum(-1, keepdim=True)
            self._means.add(f"recovered_mass{name}", layer, (rest * attended).sum(-1) / total)
            largest = rest.sort(dim=-1, descending=True).values
            self._means.add(f"dynamic_mass{name}", layer, _of_first(largest, count) / total)
            self._means.add(f"static_mass{name}", layer, _of_first(rest.gather(-1, first), count) / total)
        return selection


def _order(ranking: Tensor) -> Tensor:
    """The places [B, H, n] of values [B, H, n], the largest first, the earlier one of equals."""
    return ranking.sort(dim=-1, descending=True, stable=True).indices


def _of_first(weights: Tensor, count: Tensor) -> Tensor:
    """Sum [B, H] of the first `count` [B, H, 1] of the weights [B, H, m]."""
    return (weights * (torch.arange(weights.shape[-1], device=weights.device) < count)).sum(-1)


class Density(MeasuringProbe):
    """Tokens attended at a step, and their share of the context, as realised.

    Full-attention layers that the policy leaves exact attend to everything, and count.
    """

    name = "density"
    summary = "Tokens attended at a step and their share of the context, as realised."

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self._beyond: dict[int, list[tuple[Tensor, float]]] = defaultdict(list)
        """By tokens of the context, for each layer: tokens attended and those allowed."""

    def select(self, layer: Layer, queries: Tensor, budget: LayerBudget) -> Wrapper:
        """Count the attended tokens."""
        selection: Selection = yield
        attended = self.step(layer, queries, selection).attended.sum(-1)
        self._means.add("attended_tokens", layer, attended)
        self._means.add("density", layer, attended.double() / layer.tokens)
        if layer.ungoverned and layer.ordinal == layer.count - 1:
            everything = torch.full_like(attended, layer.tokens)
            self._means.add_unseen("attended_tokens", everything, layer.ungoverned)
            self._means.add_unseen("density", everything.double() / layer.tokens, layer.ungoverned)
        allowed = None if layer.most_attended is None else layer.most_attended(layer)
        if allowed is not None:
            self._beyond[layer.tokens].append((attended.double().mean()[None], float(allowed)))
        return selection

    def result(self) -> dict[str, float | None]:
        """Besides the means, the step that went farthest beyond what the policy's budget allows, over all layers.

        `tokens_beyond_budget` are its tokens per layer and head beyond `KVCachePolicy.most_attended`, 0 where it stayed
        within, and `most_attended_tokens` all of its tokens.
        """
        means = iter(_numbers([mean for found in self._beyond.values() for mean, _ in found]))
        pairs = [[(next(means)[0], allowed) for _, allowed in found] for found in self._beyond.values()]
        steps = [[sum(part) / len(found) for part in zip(*found, strict=True)] for found in pairs]
        if not steps:
            return super().result()
        attended, allowed = max(steps, key=lambda step: step[0] - step[1])
        beyond = attended - allowed
        return {
            **super().result(),
            "tokens_beyond_budget": beyond if beyond > TOLERANCE else 0.0,
            "most_attended_tokens": attended,
        }


class OutputError(MeasuringProbe):
    """Relative L2 distance of the policy's attention output from exact attention's."""

    name = "output_error"
    summary = "Relative L2 distance between the policy's attention output and exact attention's."

    def attend(self, layer: Layer, queries: Tensor, selection: Selection) -> Wrapper:
        """Compute the exact output beside the policy's."""
        result: Attention = yield
        step = self.step(layer, queries, selection)
        parts = [(step.logits, self.context(layer).values)]
        exact = softmax_parts(parts, sink_logits=layer.sink_logits).output
        if result.output.shape == exact.shape:
            error = (result.output.float() - exact).norm(dim=-1) / exact.norm(dim=-1).clamp_min(1e-30)
            self._means.add("output_error", layer, error)
        return result


class Sparsity(MeasuringProbe):
    """Fewest tokens of the context whose exact attention weights sum to 90, 95 and 99% of the mass."""

    name = "sparsity"
    summary = "Tokens that exact attention needs for 90, 95 and 99% of its mass."

    def select(self, layer: Layer, queries: Tensor, budget: LayerBudget) -> Wrapper:
        """Count the largest weights up to each share."""
        selection: Selection = yield
        weights = self.step(layer, queries, selection).weights
        cumulative = weights.sort(dim=-1, descending=True).values.cumsum(-1)
        for share in (90, 95, 99):
            needed = (cumulative < share / 100 * cumulative[..., -1:]).sum(-1) + 1
            self._means.add(f"tokens_for_{share}", layer, needed)
        return selection


class Overlap(MeasuringProbe):
    """Share of the tokens attended at a step that were attended at the step before, new tokens left out."""

    name = "overlap"
    summary = "Share of the attended tokens that were attended at the step before."

    def select(self, layer: Layer, queries: Tensor, budget: LayerBudget) -> Wrapper:
        """Compare the attended set with the previous step's."""
        selection: Selection = yield
        attended = self.step(layer, queries, selection).attended
        before: Tensor | None = layer.state.get(_ATTENDED)
        if before is not None:
            old = attended[..., : before.shape[-1]]
            shared = (old & before).sum(-1).double() / old.sum(-1).clamp_min(1)
            self._means.add("step_overlap", layer, shared)
        layer.state[_ATTENDED] = attended
        return selection


class Latency(Probe):
    """Seconds inside a policy's `select`, `attend` and `insert` at each step, summed over the layers.

    It runs in a generation of its own and wraps the policy directly, so that no other probe's work is counted. On a
    GPU the clock waits for the device, which costs time of its own between the hooks.
    """

    name = "latency"
    summary = "Time per decoding step inside retrieval (select), attention (attend) and insertion (insert)."
    alone = True

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self._steps: dict[str, dict[int, float]] = {name: defaultdict(float) for name in _PARTS}
        self._trace: dict[str, dict[tuple[int, int], list[float]]] = {name: {} for name in _PARTS}

    def _timed(self, name: str, layer: Layer, on: Tensor) -> Wrapper:
        began = _now(on)
        result = yield
        seconds = _now(on) - began
        self._steps[name][layer.tokens] += seconds
        if layer.rows == 1:
            self._trace[name][layer.tokens, layer.number] = [seconds]
        return result

    @hookimpl(wrapper=True, trylast=True)
    def select(self, layer: Layer, queries: Tensor, budget: LayerBudget) -> Wrapper:
        """Time the policy's choice."""
        return (yield from self._timed("retrieval_s", layer, queries))

    @hookimpl(wrapper=True, trylast=True)
    def attend(self, layer: Layer, queries: Tensor, selection: Selection) -> Wrapper:
        """Time the attention."""
        return (yield from self._timed("attention_s", layer, queries))

    @hookimpl(wrapper=True, trylast=True)
    def insert(self, layer: Layer, keys: Tensor, values: Tensor) -> Wrapper:
        """Time the insertion."""
        return (yield from self._timed("insertion_s", layer, keys))

    def result(self) -> dict[str, float | None]:
        """`retrieval_s`, `attention_s` and `insertion_s`: medians over the steps of their sums over the layers."""
        return {name: median(steps.values()) if steps else None for name, steps in self._steps.items()}

    def trace(self) -> StepTrace:
        """The seconds by step and layer, for a layer's heads together."""
        return {name: dict[tuple[int, int], Sequence[float]](steps) for name, steps in self._trace.items()}


def _now(on: Tensor) -> float:
    if on.is_cuda:
        torch.cuda.synchronize(on.device)
    return time.perf_counter()
