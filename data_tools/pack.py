"""Pack pictures and captions into shards as img2dataset writes them; pictures are copied byte for byte.

ipa data pack photos --out shards                                  # a.jpg with its caption in a.txt, recursive
ipa data pack data.json --image-root photos --out shards           # [{"image_file": "a.jpg", "text": "a cat"}, ...]
ipa data pack table.parquet --image-column path --caption-column prompt --out shards            # or a .csv

Keys are positions in the list of sources, the same at every run. Every picture is decoded first: what is damaged,
missing or without a caption is left out and named in the report, as is what comes twice. A re-run writes only the
shards that are missing; it notices a changed list of files, captions in tables and columns, but not changed files.
Beside a.jpg, a.ref.jpg is packed as its image prompt, a.mask.png as the mask of that (without one, of a.jpg), and a.npy
as its embedding; of tables --reference-column, --mask-column and --embedding-column name them.
A table's other columns go into the sample's .json and the shard's .parquet; those of a CSV stay text.
"""

import argparse
import os
import secrets
from collections import Counter
from collections.abc import Sequence
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np

from data_tools.pack_list import PackList, write_list
from data_tools.pack_shard import REPEATED, PackTask, pack_shard
from data_tools.pack_sources import MALFORMED_ROWS, find_entries
from data_tools.shard_writer import read_stats, stats_path
from data_tools.work import Report, add_max_bad_rate, add_work_arguments, claim_folder, make_output_folder, run_tasks
from ipa_train.data.decode import MAX_PIXELS
from ipa_train.data.scan import EXTRAS, IMAGE_SUFFIXES
from ipa_train.errors import ConfigError, DataError

_DESCRIPTION, _LIST = "pack.json", ".tmp-pack-list"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the tool's arguments."""
    parser.add_argument("sources", nargs="+", type=Path, metavar="SOURCE", help="folder, .json, .csv or .parquet")
    parser.add_argument("--out", type=Path, required=True, help="folder for the shards")
    parser.add_argument("--image-root", type=Path, help="what a table's file names are below; default: its folder")
    parser.add_argument("--image-column", default="image_file", help="of a table or JSON list (%(default)s)")
    parser.add_argument("--caption-column", default="text", help="of a table or JSON list (%(default)s)")
    for extra in EXTRAS:
        parser.add_argument(f"--{extra}-column", help=f"of a table or JSON list: file of the sample's {extra}")
    parser.add_argument("--caption-suffix", default=".txt", help="of captions beside pictures (%(default)s)")
    parser.add_argument("--shard-size", type=int, default=10_000, help="samples per shard (%(default)s)")
    parser.add_argument("--max-pixels", type=int, default=MAX_PIXELS, help="larger pictures are left out (%(default)s)")
    add_max_bad_rate(parser)
    add_work_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Pack what is missing, and report on all shards."""
    if args.shard_size < 1:
        raise ConfigError(f"--shard-size must be at least 1, got {args.shard_size}.")
    if not args.caption_suffix.startswith("."):
        raise ConfigError(f"--caption-suffix must begin with a dot, got {args.caption_suffix!r}.")
    make_output_folder(args.out)
    ignored: Counter[str] = Counter()
    options = ("image_root", "image_column", "caption_column", "caption_suffix")
    extras = {extra: name for extra in EXTRAS if (name := getattr(args, f"{extra}_column"))}
    find = partial(
        find_entries, ignored=ignored, extra_columns=extras, **{name: getattr(args, name) for name in options}
    )
    path = args.out / f"{_LIST}-{os.getpid()}-{secrets.token_hex(4)}"  # its own: it may be refused
    listed = write_list(path, chain.from_iterable(map(find, args.sources)), shard_size=args.shard_size)
    try:
        return _pack(listed, args, ignored)
    finally:
        listed.path.unlink(missing_ok=True)


def _pack(listed: PackList, args: argparse.Namespace, ignored: Counter[str]) -> int:
    if not listed.num_entries:
        sources = ", ".join(map(str, args.sources))
        raise ConfigError(f"{sources}: there is no picture ({'/'.join(IMAGE_SUFFIXES)}) to pack.")
    options = {name: getattr(args, name) for name in ("shard_size", "max_pixels")}
    claim_folder(args.out, _DESCRIPTION, {"list": listed.sha256, "entries": listed.num_entries, **options})
    tasks = []
    for number in range(-(-listed.num_entries // args.shard_size)):
        first = number * args.shard_size
        start, end = np.searchsorted(listed.repeated, (first, first + args.shard_size))
        repeated = frozenset((listed.repeated[start:end] - first).tolist())
        tasks.append(PackTask(listed.path, number, args.out / f"{number:05d}.tar", first, repeated))
    missing = [task for task in tasks if not (task.shard.exists() and stats_path(task.shard).exists())]
    report = Report("pack", entries=listed.num_entries, sources=list(map(str, args.sources)))
    report.counts["shards written"] = 0
    pack = partial(pack_shard, max_pixels=args.max_pixels)
    for task, result in run_tasks(pack, missing, description="pack", workers=args.workers):
        if isinstance(result, DataError):
            report.problem(f"{task.shard}: {result}")
        else:
            report.counts["shards written"] += 1
    report.counts["shards already there"] = len(tasks) - len(missing)
    report.counts["samples"] = 0
    _report_shards(report, [task.shard for task in tasks], args.max_bad_rate)
    report.counts.update(+ignored)
    if ignored[MALFORMED_ROWS]:
        report.problem(f"left out: {ignored[MALFORMED_ROWS]:,} {MALFORMED_ROWS}")
    return report.finish(args.report or args.out / "pack-report.json")


def _report_shards(report: Report, shards: Sequence[Path], max_bad_rate: float) -> None:
    """Count what all shards hold and lack, those of earlier runs too."""
    bad = []
    for shard in shards:
        if not stats_path(shard).exists():
            continue
        num_samples, left_out = read_stats(shard)
        report.counts["samples"] += num_samples
        for key, why in left_out.items():
            kind = why.partition(": ")[0]
            report.counts[kind] += 1
            if kind != REPEATED:
                bad.append(f"{shard.name}/{key}: {why}")
    report.left_out(bad, report.counts["samples"], max_bad_rate)
