"""Pack pictures and captions into shards as img2dataset writes them; pictures are copied byte for byte.

ipa data pack photos/ --out shards/                                       a.jpg with its caption in a.txt, recursive
ipa data pack data.json --image-root photos/ --out shards/                [{"image_file": "a.jpg", "text": "a cat"}]
ipa data pack table.parquet --image-column path --caption-column prompt --out shards/                or a .csv

Keys are positions in the list of sources, the same at every run. Every picture is decoded first: what is damaged,
missing or without a caption is left out and named in the report, as is what comes twice. A re-run writes only the
shards that are missing; it notices a changed list of files, captions in tables and columns, but not changed files.
A table's other columns go into the sample's .json; those of a CSV stay text.
"""

import argparse
import json
import os
from collections import Counter
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np

from data_tools.pack_list import Entry, PackList, read_list, write_list
from data_tools.pack_sources import find_entries
from data_tools.shard_writer import open_shard, stats_path
from data_tools.work import Report, add_work_arguments, run_tasks
from ipa_train.data.decode import MAX_PIXELS, decode
from ipa_train.data.index import MAX_MEMBER_BYTES
from ipa_train.data.scan import IMAGE_SUFFIXES, TEXT_SUFFIX
from ipa_train.errors import ConfigError, DataError
from ipa_train.runtime.files import atomic_write

