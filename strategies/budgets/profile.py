"""Budgets from a measured profile: layers and heads get tokens as they were found to need them."""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, Field, model_validator
from torch import Tensor

from kvbench.contract.budget import BudgetAllocator, BudgetRequest, PromptLayer, fit
from kvbench.contract.errors import KVBenchError
from kvbench.contract.extension import Options
from kvbench.contract.reading import parse_json, read_bytes, reading

MAKE = (
    "`kvbench capture --layers all --output CAPTURE`, then "
    "`kvbench analyze sparsity --capture CAPTURE --output FOLDER`, which writes FOLDER/sparsity.json"
)


class Profile(BudgetAllocator):
    """Gives layers and heads the shares that mass-maximising budgets have in a measured sparsity profile.

    The profile's `budget_share` is what a head gets when the tokens with the largest attention weights are taken over
    all layers and heads, over what a uniform budget gives it. A key/value head gets the mean of its query heads.
    """

    name = "profile"
    summary = "Layers and heads by measured sparsity, from the file that `kvbench analyze sparsity` writes."

    class Options(Options):
        """Options of the profile."""

        file: str = Field("", description="sparsity.json, as `kvbench analyze sparsity` writes it")
        heads: bool = Field(True, description="share over the heads of a layer too; no: over layers only")
        floor: float = Field(0.2, ge=0, le=1, description="share of the uniform budget that every layer and head keeps")
        sha256: str = Field("", description="hash of the file's content, filled in, so that results name it")

        @model_validator(mode="before")
        @classmethod
        def _hash(cls, values: Any) -> Any:
            if not isinstance(values, dict) or not values.get("file"):
                return values
            content = _read(Path(str(values["file"])).expanduser())
            found = hashlib.sha256(content).hexdigest()
            if values.get("sha256") not in (None, "", found):
                raise KVBenchError(
                    f"{values['file']} has changed since the run was planned (sha256 {found[:12]}…, not "
                    f"{values['sha256'][:12]}…): name the file under which the earlier profile lies."
                )
            return {**values, "sha256": found}

    def __init__(self, options: BaseModel | None = None) -> None:
        super().__init__(options)
        if not self.options.file:
            raise KVBenchError(
                "Budget 'profile' needs a measured profile: give it with --budget-option file=FILE. These make one: "
                f"{MAKE}."
            )
        self.head_wise = self.options.heads
        self._shares = _shares(Path(self.options.file).expanduser())

    def allocate(self, request: BudgetRequest) -> list[int]:
        """Share over the layers by the mean share of their heads."""
        numbers = list(request.numbers) or list(range(request.layers))
        missing = [number for number in numbers if number not in self._shares]
        if missing:
            raise KVBenchError(
                f"{self.options.file} has no share for layer {missing[0]} of the model: capture all layers of this "
                f"model. These make a complete profile: {MAKE}."
            )
        means = [self._floored(sum(self._shares[number]) / len(self._shares[number])) for number in numbers]
        scale = request.beside * request.layers / sum(means)
        wishes = [request.minimum + scale * mean for mean in means]
        return fit(wishes, total=request.total, low=request.minimum, high=request.context)

    def share_heads(self, prompt: PromptLayer, request: BudgetRequest, tokens: int) -> Tensor:
        """Share over a layer's key/value heads by the mean share of their query heads."""
        shares, (rows, groups) = self._shares[prompt.number], prompt.keys.shape[:2]
        if len(shares) != prompt.queries.shape[1]:
            raise KVBenchError(
                f"{self.options.file} has shares of {len(shares)} heads in layer {prompt.number}, and the model "
                f"{prompt.queries.shape[1]} query heads: make a profile of this model, with all heads. These make one: "
                f"{MAKE}."
            )
        each = len(shares) // groups
        means = [self._floored(sum(shares[g * each : (g + 1) * each]) / each) for g in range(groups)]
        scale = (tokens - request.minimum) * groups / sum(means)
        wishes = [request.minimum + scale * mean for mean in means]
        heads = fit(wishes, total=groups * tokens, low=request.minimum, high=request.context)
        return torch.tensor(heads).expand(rows, -1)

    def _floored(self, share: float) -> float:
        floor: float = self.options.floor
        return max(floor + (1 - floor) * share, 1e-9)


def _read(file: Path) -> bytes:
    with reading(lambda reason: f"The profile {file} cannot be read ({reason}). These make one: {MAKE}."):
        return read_bytes(file)


def whole(value: Any) -> int:
    """A layer's or head's number; ValueError for anything else."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{value!r} is no number of a layer or head")
    return value


def _shares(file: Path) -> dict[int, list[float]]:
    """Budget shares by layer, in the order of the query heads."""
    found: dict[int, dict[int, float]] = defaultdict(dict)
    with reading(
        lambda reason: (
            f"{file} is no sparsity profile ({reason}): expected rows with layer, head and budget_share of "
            f"all heads. These make one: {MAKE}."
        )
    ):
        content = parse_json(_read(file), ours=False)
        for row in content["rows"]:
            share = float(row["budget_share"])
            if not 0 <= share < math.inf:
                raise ValueError(f"share {share}")
            found[whole(row["layer"])][whole(row["head"])] = share
        if not found or any(sorted(heads) != list(range(len(heads))) for heads in found.values()):
            raise ValueError("heads are missing")
    return {layer: [heads[head] for head in sorted(heads)] for layer, heads in found.items()}
