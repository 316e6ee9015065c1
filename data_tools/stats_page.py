"""The page of ``ipa data stats``: one file with all that it shows, so that it can be mailed, kept and compared."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from data_tools.charts import draw_bucket, draw_histogram
from data_tools.contact_sheet import DrawnSample
from data_tools.histogram import Histogram, short_number
from data_tools.shard_stats import MEASURES
from ipa_train.eval.html import draw_html, draw_jpeg, draw_tiles

_STYLE = """
.sheet { grid-template-columns: repeat(auto-fill, minmax(180px, 1fr)); }
.bar { fill: var(--blue); } .bar.beyond { fill: #a9bfe9; } .bar:hover { fill: #1d4aa3; }
.median { stroke: var(--ink); } .mark { stroke: var(--amber); stroke-dasharray: 3 3; }
svg text.mark-name { fill: var(--amber); }
.range { fill: #eef2fb; }
td.share { width: 55%; }
td.share span { display: block; height: 12px; border-radius: 3px; background: var(--blue); }
td svg { width: 26px; height: 26px; } td svg rect { fill: #dbe5f8; stroke: var(--blue); }
figure.card { margin: 0; padding: 0; overflow: hidden; }
figure .picture { height: 160px; background: #eceff3; display: flex; align-items: center; justify-content: center; }
figure img { max-width: 100%; max-height: 160px; display: block; }
figcaption { padding: 8px 12px 10px; font-size: 13px; }
figcaption div { display: -webkit-box; -webkit-line-clamp: 3; -webkit-box-orient: vertical; overflow: hidden; }
figcaption small { display: block; margin-top: 4px; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.bad { color: #a33; padding: 0 12px; font-size: 13px; }
"""


def draw_page(
    counts: Mapping[str, int],
    histograms: Mapping[str, Histogram],
    buckets: Sequence[Mapping[str, Any]],
    samples: Sequence[DrawnSample],
    *,
    source: str,
    resolution: int,
) -> str:
    """The page as HTML: counts, a chart per measure, the aspect buckets of ``resolution``, and some samples."""
    marks = {"short_side": (resolution, f"{resolution}"), "megapixels": (resolution**2 / 1e6, f"{resolution}²")}
    charts = "".join(_draw_card(name, found, *marks.get(name, (None, ""))) for name, found in histograms.items())
    body = [
        f"<h1>{counts['samples']:,} samples in {counts['shards']:,} shards</h1>",
        f"<p>{escape(source)}</p>",
        draw_tiles(_tiles(counts, histograms, resolution)),
        "<h2>Pictures and captions</h2>",
        "<p>The dark line is the median, the shaded range holds 90 % of the samples; both are approximate, to the width"
        " of a bar. Pale bars hold all that lies beyond the axis.</p>",
        f'<div class="grid charts">{charts}</div>',
        f"<h2>Aspect buckets of {resolution} &times; {resolution} pixels</h2>",
        "<p>Where training in buckets would put the pictures. Enlarged are those that are smaller than their bucket on"
        " a side: they are blurred to its size.</p>",
        f'<div class="card">{_draw_buckets(buckets)}</div>',
    ]
    if samples:
        body += [
            f"<h2>{len(samples)} samples at random</h2>",
            "<p>As they are stored, scaled down; the whole caption shows under the pointer.</p>",
            f'<div class="grid sheet">{"".join(map(_draw_sample, samples))}</div>',
        ]
    return draw_html("Data set statistics", body, style=_STYLE)


def _tiles(counts: Mapping[str, int], histograms: Mapping[str, Histogram], resolution: int) -> list[tuple[str, str]]:
    share = counts["pictures smaller than the resolution"] / max(1, counts["samples"])
    tiles = [
        (_show_bytes(counts["bytes"]), "of pictures and captions"),
        (f"{share:.1%}", f"have a short side below {resolution} px"),
        (f"{counts['empty captions'] / max(1, counts['samples']):.1%}", "have an empty caption"),
    ]
    for name, what in (("short_side", "px, median short side"), ("caption_words", "words, median caption")):
        if name in histograms:
            tiles.append((f"{histograms[name].percentile(50):,.0f}", what))
    if unread := counts.get("pictures whose size cannot be read", 0) + counts.get("captions that cannot be read", 0):
        tiles.append((f"{unread:,}", "pictures or captions cannot be read"))
    return tiles


def _show_bytes(number: float) -> str:
    units = ["KiB", "MiB", "GiB", "TiB"]
    while number / 1024 >= 1000 and len(units) > 1:
        number /= 1024
        units.pop(0)
    return f"{short_number(number / 1024)} {units[0]}"


def _draw_card(name: str, found: Histogram, mark: float | None, mark_name: str) -> str:
    measure = MEASURES[name]
    low, middle, high = (short_number(found.percentile(percent)) for percent in (5, 50, 95))
    unit = f" {measure.unit}" if measure.unit else ""
    words = f"median {middle}{unit} &middot; 90 % in {low} to {high} &middot; max {short_number(found.maximum)}"
    chart = draw_histogram(found, is_log=measure.is_log, unit=unit, mark=mark, mark_name=mark_name)
    return f'<div class="card"><h3>{escape(measure.title)}</h3><small>{words}</small>{chart}</div>'


def _draw_buckets(buckets: Sequence[Mapping[str, Any]]) -> str:
    largest = max(bucket["share"] for bucket in buckets) or 1.0
    rows = [
        f"<tr><td>{draw_bucket(bucket['height'], bucket['width'])}</td>"
        f"<td>{bucket['width']} &times; {bucket['height']}</td>"
        f'<td class="share"><span style="width:{100 * bucket["share"] / largest:.1f}%"></span></td>'
        f'<td class="number">{bucket["share"]:.1%}</td><td class="number">{bucket["samples"]:,}</td>'
        f'<td class="number">{bucket["enlarged"] / max(1, bucket["samples"]):.0%}</td></tr>'
        for bucket in sorted(buckets, key=lambda bucket: bucket["width"] / bucket["height"])
    ]
    head = "".join(f'<th class="number">{name}</th>' for name in ("share", "samples", "enlarged"))
    return f"<table><tr><th></th><th>width &times; height</th><th></th>{head}</tr>{''.join(rows)}</table>"


def _draw_sample(sample: DrawnSample) -> str:
    height, width = sample.size
    name, caption = escape(sample.name), escape(sample.caption)
    if sample.jpeg:
        picture = draw_jpeg(sample.jpeg)
        words = (
            f'<div title="{caption}">{caption or "(no caption)"}</div>'
            f"<small>{width} &times; {height} &middot; {name}</small>"
        )
    else:
        picture, words = f'<span class="bad">{caption}</span>', f"<small>{name}</small>"
    return (
        f'<figure class="card"><div class="picture">{picture}</div>'
        f'<figcaption title="{name}">{words}</figcaption></figure>'
    )
