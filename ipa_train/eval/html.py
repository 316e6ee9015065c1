"""Pages of one file, that need no network and no other file: for results that are mailed, kept and compared."""

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape

STYLE = """
:root { --ink: #1c2430; --soft: #66707f; --line: #e3e7ed; --blue: #3b6fd4; --amber: #c77d1a; }
* { box-sizing: border-box; }
body { margin: 0; background: #f6f7f9; color: var(--ink); font: 15px/1.45 system-ui, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 32px 28px 64px; }
h1 { margin: 0; font-size: 26px; font-weight: 650; letter-spacing: -.01em; }
h2 { margin: 40px 0 4px; font-size: 18px; font-weight: 650; }
p { margin: 0 0 14px; color: var(--soft); max-width: 78ch; }
.grid { display: grid; gap: 14px; }
.tiles { grid-template-columns: repeat(auto-fit, minmax(170px, 1fr)); margin-top: 8px; }
.charts { grid-template-columns: repeat(auto-fill, minmax(370px, 1fr)); }
.card { background: #fff; border: 1px solid var(--line); border-radius: 10px; padding: 14px 16px; }
.charts .card { display: flex; flex-direction: column; }
.charts svg { margin-top: auto; padding-top: 8px; }
.tile b { display: block; font-size: 25px; font-weight: 650; letter-spacing: -.01em; }
.tile, .card small, figcaption small { color: var(--soft); font-size: 13px; }
.tile b, .card h3 { color: var(--ink); }
.card h3 { margin: 0; font-size: 15px; font-weight: 600; }
svg { display: block; width: 100%; height: auto; font: 11px system-ui, sans-serif; }
svg text { fill: var(--soft); }
.axis { stroke: var(--line); }
table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; color: var(--soft); font-size: 13px; }
th, td { padding: 4px 10px 4px 0; border-bottom: 1px solid var(--line); white-space: nowrap; }
tr:last-child td, tr:last-child th { border: 0; }
td.number, th.number { text-align: right; }
"""


def draw_html(title: str, body: Iterable[str], *, style: str = "") -> str:
    """A page of these blocks of HTML; ``style`` adds to :data:`STYLE`."""
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}{style}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body><main>{"".join(body)}</main></body></html>\n'


def draw_tiles(tiles: Sequence[tuple[str, str]]) -> str:
    """Large numbers, each with what it is; both are HTML."""
    return f'<div class="grid tiles">{"".join(_tile(*tile) for tile in tiles)}</div>'


def draw_facts(facts: Mapping[str, object]) -> str:
    """A card with a table of names and values."""
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(str(value))}</td></tr>" for name, value in facts.items())
    return f'<div class="card facts"><table>{rows}</table></div>'


def draw_jpeg(data: bytes, *, alt: str = "") -> str:
    """A picture, inside the page."""
    return f'<img alt="{escape(alt)}" src="data:image/jpeg;base64,{base64.b64encode(data).decode()}">'


def _tile(value: str, what: str) -> str:
    return f'<div class="card tile"><b>{value}</b>{what}</div>'
