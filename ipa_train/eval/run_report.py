"""One page of what a run's folder holds: curves, grids, what was dropped and bad, options, and the files to take."""

import csv
import io
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path

import yaml
from PIL import Image

from ipa_train.errors import ConfigError
from ipa_train.eval.html import draw_facts, draw_html, draw_jpeg, draw_tiles
from ipa_train.eval.line_chart import Line, draw_lines

_GROUPS = {
    "val": ("Does it learn?", "On fixed samples, noise and timesteps. Bands are 95 % intervals."),
    "image_to_text": (
        "Image against text, by attention",
        "Norm of what image tokens add, over that of what text tokens add: where the adapter acts, and how strongly.",
    ),
    "train": ("Training", "Means over log intervals. The loss alone says little: the base is frozen and good already."),
    "data": ("Data", "Rates of dropped conditions, as they came out, and what of the data was bad."),
    "perf": ("Speed", "A wait for data above a few per cent: more workers, or shards stored at the training size."),
}
_MAX_POINTS = 300  # of a curve
_MAX_GRIDS = 6
_GRID_WIDTH = 1160  # pixels, as wide as the page
_CI = "_ci"
_FOLDED = "image_to_text"  # a chart for each attention is much
_FIRST = ("val/gap_other", "val/gap_none", "train/loss")
_QUARTER = re.compile(r"_t([0-3])$")
_STYLE = """
.grids img { width: 100%; border-radius: 6px; } .grids h3 { margin-bottom: 8px; }
.facts td { white-space: normal; overflow-wrap: anywhere; } .facts th { width: 220px; vertical-align: top; }
pre { margin: 0; overflow-x: auto; font-size: 12.5px; } details summary { cursor: pointer; color: var(--soft); }
a { color: var(--blue); }
"""


@dataclass(frozen=True)
class Curve:
    """A metric over the steps at which it was logged."""

    points: list[tuple[float, float]]
    margins: list[float]
    """Half of its interval at each point; empty where it has none."""


def draw_run(run: Path, *, page_folder: Path) -> str:
    """The page as HTML; it needs no other file. Its links to exports hold from ``page_folder``, where it will lie.

    Raises:
        ConfigError: the folder is no run.
    """
    config, versions = _text(run, "config.yaml"), json.loads(_text(run, "versions.json"))
    curves = read_curves(run / "metrics.csv")
    name = yaml.safe_load(config)["run"]["name"]
    body = [f"<h1>{escape(str(name))}</h1>", draw_tiles(list(_tiles(curves)))]
    for group, (title, what) in _GROUPS.items():
        charts = list(_draw_charts(curves, group))
        if charts:
            grid = f'<div class="grid charts">{"".join(charts)}</div>'
            if group == _FOLDED:
                grid = f"<details><summary>{len(charts)} charts</summary>{grid}</details>"
            zeros = [name for name in sorted(curves) if name.startswith(f"{group}/") and _is_zero(curves[name])]
            note = f"<p>0 throughout: {escape(', '.join(zeros))}.</p>" if zeros else ""
            body.append(f"<h2>{title}</h2><p>{what}</p>{grid}{note}")
    if not curves:
        body.append("<p>No metrics are logged yet.</p>")
    body += [*_draw_grids(run / "samples"), *_draw_bad_samples(run), *_draw_checkpoints(run, page_folder)]
    body += ["<h2>Environment</h2>", draw_facts(versions), "<h2>Options</h2>"]
    body.append(f'<details class="card"><summary>config.yaml</summary><pre>{escape(config)}</pre></details>')
    return draw_html(f"ipa report: {name}", body, style=_STYLE)


