"""One layer's decoding step of fixed shapes, as the policy gives it or as its hooks leave no choice."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvbench.contract.errors import KVBenchError
from kvbench.contract.policy import KVCachePolicy
from kvbench.contract.step import Clock, FixedStep, Part
from kvbench.engine.governor import Governor
from kvbench.engine.validation import named, told
from kvbench.kernels.steps import CompressingStep, GrowingStep

_HOOKS = ("insert", "select", "attend")


def policy_step(
    governor: Governor, parts: Sequence[Part], clock: Clock, padding: Tensor | None, number: int
) -> FixedStep | str | None:
    """The step of the layer `number`, or why there is none (None: nothing to say); KVBenchError for other answers."""
    policy = governor.policy
    try:
        found = policy.fixed_step(parts, clock)
    except (KVBenchError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        raise KVBenchError(
            f"{named(policy)} failed in fixed_step at layer {number}: {type(error).__name__}: {error}."
        ) from error
    plain = not any(hasattr(policy, hook) for hook in _HOOKS)
    if found is None and governor.every and plain:
        return CompressingStep(policy, parts, clock)
    if isinstance(found, FixedStep | str):
        return found
    if found is not None:
        raise KVBenchError(
            f"{named(policy)} gave {told(found)} from fixed_step at layer {number}; expected a FixedStep, or a reason "
            "or None where it has none."
        )
    if policy.exact:
        return GrowingStep(parts, clock, padding)
    aside = any(part.layer.store.aside_stop > part.layer.store.aside_start for part in parts)
    return GrowingStep(parts, clock) if plain and not aside else None


def only_some_layers(policy: KVCachePolicy, number: int) -> KVBenchError:
    """The error of a policy that has no step for the layer `number`, and had some for layers before."""
    return KVBenchError(
        f"{named(policy)} gave no step of fixed shapes for layer {number} after it had given some for layers before, "
        "whose tokens they hold: fixed_step must give one for every layer or for none; until then use --decoding eager."
    )
