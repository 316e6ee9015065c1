"""Choose rows of metadata by size, scores and caption, or exclude downloaded samples, and count what each rule does.

ipa data filter laion/*.parquet --out laion-512 --min-size 512 --max-unsafe 0.1 --max-watermark 0.8 --min-aesthetic 5
ipa data filter ds/*.parquet --exclude --max-unsafe 0.1        # shards downloaded already: nothing is copied

Every input gives a parquet of its name in --out. With --exclude, the inputs are what img2dataset wrote beside its
shards, and each folder gets an exclude-filter.txt, which the index of the shards then heeds. Column names may be those
of LAION, Re-LAION, COYO and img2dataset. The report says of each rule how many rows it alone rejects, how many the
rules up to it keep, and how many have no value; those are rejected, unless --keep-null is given.

Files are streamed, each as one task: memory is that of a row group per process.
"""

import argparse
import json
from collections import Counter
from collections.abc import Mapping, Set
from dataclasses import asdict
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_tools.exclude_list import list_folders
from data_tools.metadata import find_columns, find_metadata, open_metadata
from data_tools.rules import Chain, add_rule_arguments, chain_of, option
from data_tools.work import Report, add_work_arguments, make_output_folder, run_tasks
from ipa_train.data.index_file import make_index_folder
from ipa_train.errors import ConfigError, DataError
from ipa_train.runtime.files import atomic_write

