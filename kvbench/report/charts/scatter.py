"""Points of many policies in one panel: none hidden, labels that cover nothing, the front of the best."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.lines import Line2D
from matplotlib.text import Text

from kvbench import figures

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.backend_bases import RendererBase

MARK = 6.5
"""Room of a mark, points."""
FONT = 6.5
Box = tuple[float, float, float, float]
Place = tuple[float, float]


@dataclass(frozen=True)
class Point:
    """A mark: its place, its interval upwards and downwards, its style, its label, and whether it is hollow."""

    x: float
    y: float
    low: float
    high: float
    look: figures.Style
    label: str
    hollow: bool = False


def front(points: Sequence[Point]) -> list[Point]:
    """The points that no other has at least as high at no larger x (Pareto), from left to right."""
    best, found = -math.inf, []
    for point in sorted(points, key=lambda one: (one.x, -one.y)):
        if point.y > best:
            found.append(point)
            best = point.y
    return found


def scatter(axes: Axes, points: Sequence[Point]) -> None:
    """Draw points with intervals, the step line of their front, and their labels."""
    best = front(points)
    if len(best) > 1:
        axes.step([one.x for one in best], [one.y for one in best], where="post", color=figures.REFERENCE,
                  linewidth=0.8, linestyle=(0, (4, 2)), zorder=1)  # fmt: skip
    for one in points:
        axes.plot([one.x, one.x], [one.low, one.high], color=one.look.color, linewidth=0.7, alpha=0.35, zorder=1.5)
    axes.update_datalim([(one.x, one.y) for one in points])
    axes.add_artist(Marks(axes, [*best, *(one for one in points if one not in best)], len(best)))


class Marks(Artist):
    """Marks and labels, placed when the panel's size is known: marks that would hide one another move apart."""

    def __init__(self, axes: Axes, points: Sequence[Point], first: int) -> None:
        super().__init__()
        self.points, self.first, self.panel = points, first, axes
        self.set_zorder(3)
        self.set_in_layout(False)

    def layout(self, scale: float) -> tuple[list[Place], list[Place], list[Box | None]]:
        """Where marks belong, where they are drawn, and the boxes of the labels that find room, in pixels."""
        frame = self.panel.bbox
        room = (frame.x0, frame.y0, frame.x1, frame.y1)
        true = [(float(x), float(y)) for x, y in
                (self.panel.transData.transform((one.x, one.y)) for one in self.points)]  # fmt: skip
        places = _apart(true, MARK * scale)
        taken: list[Box] = [_around(x, y, 0.5 * MARK * scale) for x, y in places]
        boxes: list[Box | None] = []
        for one, (x, y) in zip(self.points, places, strict=True):
            box = _spot(one.label, x, y, scale, taken, room)
            boxes.append(box)
            if box is not None:
                taken.append(box)
        return true, places, boxes

    def draw(self, renderer: RendererBase) -> None:
        """Place and draw."""
        scale = float(np.asarray(renderer.points_to_pixels(1.0), float))
        true, places, boxes = self.layout(scale)
        for one, here, there in zip(self.points, true, places, strict=True):
            if here != there:
                self._draw(renderer, Line2D([here[0], there[0]], [here[1], there[1]], color=one.look.color,
                                            linewidth=0.5, alpha=0.7))  # fmt: skip
        for one, (x, y) in zip(self.points, places, strict=True):
            self._draw(renderer, Line2D(
                [x], [y], color=one.look.color, marker=one.look.marker, markersize=MARK - 1.5, linestyle="none",
                markerfacecolor="none" if one.hollow else one.look.color, markeredgecolor=one.look.color,
                markeredgewidth=0.9,
            ))  # fmt: skip
        for one, (x, y), box in zip(self.points, places, boxes, strict=True):
            if box is None:
                continue
            near = min(max(x, box[0]), box[2]), min(max(y, box[1]), box[3])
            if math.dist((x, y), near) > 0.6 * MARK * scale:
                self._draw(renderer, Line2D([x, near[0]], [y, near[1]], color=one.look.color, linewidth=0.4))
            self._draw(renderer, Text(box[0], box[1], one.label, fontsize=FONT, color=one.look.color,
                                      va="bottom", ha="left"))  # fmt: skip
        self.stale = False

    def _draw(self, renderer: RendererBase, artist: Any) -> None:
        artist.set_figure(self.panel.get_figure(root=True))
        artist.draw(renderer)


def _around(x: float, y: float, half: float) -> Box:
    return x - half, y - half, x + half, y + half


def _apart(places: Sequence[tuple[float, float]], size: float) -> list[tuple[float, float]]:
    """Move places apart until none lies within `size` of another, each to the nearest free place."""
    found: list[tuple[float, float]] = []
    for x, y in places:
        for ring_x, ring_y in _rings(size):
            place = (x + ring_x, y + ring_y)
            if all(math.hypot(place[0] - a, place[1] - b) >= 0.95 * size for a, b in found):
                found.append(place)
                break
    return found


def _rings(size: float) -> Iterator[tuple[float, float]]:
    """Offsets: none, then rings of growing radius, beginning below and to the right."""
    yield 0.0, 0.0
    ring = 0
    while True:
        ring += 1
        for step in range(6 * ring):
            angle = -math.pi / 3 * step / ring
            yield ring * size * math.cos(angle), ring * size * math.sin(angle)


def _spot(text: str, x: float, y: float, scale: float, taken: Sequence[Box], room: Box) -> Box | None:
    """Where a label covers nothing; None where there is no such place."""
    if not text:
        return None
    width, height = 0.56 * FONT * len(text) * scale, 1.15 * FONT * scale
    boxes = np.asarray(taken)
    for distance in (0.55 * MARK, 1.6 * MARK, 2.8 * MARK):
        for across, up in ((1, 0), (0, 1), (0, -1), (-1, 0), (0.8, 0.8), (0.8, -0.8), (-0.8, 0.8), (-0.8, -0.8)):
            left = x + across * distance * scale - width * (0.5 - 0.5 * np.sign(across))
            low = y + up * distance * scale - height * (0.5 - 0.5 * np.sign(up))
            box = (float(left), float(low), float(left) + width, float(low) + height)
            if box[0] < room[0] or box[1] < room[1] or box[2] > room[2] or box[3] > room[3]:
                continue
            clear = (
                (boxes[:, 0] >= box[2]) | (boxes[:, 2] <= box[0]) | (boxes[:, 1] >= box[3]) | (boxes[:, 3] <= box[1])
            )
            if clear.all():
                return box
    return None
