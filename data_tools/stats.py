"""Sizes, shapes, captions and scores of a data set: a table, stats.json, and stats.html, one page to look at.

ipa data stats '/data/laion/{00000..41000}.tar' --out stats/ --resolution 512 --bucket-step 64

Pictures' sizes come from the index, which is built if need be, captions from the shards, scores (similarity, aesthetic,
watermark, unsafe) from the parquet files beside them. Percentiles are approximate: values are counted in fixed bins,
shard by shard, so that memory does not grow with their number. What is measured of a shard is kept in the folder parts
of --out, so that a re-run measures only what is missing or changed.
"""

import argparse
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from data_tools.contact_sheet import draw_samples
from data_tools.histogram import Histogram, short_number
from data_tools.shard_stats import MEASURES, ShardStats, measure_shard
from data_tools.stats_page import draw_page
from data_tools.work import Report, add_shard_arguments, add_work_arguments, make_output_folder, run_tasks
from ipa_train.data.buckets import make_buckets
from ipa_train.data.index import index_sound_shards
from ipa_train.errors import ConfigError, DataError
from ipa_train.runtime.files import atomic_write

PERCENTS = (5, 50, 95)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the tool's arguments."""
    add_shard_arguments(parser)
    parser.add_argument("--out", type=Path, required=True, help="folder for the page and the numbers")
    parser.add_argument("--resolution", type=int, default=512, help="as data.resolution (%(default)s)")
    parser.add_argument("--bucket-step", type=int, default=64, help="as data.bucket_step (%(default)s)")
    parser.add_argument("--max-aspect-ratio", type=float, default=2.0, help="as data.max_aspect_ratio (%(default)s)")
    parser.add_argument("--num-samples", type=int, default=48, help="pictures on the page (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of pictures (%(default)s)")
    add_work_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, report, and draw the page."""
    if args.num_samples < 0:
        raise ConfigError(f"--num-samples must be at least 0, got {args.num_samples}.")
    buckets = make_buckets(args.resolution, step=args.bucket_step, max_aspect_ratio=args.max_aspect_ratio)
    parts = make_output_folder(args.out / "parts")
    report = Report("stats")
    index, refused = index_sound_shards(
        args.shards,
        index_dir=args.index_dir,
        allow_missing_stats=args.allow_missing_stats,
        num_workers=args.workers,
    )
    for error in refused:
        report.problem(str(error))
    if index.shards and index.content == "features":
        raise ConfigError("these shards hold cached features; give the shards of pictures they were made from.")
    total = ShardStats(len(buckets))
    measure = partial(measure_shard, parts=parts, buckets=buckets, resolution=args.resolution)
    for _, result in run_tasks(measure, index.shards, description="stats", workers=args.workers):
        if isinstance(result, DataError):
            report.problem(str(result))
        else:
            total.merge(result)
    if not total.counts["samples"]:
        raise DataError(f"no sample could be measured: {report.problems[0] if report.problems else 'all are excluded'}")
    report.counts.update({"shards": len(index.shards), "shards refused": len(refused), **total.counts})
    known = {name: found for name, found in total.histograms.items() if found.num_values}
    report.facts = {"resolution": args.resolution, "percentiles_are": "approximate", "measures": _describe(known)}
    sizes = zip(buckets, total.bucket_counts.tolist(), total.bucket_enlarged.tolist(), strict=True)
    report.facts["buckets"] = [
        {"height": height, "width": width, "samples": count, "share": count / total.counts["samples"], "enlarged": few}
        for (height, width), count, few in sizes
    ]
    sys.stdout.write(_draw_table(known))
    samples = draw_samples(index, args.num_samples, seed=args.seed)
    with atomic_write(args.out / "stats.html") as temporary:
        page = draw_page(
            report.counts,
            known,
            report.facts["buckets"],
            samples,
            source=" ".join(args.shards),
            resolution=args.resolution,
        )
        temporary.write_text(page, encoding="utf-8", errors="replace")
    return report.finish(args.report or args.out / "stats.json")


def _describe(histograms: Mapping[str, Histogram]) -> dict[str, Any]:
    return {
        name: {
            "unit": MEASURES[name].unit,
            "values": found.num_values,
            "minimum": found.minimum,
            "maximum": found.maximum,
            "mean": found.mean,
            **{f"p{percent}": found.percentile(percent) for percent in PERCENTS},
            "edges": found.edges.tolist(),
            "counts": found.counts.tolist(),
        }
        for name, found in histograms.items()
    }


def _draw_table(histograms: Mapping[str, Histogram]) -> str:
    heads = ("min", *(f"~{percent} %" for percent in PERCENTS), "max", "mean")
    lines = [f"{'':<34}" + "".join(f"{head:>10}" for head in heads)]
    for name, found in histograms.items():
        title = f"{MEASURES[name].title}  {MEASURES[name].unit}"
        values = (found.minimum, *map(found.percentile, PERCENTS), found.maximum, found.mean)
        lines.append(f"{title:<34}" + "".join(f"{short_number(value):>10}" for value in values))
    return "\n".join([*lines, ""])
