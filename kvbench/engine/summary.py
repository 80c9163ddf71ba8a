"""What a session did so far, in a few numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING, Any

from kvbench.contract.attended import counts
from kvbench.contract.probe import Probe

if TYPE_CHECKING:
    from kvbench.engine.cache import PolicyCache

_MIB = 2**20


@dataclass(frozen=True)
class SessionSummary:
    """A session's latest context: its tokens, what is held of it, and what its steps attended to.

    `tokens`: `prompt` and `generated` ones, padding included. `bytes`: `resident`, `offloaded` and `index`, now.
    `attended_tokens` and `density` (their share of the context): means over all steps where probe `density` is
    attached, else the latest step's; None before the first step, and in steps of fixed shapes without the probe.
    `recall_at_k` and all else in `probes` where such probes are attached.
    """

    policy: str
    tokens: Mapping[str, int]
    bytes: Mapping[str, int]
    attended_tokens: float | None
    density: float | None
    recall_at_k: float | None
    probes: Mapping[str, Any] = field(default_factory=dict)

    def lines(self) -> list[tuple[str, str]]:
        """Labels and values as texts."""
        shown = [
            ("prompt tokens", str(self.tokens["prompt"])),
            ("generated tokens", str(self.tokens["generated"])),
            *((f"{tier} bytes", f"{size / _MIB:.1f} MiB") for tier, size in self.bytes.items()),
            ("attended tokens", "–" if self.attended_tokens is None else f"{self.attended_tokens:.1f}"),
            ("density", "–" if self.density is None else f"{100 * self.density:.1f}%"),
            ("recall@k", self._recall()),
        ]
        known = {"attended_tokens", "density", "recall_at_k"}
        more = {name: value for name, value in self.probes.items() if name not in known}
        numbers = {name: f"{value:.4g}" if isinstance(value, float) else str(value) for name, value in more.items()}
        return [*shown, *((name.replace("_", " "), text) for name, text in numbers.items())]

    def _recall(self) -> str:
        if self.recall_at_k is not None:
            return f"{100 * self.recall_at_k:.1f}%"
        return "–" if "recall_at_k" in self.probes else "not probed"

    def __str__(self) -> str:
        lines = self.lines()
        width = max(len(label) for label, _ in lines)
        return "\n".join([f"policy {self.policy}", *(f"{label:<{width}}  {text}" for label, text in lines)])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        rows = "".join(
            f'<tr><td style="text-align:left">{escape(label)}</td><td>{escape(text)}</td></tr>'
            for label, text in self.lines()
        )
        caption = f'<caption style="text-align:left;caption-side:top">policy {escape(self.policy)}</caption>'
        return f"<table>{caption}{rows}</table>"


def summarise(
    policy: str, probes: Sequence[Probe], cache: PolicyCache | None, fixed: tuple[int, dict[str, int]] | None
) -> SessionSummary:
    """Sum up a session's latest context; all zero before it has one.

    `fixed` are the steps of fixed shapes that followed the prompt, and the bytes that they hold.
    """
    measured = {name: value for probe in probes for name, value in probe.result().items()}
    found: tuple[float | None, float | None] = (None, None)
    tokens, held = {"prompt": 0, "generated": 0}, {"resident": 0, "offloaded": 0, "index": 0}
    if cache is not None:
        seen = max((layer.seen for layer in cache.governed), default=0)
        prompt = seen if cache.prompt_tokens is None else min(cache.prompt_tokens, seen)
        tokens = {"prompt": prompt, "generated": seen - prompt}
        if fixed is not None:
            tokens["generated"], held = tokens["generated"] + fixed[0], fixed[1]
        else:
            found, held = _latest_step(cache), cache.bytes()
    return SessionSummary(
        policy, tokens, held, measured.get("attended_tokens", found[0]), measured.get("density", found[1]),
        measured.get("recall_at_k"), measured,
    )  # fmt: skip


def _latest_step(cache: PolicyCache) -> tuple[float | None, float | None]:
    """Tokens attended at the latest step, on average over rows, heads and full-attention layers, and their share."""
    attended: list[float] = []
    shares: list[float] = []
    for cached in cache.governed:
        for layer in cached.by_lane:
            if layer.selection is None:
                return None, None
            mean = float(counts(layer, layer.selection).sum(-1).double().mean())
            attended += [mean] * layer.rows
            shares += [mean / layer.tokens] * layer.rows
            if layer.ungoverned and layer.ordinal == layer.count - 1:
                attended += [float(layer.tokens)] * (layer.ungoverned * layer.rows)
                shares += [1.0] * (layer.ungoverned * layer.rows)
    return (sum(attended) / len(attended), sum(shares) / len(shares)) if attended else (None, None)
