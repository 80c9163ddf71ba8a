"""A run's configuration, whose hash names its folder."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from kvbench.contract.budget import Budget
from kvbench.contract.reading import parse_json
from kvbench.identity import Identity

SCHEMA = 2
"""Version of a run's folder. Version 1 kept the times in `examples.jsonl`; it is read, and never written to."""
LARGEST = 2**31 - 1
"""Of the numbers that a run is asked for."""
LATER = (
    "dense_layers", "prompt_attention", "decoding", "prefix", "new_tokens", "rope_scaling", "weights", "device_map",
    "probe_tokens",
)  # fmt: skip
"""Fields of a configuration that earlier versions did not have, and whose defaults are what these did."""


class RunConfig(BaseModel):
    """Everything that a run's numbers depend on; its hash names the run's folder."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    model_fingerprint: str
    device: str
    dtype: str
    policy: str
    policy_options: dict[str, Any]
    budget: Budget | None
    task: str
    task_options: dict[str, Any]
    task_data: dict[str, str]
    context_length: int = Field(ge=1, le=LARGEST)
    examples: int = Field(ge=1, le=LARGEST)
    seed: int = Field(ge=-LARGEST, le=LARGEST)
    question: Literal["aware", "agnostic"]
    prefill_chunk: Annotated[int, Field(ge=1, le=LARGEST)] | Literal["auto"] | None
    """Tokens of the prompt computed at a time; `auto`: as many as memory has room for, stated by each example."""
    recall_k: int = Field(ge=1, le=LARGEST)
    probe_examples: int = Field(ge=0, le=LARGEST)
    probe_tokens: Annotated[int, Field(ge=1, le=LARGEST)] | Literal["all"] = "all"
    """Tokens of the answer that an example is given again with probes."""
    probes: tuple[str, ...] = ()
    """Probes beyond the standard ones."""
    batch_size: Annotated[int, Field(ge=1, le=LARGEST)] | Literal["auto"] = 1
    """Examples generated at once; `auto`: as many as memory has room for, stated by each example."""
    share_prefill: bool = False
    dense_layers: int = Field(0, ge=0, le=LARGEST)
    """First full-attention layers that keep everything and attend to it, whatever the policy; beyond the budget."""
    prompt_attention: Literal["exact", "policy"] = "exact"
    """Whose the prompt's attention is: the model's own, or the policy's (`attend_prompt`)."""
    decoding: Literal["auto", "graph", "fixed", "eager"] = "auto"
    prefix: Literal["none", "cached"] = "none"
    """`cached`: each context is read and saved once, and every request about it goes on from there."""
    new_tokens: int = Field(0, ge=0, le=LARGEST)
    """Last tokens of the context that are not part of the cached prefix; the question comes on top."""
    rope_scaling: str | None = None
    """What the model's rotary embedding was stretched by, such as `yarn:4`; part of the fingerprint, too."""
    weights: str | None = None
    """What quantised weights are stored as, such as `fp8`."""
    device_map: Literal["auto"] | None = None
    """Whether accelerate spread the model over devices; the environment says how."""
    plugins: dict[str, Identity] = Field(default_factory=dict)
    """The code of the `policy`, the `budget`'s allocator, the `task` and every `probe NAME`; empty in older runs."""

    @model_validator(mode="after")
    def _text_and_numbers(self) -> RunConfig:
        # What `run.json` can hold and `read` takes: no halves of characters from names of files, no NaN in options.
        parse_json(json.dumps(self.model_dump(mode="json"), allow_nan=False))
        return self

    @property
    def chunk(self) -> int | None:
        """The chunk of a working configuration, in which memory has decided."""
        assert self.prefill_chunk != "auto"
        return self.prefill_chunk

    @property
    def in_batches(self) -> bool:
        """Whether examples may be generated several at once."""
        return self.batch_size != 1

    @property
    def hash(self) -> str:
        """The first 12 hexadecimal digits of the SHA-256 of the configuration and the schema version.

        Fields that came later count only where they differ from what earlier versions did.
        """
        left_out = {name for name in LATER if getattr(self, name) == RunConfig.model_fields[name].default}
        fields = self.model_dump(mode="json", exclude=left_out)
        canonical = json.dumps({"schema": SCHEMA, **fields}, sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()[:12]

    @property
    def folder(self) -> str:
        """Name of the run's folder."""
        return f"{self.policy}-{self.task}-{self.context_length}-{self.hash}"
