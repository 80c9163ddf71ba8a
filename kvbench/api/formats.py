"""Numbers as tables show them."""

from __future__ import annotations


def mib(value: float | None) -> str:
    """Bytes in MiB."""
    return "–" if value is None else f"{value / 2**20:.1f}"


def share(value: float | None) -> str:
    """A fraction in percent."""
    return "–" if value is None else f"{100 * value:.1f}%"


def seconds(value: float | None, unit: float = 1) -> str:
    """Seconds, or with `unit` 1000 milliseconds."""
    return "–" if value is None else f"{value * unit:.2f}" if unit == 1 else f"{value * unit:.1f}"


def count(value: float | None) -> str:
    """A number without decimals."""
    return "–" if value is None else f"{value:.0f}"


def figure(value: float | None) -> str:
    """Three significant digits."""
    return "–" if value is None else f"{value:.3g}"
