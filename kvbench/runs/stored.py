"""What the files of a run hold, as far as tables, comparisons and reports rely on it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Count = Annotated[int, Field(strict=True, ge=0)]
Text = Annotated[str, Field(strict=True)]


class _Open(BaseModel):
    model_config = ConfigDict(extra="allow")


class Summary(_Open):
    """A mean with its 95% interval over n examples."""

    mean: Number | None
    ci95: tuple[Number | None, Number | None]
    n: Count


class Metrics(_Open):
    """A run's metrics; those of tasks and probes are summaries or numbers."""

    __pydantic_extra__: dict[str, Summary | Number | dict[str, Number | None] | None]

    accuracy: Summary | None = None
    bytes: dict[str, Number | None] = Field(default_factory=dict)
    ttft_s: dict[str, Number | None] = Field(default_factory=dict)
    tpot_s: dict[str, Number | None] = Field(default_factory=dict)
    mode: Text | None = None
    mode_reason: Text | None = None
    device_tpot_s: dict[str, Number | None] = Field(default_factory=dict)
    device_bytes: dict[str, Number | None] = Field(default_factory=dict)
    device_peak_bytes: dict[str, Number | None] = Field(default_factory=dict)
    batch: dict[str, Number | None] = Field(default_factory=dict)
    prefill_chunk: dict[str, Number | None] = Field(default_factory=dict)
    step_parts_s: dict[str, Number | None] = Field(default_factory=dict)
    prefix: dict[str, Number | None] = Field(default_factory=dict)
    amortised_ttft_s: dict[str, Number | None] = Field(default_factory=dict)
    query_aware: Text | None = None


class Environment(_Open):
    """What a run was measured on."""

    packages: dict[str, Text] = Field(default_factory=dict)
    device_name: Text | None = None
    threads: Count | None = None
    device_map: dict[str, Text] | None = None
    weights: Text | None = None
    commit: dict[str, Text | bool] | None = None
    bandwidth: dict[str, Number] | None = None


class StoredRun(_Open):
    """The parts of `run.json` beside the configuration."""

    environment: Environment
    status: Literal["running", "interrupted", "failed", "complete"]
    metrics: Metrics
    conformance: list[dict[str, Any]] = Field(default_factory=list)


class StoredExample(_Open):
    """A finished example, timings included."""

    id: Text
    score: Number
    scores: dict[str, Number] = Field(default_factory=dict)
    positions: dict[str, list[Number]] = Field(default_factory=dict)
    prediction: Text = ""
    prompt: Text = ""
    references: list[Text] = Field(default_factory=list)
    prompt_tokens: Count = 0
    generated_tokens: Count = 0
    budget_tokens: Count | None = None
    token_bytes: Count = 0
    reused_tokens: Count = 0
    prefill_s: Number = 0
    index_s: Number = 0
    step_s: list[Number] = Field(default_factory=list)
    device_step_s: list[Number] = Field(default_factory=list)
    mode: Literal["graph", "partial", "fixed", "eager"] | None = None
    mode_reason: Text = ""
    capture_s: Number | None = None
    floor_s: Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)] | None = None
    read_bytes: dict[str, Count] = Field(default_factory=dict)
    step_parts_s: dict[str, Number] = Field(default_factory=dict)
    hot_hit_rate: Number | None = None
    batch: Count | None = None
    prefill_chunk: Count | None = None
    out_of_memory: Count = 0
    device_bytes: dict[str, Number] = Field(default_factory=dict)
    device_peak_bytes: dict[str, Number] = Field(default_factory=dict)
    probed_step_s: list[Number] = Field(default_factory=list)
    bytes: dict[str, Number] = Field(default_factory=dict)
    answer_bytes: dict[str, Number] = Field(default_factory=dict)
    held_tokens: list[Number] = Field(default_factory=list)
    peak_memory_bytes: Number | None = None
    probes: dict[str, Number | None] | None = None
    info: dict[str, Any] = Field(default_factory=dict)
    trace: Annotated[str, Field(strict=True, pattern=r"^[^/\\]+/[^/\\]+\.safetensors$")] | None = None