EXCLUDE_NAME = "exclude-filter.txt"
_MARK = b"ipa_filter"  # in the footer of an output: its rules, input and counts
_ROW_GROUP_ROWS = 131_072


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the tool's arguments."""
    parser.add_argument("metadata", nargs="+", help="folder, glob, or /data/{000..127}.parquet")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--out", type=Path, help="folder for the filtered files")
    where.add_argument("--exclude", action="store_true", help=f"write {EXCLUDE_NAME} beside the shards instead")
    parser.add_argument("--index-dir", type=Path, help="with --exclude: where the index lies, if not beside the shards")
    add_rule_arguments(parser)
    add_work_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Filter and report."""
    if args.index_dir and not args.exclude:
        raise ConfigError("--index-dir goes with --exclude: filtered files go to --out.")
    paths, chain = find_metadata(args.metadata), chain_of(args)
    report = Report("filter", **asdict(chain))
    counts = _exclude(paths, chain, args) if args.exclude else _copy(paths, chain, args, report)
    report.counts.update({name: counts[name] for name in ("read", "not downloaded", "kept") if name in counts})
    report.facts["rules"] = {
        name: {what: counts[f"{name} {what}"] for what in ("rejects alone", "kept after", "null")}
        for name in chain.limits
    }
    return report.finish(args.report or (args.out or args.index_dir or paths[0].parent) / "filter-report.json")


def _copy(paths: list[Path], chain: Chain, args: argparse.Namespace, report: Report) -> Counter[str]:
    """Write a filtered file for each of ``paths`` that has none yet; return the counts of all of them."""
    names = Counter(path.name for path in paths)
    for path in paths:
        if names[path.name] > 1:
            raise ConfigError(f"METADATA: {names[path.name]} files are named {path.name}; filter one folder at a time.")
    make_output_folder(args.out)
    total: Counter[str] = Counter()
    missing = []
    for path in paths:
        mark = _read_mark(args.out / path.name, chain)
        if mark is None or mark["input"] != _identity(path):
            missing.append(path)
        else:
            total.update(mark["counts"])
    report.facts["num_done_before"] = len(paths) - len(missing)
    for _, result in run_tasks(
        partial(_filter_file, chain=chain, out=args.out),
        missing,
        description="filter",
        unit="file",
        workers=args.workers,
    ):
        if isinstance(result, DataError):
            report.problem(str(result))
        else:
            total.update(result)
            report.counts["files"] += 1
    return total


def _filter_file(path: Path, *, chain: Chain, out: Path) -> Counter[str]:
    identity = _identity(path)
    counts: Counter[str] = Counter()
    with open_metadata(path) as file, atomic_write(out / path.name) as temporary:
        schema = file.schema_arrow.remove_metadata()
        with pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
            pending: list[pa.RecordBatch] = []
            for batch, kept in chain.judge(path, file, counts):
                pending.append(batch.filter(pa.array(kept)).replace_schema_metadata(None))
                if sum(map(len, pending)) >= _ROW_GROUP_ROWS:
                    writer.write_table(pa.Table.from_batches(pending))
                    pending = []
            writer.write_table(pa.Table.from_batches(pending, schema))
            writer.add_key_value_metadata({_MARK: json.dumps({**asdict(chain), "input": identity, "counts": counts})})
    return counts


def _read_mark(path: Path, chain: Chain) -> Mapping[str, Any] | None:
    """What an output says of itself; None if it is not there.

    Raises:
        ConfigError: it was made by other rules, or is none of ours.
    """
    if not path.exists():
        return None
    with open_metadata(path) as file:
        mark = json.loads((file.metadata.metadata or {}).get(_MARK, "null"))
    if mark is None:
        raise ConfigError(f"--out {path.parent}: {path.name} is there and was not written by this tool; give another.")
    _check_rules(f"--out {path.parent}", mark, chain)
    return mark


def _check_rules(where: str, mark: Mapping[str, Any], chain: Chain) -> None:
    got = {"limits": mark["limits"], "keep_null": mark["keep_null"]}
    if got != asdict(chain):
        raise ConfigError(
            f"{where} holds the result of other rules, {_words(got)} and not {_words(asdict(chain))}: give another "
            "folder, or delete it."
        )


def _words(rules: Mapping[str, Any]) -> str:
    words = [f"{option(name)} {limit:g}" for name, limit in rules["limits"].items()]
    return " ".join(words + ["--keep-null"] * rules["keep_null"])


def _identity(path: Path) -> list[Any]:
    stat = path.stat()
    return [path.name, stat.st_size, stat.st_mtime_ns]


def _exclude(paths: list[Path], chain: Chain, args: argparse.Namespace) -> Counter[str]:
    """Write the list of each folder that ``paths`` are in, or one of all where the index lies."""
    for path in paths:
        if not path.with_suffix(".tar").exists():
            raise ConfigError(f"--exclude: {path} has no {path.stem}.tar beside it; --out DIR filters url lists.")
    total: Counter[str] = Counter()
    folders = list_folders(paths, args.index_dir, option="--index-dir")
    for folder, of_folder in groupby(sorted(paths, key=lambda path: (folders[path], path)), lambda path: folders[path]):
        make_index_folder(folder)
        target, header = folder / EXCLUDE_NAME, f"# ipa data filter {json.dumps(asdict(chain))}\n"
        tasks = list(of_folder)
        if target.exists():
            _check_rules(str(target), _read_header(target), chain)
            _check_named(target, {f"{path.stem}.tar" for path in tasks})
        with atomic_write(target) as temporary, temporary.open("w") as file:
            file.write(header)
            for _, result in run_tasks(
                partial(_rejected, chain=chain), tasks, description=folder.name, unit="shard", workers=args.workers
            ):
                if isinstance(result, DataError):  # a list that is not whole would let in what it should keep out
                    raise result
                counts, lines = result
                total.update(counts)
                file.writelines(lines)
    return total


def _read_header(path: Path) -> Mapping[str, Any]:
    with path.open() as file:
        words = file.readline().removeprefix("# ipa data filter ")
    try:
        return json.loads(words)
    except ValueError:
        raise ConfigError(f"{path}: not written by this tool; delete or rename it.") from None


def _check_named(path: Path, shards: Set[str]) -> None:
    """Refuse to write a list anew that names shards which take no part this time."""
    lines = path.read_text().splitlines()
    others = {line.partition("/")[0] for line in lines if not line.startswith("#")} - shards
    if others:
        raise ConfigError(
            f"{path} excludes samples of {min(others)} too, which was not named: name all files of the folder, or "
            "delete the list."
        )


def _rejected(path: Path, *, chain: Chain) -> tuple[Counter[str], list[str]]:
    counts: Counter[str] = Counter()
    lines = []
    with open_metadata(path) as file:
        (key,) = find_columns(path, file.schema_arrow, ["key"], wanted_by="--exclude")
        for batch, kept in chain.judge(path, file, counts, only_success=True):
            rejected = batch[key].filter(pa.array(~kept)).to_pylist()
            lines += [f"{path.stem}.tar/{name}\n" for name in rejected]
    return counts, lines
