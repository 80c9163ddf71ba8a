"""Figures of `kvbench analyze`: Mahalanobis distances drawn anew, the others as they are."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from kvbench import figures
from kvbench.report.charts.chart import WIDTH, Chart, Row, legend
from kvbench.report.collect import Collection
from kvbench.report.commands import analyze_command

if TYPE_CHECKING:
    from matplotlib.figure import FigureBase


_OOD = {
    "keys_median": "keys, held out", "queries_median": "the prompt's queries",
    "decode_to_keys_median": "decoding queries",
}  # fmt: skip


def ood_charts(found: Collection) -> list[Chart]:
    """The figures of Mahalanobis distances."""
    title = "How far queries lie from keys"
    analyses = [one for one in found.analyses if one.name == "ood" and any(not row.get("missing") for row in one.rows)]
    if not analyses:
        model = found.runs[0].config["model"] if found.runs else "MODEL"
        return [Chart(
            "ood", title, "", missing="No folder here holds Mahalanobis distances.",
            remedy=[f"kvbench capture --model {model} --output capture",
                    "kvbench analyze ood --capture capture --output ood"],
        )]  # fmt: skip
    result = []
    for place, one in enumerate(analyses):
        rows = [row for row in one.rows if not row.get("missing")]
        left_out = len(one.rows) - len(rows)
        middle = {key: median(row[key] for row in rows) for key in _OOD}
        source = one.title
        result.append(Chart(
            "ood" if not place else f"ood-{place + 1}", title if len(analyses) == 1 else f"{title}: {source}",
            f"{source}. Mahalanobis distances from the prompt's keys, medians over the vectors of a head; line: median "
            "of the heads, band: their range. Keys from the same distribution lie at about √d.",
            one.rows, "Medians over layers and heads: " + ", ".join(
                f"{name} {middle[key]:.1f}" for key, name in _OOD.items()) + ".",
            missing=f"Partial: {left_out} of {len(one.rows)} heads have no covariance." if left_out else "",
            commands=[analyze_command("ood", one.source, one.options, one.path)],
            paint=partial(_paint_ood, rows=rows),
        ))  # fmt: skip
    return result


def _paint_ood(figure: FigureBase, rows: Sequence[Row]) -> None:
    from matplotlib.ticker import MaxNLocator  # noqa: PLC0415 - slow

    axis = figure.subplots()
    layers = sorted({row["layer"] for row in rows})
    for place, (key, name) in enumerate(_OOD.items()):
        groups = [[row[key] for row in rows if row["layer"] == layer] for layer in layers]
        look = figures.style(place)
        axis.plot(layers, [median(group) for group in groups], color=look.color, marker=look.marker,
                  linestyle=look.dashes, label=name)  # fmt: skip
        axis.fill_between(layers, [min(group) for group in groups], [max(group) for group in groups],
                          color=look.color, alpha=0.15, linewidth=0)  # fmt: skip
    axis.axhline(rows[0]["dimension"] ** 0.5, color=figures.REFERENCE, linewidth=0.8, linestyle=(0, (1, 1)), label="√d")
    axis.set_ylim(bottom=0)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_xlabel("layer")
    axis.set_ylabel("Mahalanobis distance (σ)")
    legend(figure, [axis])


def analysis_charts(found: Collection) -> list[Chart]:
    """The figures that `kvbench analyze` drew, as they are."""
    result: list[Chart] = []
    for one in found.analyses:
        picture = one.path / f"{one.name}.png"
        if one.name == "ood" or not (picture.is_file() and picture.with_suffix(".svg").is_file()):
            continue
        shown = [{key: f"{value:.3g}" if isinstance(value, float) else value for key, value in row.items()}
                 for row in one.summary[:40]]  # fmt: skip
        words = "; ".join(", ".join(f"{key} {value}" for key, value in row.items()) for row in shown).replace("_", " ")
        result.append(Chart(
            f"analysis-{len(result) + 1}", f"Analysis {one.name}: {one.title}",
            f"As `kvbench analyze {one.name}` drew it, from {len(one.rows)} rows.", one.rows,
            f"{words or f'{len(one.rows)} rows of numbers, in the CSV'}.",
            missing=f"Partial: {'; '.join(one.partial)}." if one.partial else "",
            commands=[analyze_command(one.name, one.source, one.options, one.path)],
            paint=partial(_paint_picture, file=picture), picture=picture, size=(WIDTH, WIDTH * _ratio(picture)),
        ))  # fmt: skip
    return result


def _ratio(picture: Path) -> float:
    """Height over width, from the PNG's header."""
    header = picture.read_bytes()[16:24]
    return int.from_bytes(header[4:], "big") / max(int.from_bytes(header[:4], "big"), 1)


def _paint_picture(figure: FigureBase, file: Path) -> None:
    from matplotlib.image import imread  # noqa: PLC0415 - slow

    axis = figure.subplots()
    axis.imshow(imread(file))
    axis.set_axis_off()
