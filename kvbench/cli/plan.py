"""What `--dry-run` prints: the runs, and the time and memory that they are estimated to take."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kvbench.cli.common import err, out, seconds

if TYPE_CHECKING:
    import torch

    from kvbench.runs.estimate import Estimate


def print_estimates(
    found: Sequence[Estimate], names: Mapping[str, str], device: torch.device, as_json: bool,
    planned: Sequence[dict[str, Any]] | None = None,
) -> None:  # fmt: skip
    """Print estimates, in a table or as JSON; `names` by the configurations' hashes."""
    from kvbench.runs.estimate import total_memory  # noqa: PLC0415
    from kvbench.runs.memory import capacity  # noqa: PLC0415

    whole = sum(one.seconds for one in found)
    if as_json:
        document = {
            "schema": 1, "planned": list(planned or [one.config.model_dump(mode="json") for one in found]),
            "estimates": [one.document() for one in found], "seconds": whole,
        }  # fmt: skip
        print(json.dumps(document, indent=2))
        return
    for one in found:
        took = "its own work not measured" if one.unmeasured else f"step {seconds(one.step_s, 1000)} ms"
        at_once = f" in batches of {one.batch}" if one.batch > 1 else ""
        out.print(
            f"{names[one.config.hash]}: about {duration(one.seconds)}, {one.bytes / 2**30:.2f} GiB "
            f"({one.config.examples} examples{at_once}, each prompt {seconds(one.prompt_s)} s, {took}, answer "
            f"{one.tokens:.0f} tokens)",
            highlight=False, soft_wrap=True,
        )  # fmt: skip
    for reason in dict.fromkeys(one.unmeasured for one in found if one.unmeasured):
        err.print(f"Not measured: {reason}", style="yellow", highlight=False, markup=False, soft_wrap=True)
    if short := total_memory(found, capacity(device)):
        err.print(f"Warning: {short}", style="yellow", highlight=False, markup=False, soft_wrap=True)
    reached = max(one.measured_tokens for one in found)
    examples = sorted({one.config.examples for one in found})
    told = f"{examples[0]}" if len(examples) == 1 else f"{examples[0]} to {examples[-1]}"
    out.print(
        f"{len(found)} runs of {told} examples; nothing was run. Estimated: about {duration(whole)} in all, by prompts "
        f"of up to {reached} tokens and a few steps measured here and carried on to the lengths asked for. First uses "
        "(checks of model and policies, compilation) come on top.", style="dim", highlight=False, soft_wrap=True,
    )  # fmt: skip


def duration(left: float) -> str:
    """Seconds in a unit that fits."""
    return f"{left:.0f} s" if left < 90 else f"{left / 60:.0f} min" if left < 5400 else f"{left / 3600:.1f} h"
