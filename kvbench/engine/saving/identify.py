"""What a saved state belongs to: the model, the policy with its options and code, and the budget."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from kvbench.contract.budget import Budget
from kvbench.contract.errors import KVBenchError
from kvbench.engine.governor import Governor
from kvbench.plugins import registry

SAMPLED = 64
"""Numbers of each weight that a fingerprint looks at, evenly spaced."""
_VOLATILE = ("transformers_version", "dtype", "torch_dtype", "use_cache", "architectures", "output_attentions")


class Model(BaseModel):
    """The model whose keys and values a state holds; `device` is a kind, such as `cpu`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    architecture: str
    fingerprint: str
    device: str


class Code(BaseModel):
    """A plugin with its options and its code, see `kvbench.identity`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    options: dict[str, Any]
    distribution: str | None
    version: str | None
    source: str | None

    @property
    def told(self) -> str:
        """The code in words."""
        return f"{self.distribution or 'no distribution'} {self.version or ''}, source {self.source or 'unreadable'}"


class About(BaseModel):
    """What must agree where a state is loaded; `tokens` and `rows` are the context's."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: Model
    policy: Code
    budget: Budget | None
    allocator: Code | None
    dense_layers: int
    tokens: int
    rows: int


def about(governor: Governor, tokens: int, rows: int) -> About:
    """What a state of this model and policy belongs to."""
    policy, budget = governor.policy, governor.budget if governor.allocator is not None else None
    return About(
        model=Model(
            architecture=type(governor.model).__name__, fingerprint=fingerprint(governor.model),
            device=governor.model.device.type,
        ),
        policy=_code("policy", policy, policy.given),
        budget=budget,
        allocator=None if budget is None else _code("budget", governor.allocator, governor.allocator.options),  # type: ignore[union-attr]
        dense_layers=governor.dense_layers, tokens=tokens, rows=rows,
    )  # fmt: skip


def _code(kind: str, plugin: Any, options: BaseModel) -> Code:
    found = registry().identity_of(kind, type(plugin))
    return Code(name=plugin.name, options=options.model_dump(mode="json"), **found.model_dump())


def check_same(path: object, saved: About, here: About) -> None:
    """Raise KVBenchError where a state belongs to something else than what is here."""
    again = "read the prompt again and save anew"
    if saved.model.architecture != here.model.architecture or saved.model.fingerprint != here.model.fingerprint:
        raise KVBenchError(
            f"{path} was saved from another model ({saved.model.architecture}, {saved.model.fingerprint}) than this "
            f"one ({here.model.architecture}, {here.model.fingerprint}): load it with that model, or {again}."
        )
    if saved.model.device != here.model.device:
        raise KVBenchError(
            f"{path} was saved from a model on {saved.model.device}, and this one is on {here.model.device}, where "
            f"the same state would not be bit-equal: move the model there, or {again}."
        )
    for kind, mine, theirs in (("policy", here.policy, saved.policy), ("budget", here.allocator, saved.allocator)):
        if mine is None or theirs is None:
            continue
        if mine.name != theirs.name:
            raise KVBenchError(
                f"{path} was saved with {kind} '{theirs.name}', and this session has '{mine.name}': attach that, or "
                f"{again}."
            )
        if mine.options != theirs.options:
            names = [name for name in mine.options if mine.options[name] != theirs.options.get(name)]
            name = next(iter(names or theirs.options))
            raise KVBenchError(
                f"{path} was saved with {kind} '{theirs.name}' and {name}={theirs.options.get(name)!r}, and this "
                f"session has {mine.options.get(name)!r}: give the same options, or {again}."
            )
        if (mine.distribution, mine.version, mine.source) != (theirs.distribution, theirs.version, theirs.source):
            raise KVBenchError(
                f"{path} was saved by other code of {kind} '{theirs.name}' ({theirs.told}) than runs here "
                f"({mine.told}): {again}."
            )
    if saved.budget != here.budget:
        raise KVBenchError(
            f"{path} was saved with a budget of {_size(saved.budget)}, and this session has {_size(here.budget)}: give "
            f"the same budget, or {again}."
        )
    if saved.dense_layers != here.dense_layers:
        raise KVBenchError(
            f"{path} was saved with dense_layers={saved.dense_layers}, and this session has {here.dense_layers}: give "
            f"the same, or {again}."
        )


def _size(budget: Budget | None) -> str:
    if budget is None:
        return "everything"
    given = {"tokens": budget.tokens, "ratio": budget.ratio, "bytes": budget.bytes}
    return ", ".join(f"{name}={size}" for name, size in given.items() if size is not None)


def fingerprint(model: Any) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of a model's configuration and of a sample of all its weights.

    Weights that lie nowhere between calls (accelerate's offloading) count with their names and shapes.
    """
    config = {
        name: value for name, value in model.config.to_dict().items()
        if not name.startswith("_") and name not in _VOLATILE
    }  # fmt: skip
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, weight in model.named_parameters():
        digest.update(f"\n{name} {weight.dtype} {list(weight.shape)} ".encode())
        digest.update(_sample(weight.detach()))
    return digest.hexdigest()[:16]


def weights_fingerprint(model: Any) -> str:
    """The same of the weights alone, in bfloat16's precision: whatever type they have, and however it is stretched."""
    digest = hashlib.sha256(type(model).__name__.encode())
    for name, weight in model.named_parameters():
        digest.update(f"\n{name} {list(weight.shape)} ".encode())
        digest.update(_sample(weight.detach(), torch.bfloat16))
    return digest.hexdigest()[:16]


def _sample(weight: Tensor, dtype: torch.dtype | None = None) -> bytes:
    if weight.is_meta or not weight.numel():
        return b""
    places = torch.linspace(0, weight.numel() - 1, SAMPLED, dtype=torch.float64).long().to(weight.device)
    return weight.flatten()[places].to(dtype or weight.dtype).contiguous().view(torch.uint8).cpu().numpy().tobytes()
