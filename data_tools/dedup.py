"""Find pictures that come twice, byte for byte or nearly, and write lists that exclude all but the largest of each.

ipa data dedup '/data/laion/{00000..41000}.tar'
ipa data dedup ds-a ds-b --max-distance 2        # pictures of both; each folder gets its own list

Each folder gets an exclude-dedup.txt, or --index-dir gets one for all, which the index of the shards then heeds; the
shards stay as they are. What other exclude lists name takes no part, so filter first.

Pictures are near when their perceptual hashes differ in at most --max-distance of 64 bits. Encoded again or resized,
a picture differs in 0 to 2; with 1 % cut off each side, in 0 to 6; unrelated ones in about 32. Hue plays no part.
Pictures of one colour and the like have no such hash: only equal bytes make them equal.

Hashes are kept in NAME.hash.npz beside each shard, and computed again when the shard changes: a killed run goes on
where it was. Grouping is one process, with about 100 bytes of memory per picture and 16 per pair of near ones.
"""

import argparse
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy import ndarray

from data_tools.exclude_list import is_listable, list_folders
from data_tools.near_duplicates import find_leaders
from data_tools.picture_hashes import ROW, has_hashes, hash_shard, read_hashes
from data_tools.work import Report, add_work_arguments, run_tasks
from ipa_train.data.find import find_shards
from ipa_train.data.index import read_excluded
from ipa_train.data.index_file import make_index_folder
from ipa_train.errors import ConfigError, DataError
from ipa_train.runtime.files import atomic_write

EXCLUDE_NAME = "exclude-dedup.txt"
_MAX_DISTANCE = 8  # bits; the work grows steeply with it, and so do false finds
_NUM_EXAMPLES = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the tool's arguments."""
    parser.add_argument("shards", nargs="+", help="folder, glob, or /data/{00000..00010}.tar")
    parser.add_argument("--index-dir", type=Path, help="where the index lies, if not beside the shards")
    parser.add_argument("--max-distance", type=int, default=4, metavar="BITS", help="0 to 8; default: 4")
    add_work_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Hash, group, write the lists and report."""
    if not 0 <= args.max_distance <= _MAX_DISTANCE:
        raise ConfigError(f"--max-distance must be from 0 to {_MAX_DISTANCE}, got {args.max_distance}.")
    paths = find_shards(args.shards)
    folders = list_folders(paths, args.index_dir, option="--index-dir")
    for folder in set(folders.values()):
        make_index_folder(folder)
    _check_lists(folders)
    report = Report("dedup", max_distance=args.max_distance)
    hashed = _hash(paths, args, report)
    pictures = Pictures({shard: folders[shard] for shard in hashed}, args.index_dir, report)
    leaders = _find_leaders(pictures.rows, args.max_distance)
    pictures.write_lists(leaders != np.arange(len(leaders)), f"# ipa data dedup --max-distance {args.max_distance}\n")
    _describe(report, pictures, leaders)
    return report.finish(args.report or folders[paths[0]] / "dedup-report.json")


def _hash(paths: Sequence[Path], args: argparse.Namespace, report: Report) -> list[Path]:
    """Hash the shards that have no hashes yet; return those that have them now."""
    stale = [path for path in paths if not has_hashes(path, index_dir=args.index_dir)]
    report.facts["num_hashed_before"] = len(paths) - len(stale)
    refused = set()
    hash_one = partial(hash_shard, index_dir=args.index_dir)
    for path, result in run_tasks(hash_one, stale, description="hash", workers=args.workers):
        if isinstance(result, DataError):
            report.problem(str(result))
            refused.add(path)
    return [path for path in paths if path not in refused]


class Pictures:
    """The pictures of all shards, but those that other lists exclude; one row each, in order."""

    def __init__(self, folders: Mapping[Path, Path], index_dir: Path | None, report: Report) -> None:
        self._shards, self._folders, self._index_dir, self._report = list(folders), folders, index_dir, report
        self._excluded = {folder: read_excluded(folder, but=EXCLUDE_NAME) for folder in set(folders.values())}
        tables = []
        undecodable: list[str] = []
        for shard in self._shards:
            hashes = read_hashes(shard, index_dir=index_dir)
            takes_part = self._takes_part(shard, hashes.keys)
            tables.append(hashes.rows[takes_part])
            report.counts["excluded before"] += int((~takes_part).sum())
            undecodable += [f"{shard}/{failure}" for failure in hashes.failed]
        self._starts = np.cumsum([0, *map(len, tables)])
        self.rows = np.concatenate([*tables, np.empty(0, ROW)])
        report.counts["undecodable"] = len(undecodable)
        report.facts["undecodable"] = undecodable

    def name(self, row: int) -> str:
        """``folder/00000.tar/key`` of a picture."""
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        return f"{self._shards[number]}/{self._keys(self._shards[number])[row - self._starts[number]].decode()}"

    def write_lists(self, is_left_out: ndarray, header: str) -> None:
        """Write each folder's list of the pictures that are left out."""
        for folder in sorted(self._excluded):
            with atomic_write(folder / EXCLUDE_NAME) as temporary, temporary.open("w") as file:
                file.write(header)
                for shard, start, end in zip(self._shards, self._starts, self._starts[1:], strict=False):
                    if self._folders[shard] == folder and is_left_out[start:end].any():
                        keys = self._keys(shard)[is_left_out[start:end]]
                        file.writelines(f"{shard.name}/{key}\n" for key in self._listable(shard, keys))

    def _listable(self, shard: Path, keys: ndarray) -> Iterator[str]:
        for key in map(bytes.decode, keys):
            if is_listable(key):
                yield key
            else:
                self._report.problem(f"{shard}/{key!r}: no list can hold this key, so it stays in training")

    def _keys(self, shard: Path) -> ndarray:
        keys = read_hashes(shard, index_dir=self._index_dir).keys
        return keys[self._takes_part(shard, keys)]

    def _takes_part(self, shard: Path, keys: ndarray) -> ndarray:
        excluded = self._excluded[self._folders[shard]].get(shard.name, frozenset())
        return np.array([key.decode() not in excluded for key in keys], bool)


