"""Curves as inline SVG."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT = 360, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, _WIDTH - 10, 10, _HEIGHT - 34  # of the plot; left and below stand the numbers
_LEGEND_HEIGHT = 16
_MAX_TICKS = 6
_MAX_DOTS = 60  # of a line whose points are drawn
_COLOURS = ("#3b6fd4", "#c77d1a", "#2c8a5a", "#a3457f", "#66707f")


@dataclass(frozen=True)
class Line:
    """A curve, from left to right; points that are not finite are left out."""

    name: str
    points: Sequence[tuple[float, float]]
    margins: Sequence[float] = ()
    """Half the height of a pale band around each point, such as a confidence interval; none if empty."""


def draw_lines(lines: Sequence[Line], *, x_label: str) -> str:
    """A chart of curves over one axis; with a legend, if there are several."""
    kept = [_finite(line) for line in lines]
    points = [point for line in kept for point in line.points]
    if not points:
        return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">{_text(_WIDTH / 2, _HEIGHT / 2, "no values")}</svg>'
    top = _TOP + (_LEGEND_HEIGHT if len(kept) > 1 else 0)
    ends = [
        y + sign * m for line in kept for (_, y), m in zip(line.points, _margins(line), strict=True) for sign in (-1, 1)
    ]
    x_axis = _Axis.around([x for x, _ in points], _LEFT, _RIGHT, margin=0.0)
    y_axis = _Axis.around(ends, _BOTTOM, top, margin=0.05)
    parts = [*_draw_grid(x_axis, y_axis, top), _text((_LEFT + _RIGHT) / 2, _HEIGHT - 4, x_label)]
    colours = [_COLOURS[i % len(_COLOURS)] for i in range(len(kept))]
    for line, colour in zip(kept, colours, strict=True):
        parts += _draw_line(line, x_axis, y_axis, colour)
    if len(kept) > 1:
        parts += _draw_legend([line.name for line in kept], colours)
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">{"".join(parts)}</svg>'


def round_ticks(low: float, high: float, *, most: int = _MAX_TICKS) -> list[float]:
    """Round numbers from ``low`` to ``high``, few enough to be read."""
    rough = (high - low) / (most - 1)
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * unit for factor in (1, 2, 5, 10) if factor * unit >= rough)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


@dataclass(frozen=True)
class _Axis:
    """Values ``low`` to ``high`` between the pixels ``start`` and ``end``."""

    low: float
    high: float
    start: float
    end: float

    @classmethod
    def around(cls, values: Sequence[float], start: float, end: float, *, margin: float) -> "_Axis":
        low, high = min(values), max(values)
        if high - low < 1e-12 * max(1.0, abs(high)):  # one value: an axis needs two
            low, high = low - 0.5 * max(abs(low), 1e-6), high + 0.5 * max(abs(high), 1e-6)
        return cls(low - margin * (high - low), high + margin * (high - low), start, end)

    def place(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def _draw_grid(x_axis: _Axis, y_axis: _Axis, top: float) -> Iterator[str]:
    for tick in round_ticks(y_axis.low, y_axis.high, most=5):
        y = y_axis.place(tick)
        yield f'<line class="axis" x1="{_LEFT}" x2="{_RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield _text(_LEFT - 6, y + 4, f"{tick:.4g}", anchor="end")
    for tick in round_ticks(x_axis.low, x_axis.high):
        x = x_axis.place(tick)
        yield f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{_BOTTOM}"/>'
        yield _text(x, _BOTTOM + 14, f"{tick:.6g}")


def _draw_line(line: Line, x_axis: _Axis, y_axis: _Axis, colour: str) -> Iterator[str]:
    places = [(x_axis.place(x), y_axis.place(y)) for x, y in line.points]
    if line.margins:
        upper = [(x_axis.place(x), y_axis.place(y + m)) for (x, y), m in zip(line.points, line.margins, strict=True)]
        lower = [(x_axis.place(x), y_axis.place(y - m)) for (x, y), m in zip(line.points, line.margins, strict=True)]
        yield f'<polygon points="{_join([*upper, *reversed(lower)])}" fill="{colour}" opacity="0.15"/>'
    yield f'<polyline points="{_join(places)}" fill="none" stroke="{colour}" stroke-width="1.6"/>'
    if len(places) > _MAX_DOTS:
        return
    for (left, top), (x, y), margin in zip(places, line.points, _margins(line), strict=True):
        spread = f" ± {margin:.4g}" if line.margins else ""
        title = escape(f"{line.name} at {x:.6g}: {y:.4g}{spread}")
        yield f'<circle cx="{left:.1f}" cy="{top:.1f}" r="3" fill="{colour}"><title>{title}</title></circle>'


def _draw_legend(names: Sequence[str], colours: Sequence[str]) -> Iterator[str]:
    left = float(_LEFT)
    for name, colour in zip(names, colours, strict=True):
        yield f'<rect x="{left:.0f}" y="{_TOP - 6}" width="10" height="3" fill="{colour}"/>'
        yield _text(left + 14, _TOP, name, anchor="start")
        left += 24 + 6 * len(name)


def _finite(line: Line) -> Line:
    kept = [
        (point, margin)
        for point, margin in zip(line.points, _margins(line), strict=True)
        if all(map(math.isfinite, (*point, margin)))
    ]
    return Line(line.name, [point for point, _ in kept], [margin for _, margin in kept] if line.margins else ())


def _margins(line: Line) -> Sequence[float]:
    return line.margins or [0.0] * len(line.points)


def _join(places: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in places)


def _text(x: float, y: float, text: str, *, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
