"""Read and decode every sample of shards, as strictly as training does, and find keys that come twice.

ipa data validate '/data/laion/{00000..41000}.tar' --write-exclude       # leave bad samples out of training
ipa data validate /data/laion --reread                                   # has any byte changed on disk since then?

Checks each shard's tar headers, every picture (or cached features: their layout, and that all numbers are finite),
captions, and the count in NAME_stats.json. Keeps a CRC-32 of every sample in NAME.crc.npy and its findings in
NAME.validated.json beside the shard: a re-run reads only shards whose size or time has changed, --reread all of them,
and says which samples' bytes are others than then. So machines may validate a part of the shards each; a last run over
all reads what they kept. Memory does not grow with the number of samples, but with that of bad ones.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.checksums import hash_key, read_checksums, repeated_hashes
from data_tools.exclude_list import list_folders, update_exclude_list
from data_tools.shard_check import ShardFindings, check_shard, checksums_path
from data_tools.work import Report, add_needs, add_shard_arguments, add_work_arguments, run_tasks
from ipa_train.data.decode import MAX_PIXELS
from ipa_train.data.find import find_shards
from ipa_train.data.index import MAX_MEMBER_BYTES, read_excluded
from ipa_train.data.index_file import make_index_folder
from ipa_train.data.scan import EXTRAS, find_samples
from ipa_train.errors import DataError

EXCLUDE_LIST = "exclude-validate.txt"
_MAX_NAMED = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the tool's arguments."""
    add_shard_arguments(parser)
    parser.add_argument("--max-pixels", type=int, default=MAX_PIXELS, help="as data.max_pixels (%(default)s)")
    add_needs(parser)
    parser.add_argument("--reread", action="store_true", help="read shards again that are as they were")
    parser.add_argument("--write-exclude", action="store_true", help=f"list bad samples in {EXCLUDE_LIST}")
    add_work_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Validate and report."""
    shards = find_shards(args.shards)
    folders = {shard: args.index_dir or shard.parent for shard in shards}
    for folder in set(folders.values()):
        make_index_folder(folder)
        read_excluded(folder)  # a list that cannot be read is said now, not after hours
    if args.write_exclude:
        list_folders(shards, args.index_dir, option="--write-exclude")
    report = Report("validate")
    check = partial(
        check_shard,
        index_dir=args.index_dir,
        allow_missing_stats=args.allow_missing_stats,
        max_pixels=args.max_pixels,
        reread=args.reread,
        extras=[extra for extra in EXTRAS if extra in args.needs],
    )
    sound: list[Path] = []
    bad: dict[Path, dict[str, str]] = {}
    for shard, found in run_tasks(check, shards, description="validate", workers=args.workers):
        if isinstance(found, DataError):
            report.counts["shards refused"] += 1
            report.problem(str(found))
            continue
        sound.append(shard)
        _count(report, found)
        if found.kept.bad:
            bad[shard] = found.kept.bad
    if args.write_exclude:
        _write_exclude(folders, bad, sound)
    _report_bad(report, bad, folders)
    _report_repeated(report, sound, args.index_dir)
    return report.finish(args.report or folders[shards[0]] / "validate-report.json")


def _count(report: Report, found: ShardFindings) -> None:
    kept = found.kept
    report.counts["shards"] += 1
    report.counts["shards validated before"] += found.reused
    report.counts["samples"] += kept.num_samples
    report.counts["bad samples"] += len(kept.bad)
    report.counts["incomplete samples"] += kept.num_incomplete
    report.counts["empty captions"] += kept.num_empty_captions
    report.counts["samples whose bytes changed"] += found.num_changed
    for problem in found.problems:
        report.problem(problem)


def _write_exclude(folders: dict[Path, Path], bad: dict[Path, dict[str, str]], sound: Sequence[Path]) -> None:
    for folder in set(folders.values()):
        here = [shard for shard in sound if folders[shard] == folder]
        excluded = {shard.name: bad[shard] for shard in here if shard in bad}
        update_exclude_list(folder / EXCLUDE_LIST, excluded, looked_at={shard.name for shard in here})


def _report_bad(report: Report, bad: dict[Path, dict[str, str]], folders: dict[Path, Path]) -> None:
    """Bad samples are a problem unless exclude lists keep them out of training."""
    excluded = {folder: read_excluded(folder) for folder in set(folders.values())}
    named: list[dict[str, Any]] = []
    for shard, samples in bad.items():
        without = excluded[folders[shard]].get(shard.name, frozenset())
        for key, why in samples.items():
            named.append({"shard": str(shard), "key": key, "why": why, "excluded": key in without})
        if left := {key: why for key, why in samples.items() if key not in without}:
            key, why = next(iter(left.items()))
            report.problem(f"{shard}: {len(left)} bad samples (--write-exclude leaves them out), first {key}: {why}")
    report.counts["bad samples excluded"] = sum(sample["excluded"] for sample in named)
    report.facts["bad_samples"] = named


def _report_repeated(report: Report, shards: Sequence[Path], index_dir: Path | None) -> None:
    tables = {shard: checksums_path(shard, index_dir) for shard in shards}
    hashes = repeated_hashes(list(tables.values()))
    report.counts["keys in several shards"] = len(hashes)
    if not len(hashes):
        return
    owners: dict[int, list[Path]] = {int(found): [] for found in hashes[:_MAX_NAMED]}
    for shard, path in tables.items():
        if (table := read_checksums(path)) is not None:
            for found in np.intersect1d(table["key"], hashes[:_MAX_NAMED]).tolist():
                owners[found].append(shard)
    for found, several in owners.items():
        samples = find_samples(several[0], max_member_bytes=MAX_MEMBER_BYTES)
        key = next(key for key in samples if hash_key(key) == found)
        report.problem(f"the key {key!r} is in {', '.join(map(str, several))}")
    if len(hashes) > len(owners):
        report.problem(f"{len(hashes) - len(owners):,} more keys are in several shards")
