"""What the conformance checks found."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from kvbench.contract.errors import KVBenchError


@dataclass(frozen=True)
class Check:
    """What one check found: distances are relative, of logits centred over the vocabulary."""

    name: str
    status: Literal["passed", "failed", "skipped"]
    detail: str
    difference: float | None = None
    tolerance: float | None = None


@dataclass(frozen=True)
class Report:
    """What was proven of a model, or of a policy on it, and how long it took."""

    model: str
    policy: str | None
    checks: tuple[Check, ...]
    seconds: float
    padding: bool = True
    """Whether one of the two rows was padded, which some models do not take."""
    tolerance: float = 0.0
    """How far rounding may move logits."""
    remembered: str | None = None
    """When it was found, where that was in another process."""

    @property
    def failure(self) -> str | None:
        """The first failed check in one sentence that names model and policy; None where all is well."""
        failed = next((check for check in self.checks if check.status == "failed"), None)
        if failed is None:
            return None
        detail = " ".join(failed.detail.split())
        if self.policy is None:
            return f"Model {self.model} failed the conformance check '{failed.name}': {detail}."
        if f"'{self.policy}'" in detail:
            return f"{detail} (conformance check on {self.model})."
        return f"Policy '{self.policy}' failed the conformance check '{failed.name}' on {self.model}: {detail}."

    def document(self) -> dict[str, Any]:
        """Plain data for JSON."""
        checks = [asdict(check) for check in self.checks]
        for check in checks:  # JSON has no NaN
            check["difference"] = check["difference"] if math.isfinite(check["difference"] or 0) else None
        return {**asdict(self), "checks": checks, "passed": self.failure is None}

    def require(self) -> None:
        """Raise KVBenchError where a check failed."""
        if self.failure is not None:
            raise KVBenchError(self.failure)
