"""Rotary embeddings stretched to contexts beyond a model's own limit."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from kvbench.contract.errors import KVBenchError
from kvbench.contract.reading import plain

LARGEST_FACTOR = 1024


@dataclass(frozen=True)
class RopeScaling:
    """A way to stretch a rotary embedding, and by how much; without a factor, as far as a context needs it."""

    kind: str
    factor: float | None = None

    @property
    def text(self) -> str:
        """As the user gives it: `yarn`, `yarn:4`."""
        if self.factor is None:
            return self.kind
        return (
            f"{self.kind}:{self.factor:g}"
            if float(f"{self.factor:g}") == self.factor
            else f"{self.kind}:{self.factor!r}"
        )


def rope_scaling_named(text: str | None, option: str = "--rope-scaling") -> RopeScaling | None:
    """Read `yarn` or `yarn:FACTOR`; KVBenchError, with the name of the option, for anything else."""
    if text is None:
        return None
    match = re.fullmatch(r"yarn(?::([0-9]+(?:\.[0-9]+)?))?", text.strip())
    factor = float(match[1]) if match and match[1] else None
    if match is None or (factor is not None and not 1 < factor <= LARGEST_FACTOR):
        raise KVBenchError(
            f"{option} {plain(text)} is not known: give yarn, which stretches the model where a context needs it, or "
            f"yarn:FACTOR, such as yarn:4, which stretches it by more than 1 and at most {LARGEST_FACTOR} always."
        )
    return RopeScaling("yarn", factor)


def extend(
    name: str, config: Any, scaling: RopeScaling | None, context_length: int | None
) -> tuple[int | None, RopeScaling | None]:
    """Stretch the rotary embedding of a text configuration in place (YaRN, arXiv:2309.00071).

    Gives the longest context afterwards, in tokens, or None where the model states none, and what was done; None where
    nothing was. Without a factor of its own the scaling is applied where `context_length` is
    beyond the limit. It changes short contexts, too: a model's answers are those of transformers with the same
    configuration. Raises KVBenchError for a model without a plain rotary embedding.
    """
    limit = getattr(config, "max_position_embeddings", None)
    if scaling is None or not limit:
        if scaling is not None and scaling.factor is not None:
            raise KVBenchError(
                f"{name} states no longest context (max_position_embeddings), which {scaling.text} would stretch: "
                "leave --rope-scaling out."
            )
        return limit, None
    if scaling.factor is None:
        if context_length is None or context_length <= limit:
            return limit, None
        longest, factor = context_length, context_length / limit
    else:
        longest, factor = math.floor(limit * scaling.factor + 1e-6), scaling.factor
    rope = getattr(config, "rope_parameters", None)
    if (
        not isinstance(rope, dict)
        or rope.get("rope_type", "default") != "default"
        or any(isinstance(value, dict) for value in rope.values())  # one embedding for each type of layer
    ):
        raise KVBenchError(
            f"{name} cannot be extended from {limit} to {longest} tokens with rope_scaling={scaling.kind}: it has no "
            "plain rotary embedding; choose a shorter context length or another model."
        )
    config.rope_parameters = {
        **rope,
        "rope_type": scaling.kind,
        "factor": factor,
        "original_max_position_embeddings": limit,
    }
    config.max_position_embeddings = longest
    return longest, RopeScaling(scaling.kind, factor)