_DESCRIPTION, _LIST = "pack.json", ".pack-list"
_REPEATED = "entries that came before"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the tool's arguments."""
    parser.add_argument("sources", nargs="+", type=Path, metavar="SOURCE", help="folder, .json, .csv or .parquet")
    parser.add_argument("--out", type=Path, required=True, help="folder for the shards")
    parser.add_argument("--image-root", type=Path, help="what a table's file names are below; default: its folder")
    parser.add_argument("--image-column", default="image_file", help="of a table or JSON list (%(default)s)")
    parser.add_argument("--caption-column", default="text", help="of a table or JSON list (%(default)s)")
    parser.add_argument("--caption-suffix", default=".txt", help="of captions beside pictures (%(default)s)")
    parser.add_argument("--shard-size", type=int, default=10_000, help="samples per shard (%(default)s)")
    parser.add_argument("--max-pixels", type=int, default=MAX_PIXELS, help="larger pictures are left out (%(default)s)")
    add_work_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Pack what is missing, and report on all shards."""
    if args.shard_size < 1:
        raise ConfigError(f"--shard-size must be at least 1, got {args.shard_size}.")
    if not args.caption_suffix.startswith("."):
        raise ConfigError(f"--caption-suffix must begin with a dot, got {args.caption_suffix!r}.")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {args.out}: cannot be made: {error.strerror}.") from error
    ignored: Counter[str] = Counter()
    options = ("image_root", "image_column", "caption_column", "caption_suffix")
    find = partial(find_entries, ignored=ignored, **{name: getattr(args, name) for name in options})
    listed = write_list(args.out / _LIST, chain.from_iterable(map(find, args.sources)), shard_size=args.shard_size)
    try:
        return _pack(listed, args, ignored)
    finally:
        listed.path.unlink()


def _pack(listed: PackList, args: argparse.Namespace, ignored: Counter[str]) -> int:
    if not listed.num_entries:
        sources = ", ".join(map(str, args.sources))
        raise ConfigError(f"{sources}: there is no picture ({'/'.join(IMAGE_SUFFIXES)}) to pack.")
    _check_same(
        args.out,
        list=listed.sha256,
        entries=listed.num_entries,
        shard_size=args.shard_size,
        max_pixels=args.max_pixels,
    )
    tasks = []
    for number in range(-(-listed.num_entries // args.shard_size)):
        first = number * args.shard_size
        start, end = np.searchsorted(listed.repeated, (first, first + args.shard_size))
        repeated = frozenset((listed.repeated[start:end] - first).tolist())
        tasks.append(_Task(listed.path, number, args.out / f"{number:05d}.tar", first, repeated))
    missing = [task for task in tasks if not (task.shard.exists() and stats_path(task.shard).exists())]
    report = Report("pack", entries=listed.num_entries, sources=list(map(str, args.sources)))
    report.counts["shards written"] = report.counts["samples"] = 0
    pack_shard = partial(_pack_shard, max_pixels=args.max_pixels)
    for task, result in run_tasks(pack_shard, missing, description="pack", workers=args.workers):
        if isinstance(result, DataError):
            report.problem(f"{task.shard}: {result}")
        else:
            report.counts["shards written"] += 1
    report.counts["shards already there"] = len(tasks) - len(missing)
    left_out: dict[str, list[str]] = {}
    for task in tasks:
        if not stats_path(task.shard).exists():
            continue
        stats = json.loads(stats_path(task.shard).read_text())
        report.counts["samples"] += stats["successes"]
        for kind, names in stats.get("left_out", {}).items():
            report.counts[kind] += len(names)
            left_out.setdefault(kind, []).extend(names)
    report.facts["left_out"] = left_out
    report.counts.update(+ignored)
    for kind, names in left_out.items():
        if kind != _REPEATED:
            report.problem(f"left out: {len(names):,} {kind}, first {names[0]}")
    return report.finish(args.report or args.out / "report-pack.json")


def _check_same(out: Path, **description: object) -> None:
    """Write down what is packed into ``out``, or check that it is what is there.

    Raises:
        ConfigError: something else is there.
    """
    path = out / _DESCRIPTION
    if not path.exists():
        if any(out.glob("*.tar")):
            raise ConfigError(f"{out} holds shards of another writer; pack into another folder.")
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(description))
        return
    try:
        before = json.loads(path.read_text())
        changed = [f"{name} was {before[name]}, now {now}" for name, now in description.items() if before[name] != now]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: damaged; pack into another folder, or delete {out}.") from error
    if changed:
        raise ConfigError(
            f"{out} was packed from another list or otherwise: {', '.join(changed)}; pack into another folder, or "
            "delete this one."
        )


@dataclass(frozen=True)
class _Task:
    list_path: Path
    number: int
    shard: Path
    first: int
    """Position of its first entry among all."""
    repeated: frozenset[int]
    """Which of its entries came before."""


class _LeftOutError(Exception):
    """A sample that cannot be packed: what kind of failure, and a word on it."""

    def __init__(self, kind: str, why: str = "") -> None:
        super().__init__(kind, why)
        self.kind, self.why = kind, why


def _pack_shard(task: _Task, *, max_pixels: int) -> None:
    with open_shard(task.shard) as writer:
        for row, entry in enumerate(read_list(task.list_path, task.number)):
            key = f"{task.first + row:09d}"  # 5 digits of shard and 4 of sample, at the usual 10,000 per shard
            name = os.fsencode(entry.path(entry.image or b"")).decode(errors="replace")
            try:
                if row in task.repeated:
                    raise _LeftOutError(_REPEATED)
                writer.write(key, _members(entry, key, max_pixels))
            except _LeftOutError as error:
                writer.leave_out(error.kind, f"{name}{error.why and f': {error.why}'}")
        if not writer.num_samples:
            kind, names = next(iter(writer.left_out.items()))
            raise DataError(f"none of its samples can be packed: {kind}: {names[0]}")


def _members(entry: Entry, key: str, max_pixels: int) -> dict[str, bytes]:
    if not entry.image:
        raise _LeftOutError("without a picture's name", entry.columns)
    path = entry.path(entry.image)
    suffix = path.suffix[1:].lower()
    if suffix not in IMAGE_SUFFIXES:
        raise _LeftOutError("of other kinds than " + "/".join(IMAGE_SUFFIXES))
    data = _read(path, "missing or unreadable pictures")
    if len(data) > MAX_MEMBER_BYTES:
        raise _LeftOutError("pictures too large for training", f"above {MAX_MEMBER_BYTES} bytes")
    caption = entry.caption
    if entry.caption_file:
        caption = _read(entry.path(entry.caption_file), "missing or unreadable captions")
    try:
        text = (caption or b"").decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise _LeftOutError("captions not in UTF-8") from error
    if not text:
        raise _LeftOutError("without a caption")
    try:
        decode(data, max_pixels=max_pixels)
    except DataError as error:
        raise _LeftOutError("damaged pictures", str(error)) from error
    source = entry.image.decode(errors="replace")
    facts = {**json.loads(entry.columns), "key": key, "source": source, "caption": text}
    return {suffix: data, TEXT_SUFFIX: text.encode(), "json": json.dumps(facts).encode()}


def _read(path: Path, kind: str) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(MAX_MEMBER_BYTES + 1)
    except OSError as error:
        raise _LeftOutError(kind, str(error.strerror)) from error
    except ValueError as error:  # a zero byte in the name
        raise _LeftOutError(kind, str(error)) from error