def read_curves(path: Path) -> dict[str, Curve]:
    """Metrics by name, long ones thinned out to means over equal numbers of points; nothing if there is no file yet."""
    if not path.exists():
        return {}
    values: dict[str, list[tuple[float, float]]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if name != "step" and value:
                    values.setdefault(name, []).append((float(row["step"]), float(value)))
    thin = {name: _thin(points) for name, points in values.items()}
    return {
        name: Curve(points, [margin for _, margin in thin.get(name + _CI, [])])
        for name, points in thin.items()
        if not name.endswith(_CI)
    }


def _thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    size = math.ceil(len(points) / _MAX_POINTS)
    chunks = [points[i : i + size] for i in range(0, len(points), size)]
    return [(chunk[-1][0], sum(y for _, y in chunk) / len(chunk)) for chunk in chunks]


def _text(run: Path, name: str) -> str:
    try:
        return (run / name).read_text()
    except OSError as error:
        raise ConfigError(f"{run}: no run of ipa-train ({name}: {error.strerror}); give outputs/RUN_NAME.") from error


def _tiles(curves: Mapping[str, Curve]) -> Iterator[tuple[str, str]]:
    shown = {
        "val/gap_other": ("{:.4f}", "rise of the loss by another image"),
        "train/loss": ("{:.4f}", "loss"),
        "data/bad_fraction": ("{:.2%}", "bad samples"),
        "perf/images_per_second": ("{:.3g}", "images per second"),
    }
    if curves:
        yield f"{max(curve.points[-1][0] for curve in curves.values()):,.0f}", "optimizer steps"
    for name, (form, what) in shown.items():
        if name in curves:
            yield form.format(curves[name].points[-1][1]), f"{what}, at last"


def _draw_charts(curves: Mapping[str, Curve], group: str) -> Iterator[str]:
    """What is learnt stands first, then the rest by name; the four quarters of a metric share a chart."""
    names = sorted(name for name in curves if name.startswith(f"{group}/") and not _is_zero(curves[name]))
    quarters: dict[str, dict[str, Curve]] = {}
    for name in names:
        if match := _QUARTER.search(name):
            quarters.setdefault(name.removesuffix(match[0]), {})[f"t{match[1]}"] = curves[name]
    whole = [name for name in names if not _QUARTER.search(name)]
    for name in [*(name for name in _FIRST if name in whole), *(name for name in whole if name not in _FIRST)]:
        yield _draw_chart(name, {name: curves[name]})
    for name, family in quarters.items():
        yield _draw_chart(f"{name}, by timestep (t0: least noise)", family)


def _is_zero(curve: Curve) -> bool:
    return all(y == 0 for _, y in curve.points)


def _draw_chart(title: str, curves: Mapping[str, Curve]) -> str:
    bands = len(curves) == 1  # several would hide each other
    lines = [Line(name, curve.points, curve.margins if bands else ()) for name, curve in curves.items()]
    return f'<div class="card"><h3>{escape(title)}</h3>{draw_lines(lines, x_label="steps")}</div>'


def _draw_grids(folder: Path) -> Iterator[str]:
    paths = sorted(folder.glob("step-*.png"))
    if not paths:
        return
    count = min(_MAX_GRIDS, len(paths))
    chosen = {round(i * (len(paths) - 1) / max(1, count - 1)) for i in range(count)}
    yield f"<h2>Samples</h2><p>{len(chosen)} of {len(paths)} grids, from first to last.</p>"
    cards = [
        f'<div class="card"><h3>step {int(paths[i].stem.removeprefix("step-")):,}</h3>{_draw_picture(paths[i])}</div>'
        for i in sorted(chosen)
    ]
    yield f'<div class="grid grids">{"".join(cards)}</div>'


def _draw_picture(path: Path) -> str:
    with Image.open(path) as picture:
        shown = picture.convert("RGB")
    shown.thumbnail((_GRID_WIDTH, 10 * _GRID_WIDTH))
    buffer = io.BytesIO()
    shown.save(buffer, format="JPEG", quality=88)
    return draw_jpeg(buffer.getvalue(), alt=path.stem)


def _draw_bad_samples(run: Path) -> Iterator[str]:
    logs = (path.read_text() for path in sorted(run.glob("bad_samples-*.jsonl")))
    bad = [json.loads(line) for log in logs for line in log.splitlines()]
    if not bad:
        return
    yield f"<h2>Bad samples</h2><p>{len(bad):,} were replaced by others; bad_samples-*.jsonl names each.</p>"
    reasons = Counter(_shortened(str(sample["error"])) for sample in bad)
    shards = Counter(Path(str(sample["shard"])).name for sample in bad)
    for what, counts in (("reason", reasons), ("shard", shards)):
        rows = [f'<tr><th>{what}</th><th class="number">samples</th></tr>']
        rows += [f'<tr><td>{escape(name)}</td><td class="number">{n:,}</td></tr>' for name, n in counts.most_common(8)]
        yield f'<div class="card"><table>{"".join(rows)}</table></div>'


def _shortened(text: str, *, longest: int = 110) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "…"


def _draw_checkpoints(run: Path, page_folder: Path) -> Iterator[str]:
    rows = []
    for folder in sorted((run / "checkpoints").glob("*")):
        files = [path for path in sorted(folder.glob("ip_adapter.*")) if path.is_file()]
        links = ", ".join(
            f'<a href="{escape(os.path.relpath(path, page_folder))}">{path.name}</a> {path.stat().st_size / 1e6:.1f} MB'
            for path in files
        )
        rows.append(f"<tr><td>{escape(folder.name)}</td><td>{links or 'no export'}</td></tr>")
    if rows:
        yield "<h2>Checkpoints</h2><p>Exports load in diffusers, ComfyUI and Tencent's code.</p>"
        yield f'<div class="card"><table>{"".join(rows)}</table></div>'
