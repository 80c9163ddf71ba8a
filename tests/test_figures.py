"""The style that every figure shares."""

import math
import re
from itertools import combinations

from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
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


def test_many_series_have_pairs_of_colour_and_marker_of_their_own_and_none_is_black():
    styles = [figures.distinct(place) for place in range(140)]
    assert len({(style.color, style.marker) for style in styles}) == 140
    assert len({style.color for style in styles[:11]}) == 11
    assert figures.BASELINE_STYLE.color not in {style.color for style in styles}
    for paper in ("#ffffff", "#14171b"):  # the page's, light and dark
        for style in styles[:11]:
            light, dark = sorted((luminance(style.color), luminance(paper)), reverse=True)
            assert (light + 0.05) / (dark + 0.05) > 2, (style.color, paper)


@given(
    st.lists(st.tuples(st.integers(0, 20), st.integers(0, 10), st.sampled_from(["5%", "256 tokens", ""])), max_size=60)
)
@settings(max_examples=10, deadline=None)
def test_no_mark_of_a_panel_hides_another_and_no_label_covers_one(drawn):
    from kvbench.report.charts import scatter

    with figures.styled("marks"):
        figure = Figure(figsize=(5, 3))
        axes = figure.subplots()
        axes.set(xlim=(0, 20), ylim=(0, 10))
        look = figures.distinct(0)
        scatter.scatter(axes, [scatter.Point(x, y, y, y, look, label) for x, y, label in drawn])
        (marks,) = [artist for artist in axes.artists if isinstance(artist, scatter.Marks)]
        true, places, labels = marks.layout(scale=1.0)
    assert len(places) == len(drawn)
    half = 0.4 * scatter.MARK
    boxes = [(x - half, y - half, x + half, y + half) for x, y in places] + [box for box in labels if box]
    for mine, other in combinations(boxes, 2):
        assert (
            mine[2] <= other[0]
            or other[2] <= mine[0]
            or mine[3] <= other[1]
            or other[3] <= mine[1]
            or (mine in boxes[: len(places)] and other in boxes[: len(places)])
        )
    assert all(math.dist(mine, other) >= 0.94 * scatter.MARK for mine, other in combinations(places, 2))
    alone = [place for place in range(len(true)) if true.count(true[place]) == 1]
    assert all(math.dist(true[place], places[place]) < 20 * scatter.MARK for place in alone)


def test_the_front_is_what_none_beats_in_both():
    from kvbench.report.charts import scatter

    points = [scatter.Point(x, y, y, y, figures.distinct(0), "") for x, y in ((1, 5), (2, 4), (2, 7), (3, 7), (4, 9))]
    assert [(one.x, one.y) for one in scatter.front(points)] == [(1, 5), (2, 7), (4, 9)]


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
