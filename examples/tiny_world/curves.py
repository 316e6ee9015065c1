"""Curves over steps, drawn with Pillow alone."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

WIDTH, PANEL, LEFT, RIGHT, TOP, BOTTOM = 1800, 600, 110, 40, 110, 70


@dataclass(frozen=True)
class Curve:
    """Points (step, value), and half the width of the band around each, if there is one."""

    name: str
    colour: str
    points: Sequence[tuple[float, float]]
    half_widths: Sequence[float] | None = None


@dataclass(frozen=True)
class Panel:
    """Curves under one title; curves of one name have one colour and one entry in the legend."""

    title: str
    curves: Sequence[Curve]


def draw_panels(panels: Sequence[Panel], path: Path, *, x_label: str) -> None:
    """Draw panels under each other over the same steps; lines are smooth as the picture is halved at last."""
    canvas = Image.new("RGB", (WIDTH, PANEL * len(panels)), "white")
    last = max(step for panel in panels for curve in panel.curves for step, _ in curve.points)
    for i, panel in enumerate(panels):
        _draw_panel(canvas, panel, i * PANEL, last, x_label)
    canvas.resize((canvas.width // 2, canvas.height // 2), Image.Resampling.LANCZOS).save(path, optimize=True)


def _draw_panel(canvas: Image.Image, panel: Panel, top: int, last: float, x_label: str) -> None:
    title_font, font = ImageFont.load_default(30), ImageFont.load_default(24)
    edges = [
        value + sign * width
        for curve in panel.curves
        for (_, value), width in zip(curve.points, curve.half_widths or [0.0] * len(curve.points), strict=True)
        for sign in (-1, 1)
    ]
    low, high = min(edges), max(edges)
    floor, ceiling = top + PANEL - BOTTOM, top + TOP

    def at(step: float, value: float) -> tuple[float, float]:
        across = LEFT + (WIDTH - LEFT - RIGHT) * step / last
        return across, floor - (floor - ceiling) * (value - low) / (high - low)

    draw = ImageDraw.Draw(canvas, "RGBA")
    draw.text((LEFT, top + 12), panel.title, fill="black", font=title_font)
    for value in _ticks(low, high):
        draw.line([at(0, value), at(last, value)], fill="#dddddd", width=2)
        draw.text((LEFT - 12, at(0, value)[1]), f"{value:g}", fill="black", font=font, anchor="rm")
    for step in _ticks(0, last):
        draw.text((at(step, low)[0], floor + 8), f"{step:g}", fill="black", font=font, anchor="ma")
    if low < 0 < high:
        draw.line([at(0, 0), at(last, 0)], fill="black", width=2)
    draw.text(((LEFT + WIDTH - RIGHT) / 2, floor + 38), x_label, fill="black", font=font, anchor="ma")
    for curve in panel.curves:
        if curve.half_widths is not None:
            pairs = list(zip(curve.points, curve.half_widths, strict=True))
            outline = [at(step, value + w) for (step, value), w in pairs]
            outline += [at(step, value - w) for (step, value), w in reversed(pairs)]
            red, green, blue = (int(curve.colour[k : k + 2], 16) for k in (1, 3, 5))
            draw.polygon(outline, fill=(red, green, blue, 40))
        draw.line([at(*point) for point in curve.points], fill=curve.colour, width=4)
    names = {curve.name: curve.colour for curve in panel.curves}
    across = LEFT
    for name, colour in names.items():
        draw.line([(across, top + 78), (across + 40, top + 78)], fill=colour, width=8)
        draw.text((across + 52, top + 78), name, fill="black", font=font, anchor="lm")
        across += 100 + int(font.getlength(name))


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers from ``low`` to ``high``, four to ten of them."""
    size = 10 ** math.floor(math.log10((high - low) / 4))
    step = next(size * factor for factor in (1, 2, 5, 10) if (high - low) / (size * factor) <= 8)
    return [round(k * step, 10) for k in range(math.ceil(low / step), math.floor(high / step) + 1)]
