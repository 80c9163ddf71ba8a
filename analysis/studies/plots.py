"""Plots that several analyses draw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from kvbench import figures

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def with_spread(axis: Axes, groups: Mapping[int, Sequence[float]], look: figures.Style, label: str) -> None:
    """Draw the median of each x's values as a line, and shade their middle half (bars where there is one x only)."""
    xs = [x for x, values in groups.items() if len(values)]
    low, middle, high = np.array([np.quantile(np.array(groups[x]), (0.25, 0.5, 0.75)) for x in xs]).T
    if len(xs) == 1:
        axis.errorbar(xs, middle, yerr=(middle - low, high - middle), color=look.color, linestyle="none", label="_")
    else:
        axis.fill_between(xs, low, high, color=look.color, alpha=0.15, linewidth=0)
    axis.plot(xs, middle, color=look.color, marker=look.marker, linestyle=look.dashes, markersize=4, label=label)


def heat_map(
    figure: Figure, axis: Axes, values: Mapping[tuple[int, int], float], labels: tuple[str, str, str],
    limits: tuple[float | None, float | None] = (None, None),
) -> None:  # fmt: skip
    """Draw values by row and column, numbers of layers or heads; `labels`: of the rows, the columns, the colours."""
    rows, columns = sorted({row for row, _ in values}), sorted({column for _, column in values})
    grid = np.array([[values.get((row, column), np.nan) for column in columns] for row in rows])
    image = axis.imshow(grid, cmap=figures.MAP, aspect="auto", origin="lower", vmin=limits[0], vmax=limits[1])
    axis.set_xticks(*_ticks(columns))
    axis.set_yticks(*_ticks(rows))
    axis.set_ylabel(labels[0])
    axis.set_xlabel(labels[1])
    axis.grid(False)
    figure.colorbar(image, ax=axis, label=labels[2])


def _ticks(numbers: Sequence[int]) -> tuple[list[int], list[str]]:
    step = -(-len(numbers) // 12)
    places = list(range(0, len(numbers), step))
    return places, [str(numbers[place]) for place in places]
