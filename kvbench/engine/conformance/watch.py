"""Watches every step of a policy: what it attends to, against its contract and its budget."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Generator
from typing import Any

import torch
from torch import Tensor

from kvbench.contract.attended import attended
from kvbench.contract.attention import Attention
from kvbench.contract.budget import LayerBudget
from kvbench.contract.errors import KVBenchError
from kvbench.contract.layer import Layer
from kvbench.contract.policy import KVCachePolicy
from kvbench.contract.probe import Probe
from kvbench.contract.selection import Selection

Wrapper = Generator[None, Any, Any]


class ConformanceError(KVBenchError):
    """A step that breaks the contract, or a policy's promise; `check` is the check that it fails."""

    def __init__(self, check: str, what: str, layer: Layer, step: int) -> None:
        super().__init__(f"{what}; first at layer {layer.number}, step {step}")
        self.check = check


class Watch(Probe):
    """Raises ConformanceError at the first step that breaks the contract, or what the policy promises.

    With `covering`, every step must attend to everything; otherwise to no more than the policy's `most_attended`.
    `attended`, bool [B, H, n], and `outputs`, float32 [B, H, d], keep what each step of each layer did, by the step's
    number from 1, the layer's number in the model and the rows' tokens of prompt.
    """

    name = "conformance"
    summary = "Holds every step of a policy to the contract and to its budget."

    def __init__(self, policy: KVCachePolicy, *, covering: bool) -> None:
        super().__init__()
        self.policy, self.covering = policy, covering
        self.attended: dict[tuple[int, int, int], Tensor] = {}
        self.outputs: dict[tuple[int, int, int], Tensor] = {}
        self.most = 0
        """The most tokens that a head attended to, averaged over a layer's heads."""
        self._allowed: int | None = 0
        self._shared: dict[tuple[int, int], list[tuple[float, int]]] = defaultdict(list)

    @staticmethod
    def _place(layer: Layer) -> tuple[int, int, int]:
        return layer.tokens - layer.prompt_tokens, layer.number, layer.prompt_tokens

    def select(self, layer: Layer, queries: Tensor, budget: LayerBudget) -> Wrapper:
        """Hold the selection to the contract and count what is attended to."""
        selection: Selection = yield
        place = self._place(layer)
        try:
            found = attended(layer, selection)
        except KVBenchError as error:
            raise ConformanceError("selection", str(error), layer, place[0]) from None
        self.attended[place] = found
        if self.covering and bool(found.all()):
            self.most, self._allowed = max(self.most, layer.tokens), max(self._allowed or 0, layer.tokens)
            return selection
        each = found.sum(-1, dtype=torch.float32)
        most = round(float(each.double().mean(1).max()), 6)  # a mean of equal numbers may exceed them by rounding
        self.most = max(self.most, round(most))
        if self.policy.exact:
            return selection
        if self.covering:
            what = (
                f"with a budget that covers everything it attends to {int(each.min())} of {layer.tokens} tokens; "
                "expected all of them, or a reason in never_exact"
            )
            raise ConformanceError("exact when covering", what, layer, place[0])
        allowed = self.policy.most_attended(layer)
        if allowed is None or self._allowed is None:
            self._allowed = None
        else:
            self._allowed = max(self._allowed, allowed)
        if allowed is not None:
            self._within_budget(layer, most, allowed, place[0])
        return selection

    def _within_budget(self, layer: Layer, most: float, allowed: int, step: int) -> None:
        if not self.policy.across_layers:
            if most > allowed:
                what = f"it attends to {most:g} tokens on average over its heads; expected at most {allowed}"
                raise ConformanceError("budget", what, layer, step)
            return
        shared = self._shared[step, layer.prompt_tokens]
        shared.append((most, allowed))
        tokens, limit = (sum(part) for part in zip(*shared, strict=True))
        if len(shared) == layer.count and tokens > limit:
            what = f"its layers attend to {tokens:g} tokens together; expected at most {limit}"
            raise ConformanceError("budget", what, layer, step)

    def attend(self, layer: Layer, queries: Tensor, selection: Selection) -> Wrapper:
        """Keep the output, and see that it is finite."""
        result: Attention = yield
        step, _, _ = place = self._place(layer)
        self.outputs[place] = result.output[:, :, -1].float()
        if not bool(self.outputs[place].isfinite().all()):
            raise ConformanceError("selection", "attend gave an output that is NaN or infinite", layer, step)
        return result

    def result(self) -> dict[str, Any]:
        """`attended_tokens`: the most that a head attended to, averaged over a layer's heads."""
        return {"attended_tokens": self.most}

    def told(self, size: int) -> str:
        """How many tokens were attended to under a budget of `size` tokens, in words."""
        if self.policy.across_layers:
            return f"the layers together stay within budgets of {size} tokens; one attends to up to {self.most}"
        allowed = "no limit" if self._allowed is None else f"{self._allowed} allowed"
        return f"at most {self.most} tokens attended at a step, {allowed} by a budget of {size}"

    def by_step(self) -> dict[tuple[int, int], Tensor]:
        """Outputs of all rows [B, H, d], longest prompts first, by step and layer, in the order of the model."""
        found: dict[tuple[int, int], list[Tensor]] = defaultdict(list)
        for step, number, _ in sorted(self.outputs, key=lambda place: (place[0], place[1], -place[2])):
            found[step, number].append(self.outputs[step, number, _])
        return {place: torch.cat(parts) for place, parts in found.items()}


def first_difference(one: Watch, other: Watch, tolerance: float) -> str | None:
    """Where two runs first differ by more than a relative `tolerance`, in words; None where they never do."""
    theirs = other.by_step()
    for (step, number), mine in one.by_step().items():
        if (step, number) not in theirs:
            continue  # exact attention takes the tokens of a call together
        error = distance(mine.flatten(1), theirs[step, number].flatten(1))
        if not error <= tolerance:
            return f"first in the attention of layer {number} at step {step}, by {error:.2g} of it"
    return None


def distance(one: Tensor, other: Tensor) -> float:
    """The largest relative L2 distance of rows [..., n], in float64; `other` is the reference."""
    reference = other.double()
    error = (one.double() - reference).norm(dim=-1) / reference.norm(dim=-1).clamp_min(1e-30)
    return float(error.max())