def _check_lists(folders: Mapping[Path, Path]) -> None:
    """Refuse to write a list anew that names shards which take no part this time."""
    for folder in set(folders.values()):
        path = folder / EXCLUDE_NAME
        lines = path.read_text().splitlines() if path.exists() else []
        named = {line.partition("/")[0] for line in lines if not line.startswith("#")}
        others = named - {shard.name for shard, of_shard in folders.items() if of_shard == folder}
        if others:
            raise ConfigError(
                f"{path} excludes samples of {min(others)} too, which was not named: name all shards of the folder, or "
                "delete the list."
            )


def _find_leaders(rows: ndarray, max_distance: int) -> ndarray:
    """For each picture the one to keep in its place; plain ones stand for others of equal bytes alone."""
    leaders = np.arange(len(rows))
    for column, distance, group in (
        ("looks", max_distance, np.flatnonzero(~rows["is_plain"])),
        ("content", 0, np.flatnonzero(rows["is_plain"])),
    ):
        leaders[group] = group[find_leaders(rows[column][group], rows["pixels"][group], distance)]
    return leaders


def _describe(report: Report, pictures: Pictures, leaders: ndarray) -> None:
    rows = pictures.rows
    left_out = np.flatnonzero(leaders != np.arange(len(rows)))
    kept = leaders[left_out]
    is_copy = rows["content"][left_out] == rows["content"][kept]
    distances = np.bitwise_count(rows["looks"][left_out] ^ rows["looks"][kept])
    report.counts["pictures"] = len(rows)
    report.counts["too plain to compare"] = int(rows["is_plain"].sum())
    report.counts["equal bytes"] = int(is_copy.sum())
    report.counts["near"] = int((~is_copy).sum())
    report.counts["kept"] = len(rows) - len(left_out)
    _, group_sizes = np.unique(kept, return_counts=True)
    report.facts["group_sizes"] = _histogram(group_sizes + 1)
    report.facts["distances"] = _histogram(distances)
    report.facts["examples"] = [  # the least alike: they show what a distance means
        {
            "kept": pictures.name(int(kept[i])),
            "left_out": pictures.name(int(left_out[i])),
            "distance": int(distances[i]),
        }
        for i in np.argsort(-distances.astype(int), kind="stable")[:_NUM_EXAMPLES]
    ]


def _histogram(values: ndarray) -> dict[int, int]:
    return dict(sorted(Counter(values.tolist()).items()))
