"""The style of every figure: read by the colour-blind and in grey, in fonts that a paper accepts, as SVG and PNG."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 300
MOST_PIXELS = 10_000_000
"""Of a PNG; a figure that is larger at 300 dpi gets fewer."""
REFERENCE = "#555555"
"""Colour of reference lines and of notes inside a figure."""
MAP = "cividis"
"""Colour map of heat maps: even for the colour-blind, and lightness alone tells its values apart."""


class Style(NamedTuple):
    """What tells one series from the others: colour, and marker, dashes or hatch for readers of grey."""

    color: str
    marker: str
    dashes: Any
    hatch: str


# Okabe and Ito's colours (2008) without the yellow, which white paper swallows.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_DASHES: tuple[Any, ...] = (
    "-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (2, 1)), (0, (1, 2)),
)  # fmt: skip
_HATCHES = ("", "///", "...", "xxx", "\\\\\\", "+++", "---", "ooo")

# Of middle lightness, so that they stand out from white and from dark pages.
_MANY_COLORS = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#9467BD",
    "#A6761D", "#CC6677", "#999933", "#7F7F7F",
)  # fmt: skip
_MANY_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "p", "h", "d")
BASELINE_STYLE = Style("#000000", "X", "-", "")
"""Of exact attention."""

_RC: dict[Any, Any] = {
    "svg.fonttype": "none", "pdf.fonttype": 42, "ps.fonttype": 42,
    "text.parse_math": False,  # names come from users and may hold a dollar sign
    "font.size": 9, "axes.titlesize": 9, "axes.labelsize": 9, "legend.fontsize": 8, "legend.frameon": False,
    "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "axes.axisbelow": True, "grid.color": "#DDDDDD", "grid.linewidth": 0.6,
    "lines.linewidth": 1.5, "lines.markersize": 5, "errorbar.capsize": 2, "hatch.linewidth": 0.6,
}  # fmt: skip


def style(place: int) -> Style:
    """The style of the series at `place`, counted from 0; past eight, colours come again with other markers."""
    again = place // len(_COLORS)
    return Style(
        _COLORS[place % len(_COLORS)], _MARKERS[(place + again) % len(_MARKERS)],
        _DASHES[(place + again) % len(_DASHES)], _HATCHES[(place + again) % len(_HATCHES)],
    )  # fmt: skip


def distinct(place: int) -> Style:
    """The style of one of many series: 143 pairs of colour and marker until one comes again, and none of them black."""
    return Style(
        _MANY_COLORS[place % len(_MANY_COLORS)], _MANY_MARKERS[place % len(_MANY_MARKERS)],
        _DASHES[place % len(_DASHES)], _HATCHES[place % len(_HATCHES)],
    )  # fmt: skip


@contextmanager
def styled(name: str) -> Iterator[None]:
    """The style, for drawing and saving inside the block; texts are plain, no TeX. `name` makes an SVG's ids."""
    from matplotlib import rc_context  # noqa: PLC0415 - slow

    with rc_context({**_RC, "svg.hashsalt": name}):
        yield


@contextmanager
def drawing(folder: Path, name: str, size: tuple[float, float] = (6.0, 3.8)) -> Iterator[Figure]:
    """Give an empty figure of `size` inches; leaving the block saves it as `NAME.svg` and `NAME.png` in the folder.

    Everything that is drawn belongs inside the block, where the style holds.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415 - slow

    with styled(name):
        figure = Figure(figsize=size, layout="constrained")
        yield figure
        if figure.axes and (engine := figure.get_layout_engine()) is not None:
            engine.execute(figure)
            figure.set_layout_engine(None)  # an engine, even one that is done, makes each savefig draw twice
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
        dpi = min(DPI, (MOST_PIXELS / (size[0] * size[1])) ** 0.5)
        figure.savefig(folder / f"{name}.png", dpi=dpi, pil_kwargs={"compress_level": 3})  # 4% larger, twice as fast


def logarithmic(axes: Axes, which: Literal["x", "y"] = "x") -> None:
    """Make an axis logarithmic, with ticks at 1, 2 and 5 written as plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter  # noqa: PLC0415 - slow

    axes.set(**{f"{which}scale": "log"})
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
