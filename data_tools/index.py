"""Index shards ahead of training, e.g. on a node with many cores; training does it by itself otherwise.

ipa data index '/data/laion/{00000..41000}.tar'
ipa data index 's3://bucket/laion/*.tar' --index-dir /shared/index --cache-dir /local/cache
ipa data index /data/faces --needs mask embedding                        # for runs that need these of every sample

Shards whose size and time have not changed are not read again. Samples without a picture, a caption, or what --needs
names are counted and left out; runs with other needs have an index of their own. A shard that is damaged or unfinished
is a problem, and the others are indexed all the same.
"""

import argparse
from pathlib import Path

from data_tools.work import Report, add_needs, add_shard_arguments, add_work_arguments
from ipa_train.data.find import find_shards
from ipa_train.data.index import index_sound_shards
from ipa_train.data.local_copies import LocalCopies


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the tool's arguments."""
    add_shard_arguments(parser)
    add_needs(parser)
    parser.add_argument("--cache-dir", type=Path, help="folder for copies of remote shards, on a local disk")
    parser.add_argument("--cache-gib", type=float, default=100.0, help="what the copies may take; default: 100")
    add_work_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Index and report."""
    index, refused = index_sound_shards(
        args.shards,
        index_dir=args.index_dir,
        allow_missing_stats=args.allow_missing_stats,
        num_workers=args.workers,
        copies=None if args.cache_dir is None else LocalCopies(args.cache_dir, max_gib=args.cache_gib),
        extras=args.needs,
    )
    report = Report("index", index_id=index.index_id)
    entries = [shard.entry for shard in index.shards]
    report.counts["samples"] = sum(entry.num_samples for entry in entries)
    report.counts["shards"] = len(entries)
    report.counts["incomplete samples left out"] = sum(entry.num_incomplete for entry in entries)
    report.counts["samples left out by exclude lists"] = sum(entry.num_excluded for entry in entries)
    report.counts["shards refused"] = len(refused)
    for error in refused:
        report.problem(str(error))
    folder = args.index_dir or find_shards(args.shards)[0].parent  # remote shards have an --index-dir
    return report.finish(args.report or folder / "index-report.json")
