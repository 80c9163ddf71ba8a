"""How comparisons word numbers, sizes and budgets."""

from __future__ import annotations

from typing import Any


def count(number: object, one: str, more: str = "") -> str:
    """A number of things."""
    return f"{number} {one}" if str(number) == "1" else f"{number} {more or one + 's'}"


def points(value: float) -> str:
    """A difference of fractions in percentage points."""
    text = f"{100 * value:+.1f}".replace("-", "−")
    return "0.0" if text in ("+0.0", "−0.0") else text


def bytes_text(value: float) -> str:
    """Bytes in the unit that reads best: MiB, or GiB from one on."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value >= size:
            return f"{value / size:.3g} {unit}" if value < 1000 * size else f"{value / size:.0f} {unit}"
    return f"{value:.0f} bytes"


def seconds_text(value: float | None) -> str:
    """Seconds, or milliseconds below one."""
    if value is None:
        return "–"
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.1f} ms"


def budget_text(budget: dict[str, Any] | None, *, options: bool = False) -> str:
    """A budget in words, with its allocator's options where asked; `none` without one."""
    if budget is None:
        return "none"
    if budget.get("ratio") is not None:
        size = f"{100 * budget['ratio']:g}%"
    elif budget.get("tokens") is not None:
        size = f"{budget['tokens']} tokens"
    else:
        size = f"{budget['bytes'] / 2**20:g} MiB"
    given = sorted((budget.get("options") or {}).items()) if options else ()
    told = "".join(f" {key}={value}" for key, value in given)
    every = f", every {budget['compress_every']}" if budget.get("compress_every") else ""
    return (size if budget["allocator"] == "uniform" else f"{size} {budget['allocator']}{told}") + every
