"""Charts as inline SVG."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from data_tools.histogram import Histogram, short_number
from ipa_train.eval.line_chart import round_ticks

_WIDTH, _HEIGHT, _FOOT = 360, 130, 20  # of a chart, and of the numbers below it
_TOP, _BOTTOM = 12, _HEIGHT - _FOOT  # of the bars; above is room for a mark's name
_EDGE = 15  # text closer to it is not centred
_BEYOND_WIDTH = 7
_MAX_TICKS = 6
_ICON_SIZE = 24


@dataclass(frozen=True)
class _Axis:
    """Values ``low`` to ``high`` between the pixels ``left`` and ``right``."""

    low: float
    high: float
    left: float
    right: float
    is_log: bool

    def place(self, value: float) -> float:
        """Where a value is drawn, in pixels; beyond the ends at the ends."""
        value = min(max(value, self.low), self.high)
        if self.is_log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.left + share * (self.right - self.left)


def draw_histogram(found: Histogram, *, is_log: bool, unit: str, mark: float | None = None, mark_name: str = "") -> str:
    """Bars from the first value to the last, the range of 5 to 95 %, the median, and ``mark``, a value to look for."""
    inner = found.counts[1:-1]
    filled = np.flatnonzero(inner)
    first, last = (int(filled[0]), int(filled[-1]) + 1) if len(filled) else (0, len(inner))
    edges = found.edges[first : last + 1].tolist()
    below, above = int(found.counts[0]), int(found.counts[-1])
    axis = _Axis(edges[0], edges[-1], _BEYOND_WIDTH * (below > 0), _WIDTH - _BEYOND_WIDTH * (above > 0), is_log)
    places = [axis.place(edge) for edge in edges]
    names = [f"{short_number(low)} to {short_number(high)}{unit}" for low, high in pairwise(edges)]
    bars = [
        ("bar", *where, count, name)
        for where, count, name in zip(pairwise(places), inner[first:last], names, strict=True)
    ]
    bars.append(("bar beyond", 0.0, axis.left, below, f"below {short_number(found.edges[0])}{unit}"))
    bars.append(("bar beyond", axis.right, _WIDTH, above, f"from {short_number(found.edges[-1])}{unit}"))
    low, middle, high = (axis.place(found.percentile(percent)) for percent in (5, 50, 95))
    parts = [
        f'<rect class="range" x="{low:.1f}" y="{_TOP}" width="{high - low:.1f}" height="{_BOTTOM - _TOP}"/>',
        *(_bar(*bar, found) for bar in bars if bar[3]),
        f'<line class="axis" x1="0" x2="{_WIDTH}" y1="{_BOTTOM}" y2="{_BOTTOM}"/>',
        _line("median", middle),
    ]
    if mark is not None and axis.low <= mark <= axis.high:
        parts += [_line("mark", axis.place(mark)), _text(axis.place(mark), _TOP - 3, mark_name, "mark-name")]
    parts += [_text(axis.place(tick), _HEIGHT - 5, short_number(tick)) for tick in _ticks(axis)]
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">{"".join(parts)}</svg>'


def _bar(kind: str, start: float, end: float, count: int, name: str, found: Histogram) -> str:
    height = max(1.0, (_BOTTOM - _TOP) * count / int(found.counts.max()))
    title = f"<title>{name}: {count:,} ({count / found.num_values:.2%})</title>"
    place = (
        f'x="{start:.1f}" y="{_BOTTOM - height:.1f}" width="{max(0.5, end - start - 0.6):.1f}" height="{height:.1f}"'
    )
    return f'<rect class="{kind}" {place}>{title}</rect>'


def _line(kind: str, x: float) -> str:
    return f'<line class="{kind}" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{_BOTTOM}"/>'


def _text(x: float, y: float, text: str, kind: str = "tick") -> str:
    anchor = "start" if x < _EDGE else "end" if x > _WIDTH - _EDGE else "middle"
    return f'<text class="{kind}" x="{x:.1f}" y="{y}" text-anchor="{anchor}">{text}</text>'


def draw_bucket(height: int, width: int) -> str:
    """The shape of an aspect bucket."""
    longer = max(height, width)
    rows, columns = _ICON_SIZE * height / longer, _ICON_SIZE * width / longer
    x, y = (_ICON_SIZE - columns) / 2 + 1, (_ICON_SIZE - rows) / 2 + 1
    box = _ICON_SIZE + 2
    return (
        f'<svg viewBox="0 0 {box} {box}"><rect x="{x:.1f}" y="{y:.1f}" width="{columns:.1f}" height="{rows:.1f}" '
        'rx="2"/></svg>'
    )


def _ticks(axis: _Axis) -> Iterator[float]:
    """Round numbers within the axis, few enough to be read."""
    low, high = axis.low, axis.high
    if axis.is_log:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for steps in ((1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
            found = [step * 10.0**decade for decade in decades for step in steps if low <= step * 10.0**decade <= high]
            if len(found) <= _MAX_TICKS:
                break
        yield from found
        return
    yield from round_ticks(low, high, most=_MAX_TICKS)
