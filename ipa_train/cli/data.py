"""Tools over shards.

`ipa data index` indexes shards ahead of training, e.g. on a node with many cores; training does it by itself otherwise.

    ipa data index '/data/laion/{00000..41000}.tar'
"""

import argparse
import sys
from pathlib import Path

from ipa_train.data.index import build_index


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    tools = parser.add_subparsers(required=True, metavar="TOOL")
    index = tools.add_parser("index", help="find every sample, and every fault of the files")
    index.add_argument("shards", nargs="+", help="folder, glob, or /data/{00000..00010}.tar")
    index.add_argument("--index-dir", type=Path, help="where to write it, if not beside the shards")
    index.add_argument("--allow-missing-stats", action="store_true", help="take shards of other writers")
    index.add_argument("--workers", type=int, help="processes; default: one per core")


def run(args: argparse.Namespace) -> int:
    """Index and report."""
    index = build_index(
        args.shards,
        index_dir=args.index_dir,
        allow_missing_stats=args.allow_missing_stats,
        num_workers=args.workers,
    )
    incomplete = sum(shard.entry.num_incomplete for shard in index.shards)
    sys.stdout.write(
        f"{int(index.counts.sum()):,} samples in {len(index.shards):,} shards, {incomplete:,} incomplete left out, "
        f"index {index.index_id}\n"
    )
    return 0
