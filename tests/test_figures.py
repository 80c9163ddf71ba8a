"""The style that every figure shares."""

import re
from itertools import combinations

from matplotlib.colors import to_rgb
from PIL import Image

from kvbench import figures


def luminance(color):
    """Relative luminance (WCAG 2.1)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_series_differ_without_their_colours_and_stand_out_from_paper():
    styles = [figures.style(place) for place in range(16)]
    for mine, other in combinations(styles[:8], 2):
        assert mine.marker != other.marker
        assert mine.dashes != other.dashes
        assert mine.hatch != other.hatch
    assert len({(style.color, style.marker) for style in styles}) == 16
    assert all(1.05 / (luminance(style.color) + 0.05) > 2 for style in styles)


def test_a_figure_is_an_svg_with_text_and_a_png_at_300_dpi_and_the_same_every_time(tmp_path):
    def draw(folder):
        folder.mkdir()
        with figures.drawing(folder, "made", (4, 3)) as figure:
            axes = figure.subplots()
            axes.plot([10, 1000], [0.2, 0.9], label="costs $5 a_b $")
            figures.logarithmic(axes)
            axes.set_xlabel("tokens")
            axes.legend()
        return (folder / "made.svg").read_text(), Image.open(folder / "made.png")

    svg, png = draw(tmp_path / "one")
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", svg)
    assert {"costs $5 a_b $", "tokens", "20", "500"} <= set(texts)
    assert png.size == (1200, 900)
    assert [round(value) for value in png.info["dpi"]] == [300, 300]
    assert draw(tmp_path / "two")[0] == svg
