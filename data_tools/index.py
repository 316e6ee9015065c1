"""Index shards ahead of training, e.g. on a node with many cores; training does it by itself otherwise.

ipa data index '/data/laion/{00000..41000}.tar'
ipa data index 's3://bucket/laion/*.tar' --index-dir /shared/index --cache-dir /local/cache
"""

import argparse
import sys
from pathlib import Path

from ipa_train.data.index import build_index
from ipa_train.data.local_copies import LocalCopies


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the tool's arguments."""
    parser.add_argument("shards", nargs="+", help="folder, glob, or /data/{00000..00010}.tar")
    parser.add_argument("--index-dir", type=Path, help="where to write it, if not beside the shards")
    parser.add_argument("--allow-missing-stats", action="store_true", help="take shards of other writers")
    parser.add_argument("--workers", type=int, help="processes; default: one per core")
    parser.add_argument("--cache-dir", type=Path, help="folder for copies of remote shards, on a local disk")
    parser.add_argument("--cache-gib", type=float, default=100.0, help="what the copies may take; default: 100")


def run(args: argparse.Namespace) -> int:
    """Index and report."""
    index = build_index(
        args.shards,
        index_dir=args.index_dir,
        allow_missing_stats=args.allow_missing_stats,
        num_workers=args.workers,
        copies=None if args.cache_dir is None else LocalCopies(args.cache_dir, max_gib=args.cache_gib),
    )
    incomplete = sum(shard.entry.num_incomplete for shard in index.shards)
    sys.stdout.write(
        f"{int(index.counts.sum()):,} samples in {len(index.shards):,} shards, {incomplete:,} incomplete left out, "
        f"index {index.index_id}\n"
    )
    return 0
