"""Curves inside a page."""

import math
import xml.etree.ElementTree as ElementTree

import pytest

from ipa_train.eval.line_chart import Line, draw_lines, round_ticks


def test_points_stand_where_their_values_are():
    svg = ElementTree.fromstring(draw_lines([Line("a", [(0.0, 1.0), (1.0, 3.0), (4.0, 2.0)])], x_label="x"))
    dots = [(float(dot.get("cx")), float(dot.get("cy"))) for dot in svg.iter("circle")]
    (x0, y0), (x1, y1), (x2, y2) = dots
    assert (x1 - x0) / (x2 - x0) == pytest.approx(1 / 4, abs=0.01)
    assert y1 < y2 < y0, "larger values stand higher"
    assert (y0 - y2) / (y0 - y1) == pytest.approx(1 / 2, abs=0.01)
    width, height = map(float, svg.get("viewBox").split()[2:])
    assert all(0 <= x <= width and 0 <= y <= height for x, y in dots)


def test_several_lines_have_a_legend_bands_and_no_gaps_from_what_is_not_finite():
    lines = [
        Line("<mine>", [(0.0, 1.0), (1.0, math.nan), (2.0, 2.0)], margins=[0.1, 0.1, 0.2]),
        Line("theirs", [(0.0, 1.5), (2.0, 1.5)]),
    ]
    svg = ElementTree.fromstring(draw_lines(lines, x_label="λ"))
    texts = [text.text for text in svg.iter("text")]
    assert {"<mine>", "theirs", "λ"} <= set(texts)
    assert len(list(svg.iter("polygon"))) == 1
    assert len(list(svg.iter("circle"))) == 4
    assert next(title.text for title in svg.iter("title")) == "<mine> at 0: 1 ± 0.1"


@pytest.mark.parametrize("points", [[], [(0.0, math.inf)], [(3.0, 7.0)], [(0.0, 0.0), (1.0, 0.0)]])
def test_there_is_a_chart_of_whatever_there_is(points):
    ElementTree.fromstring(draw_lines([Line("a", points)], x_label="x"))


def test_a_long_line_is_drawn_without_its_points():
    svg = ElementTree.fromstring(draw_lines([Line("a", [(float(i), float(i % 7)) for i in range(1000)])], x_label="x"))
    assert not list(svg.iter("circle"))
    assert len(svg.find("polyline").get("points").split()) == 1000


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(0.0, 1.0, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]), (-3.0, 45.0, [0, 10, 20, 30, 40]), (0.9111, 0.9118, [0.9112, 0.9114])],
)
def test_ticks_are_round_numbers_within(low, high, ticks):
    assert round_ticks(low, high)[: len(ticks)] == pytest.approx(ticks)
