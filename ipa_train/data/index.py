"""The index of a set of shards: where every sample lies, so that any of them can be read by number.

    ds/00000.tar  00000_stats.json     img2dataset's output, never modified
    ds/00000.idx.npy                   one row per complete sample, by offset (``scan.py``)
    ds/00000.reference.idx.npy         the same for runs that need a reference, where samples without one are incomplete
    ds/index.json                      per shard: size and time of the tar, samples, how many left out, sha256 of rows
    ds/exclude-*.txt                   samples to leave out, one ``00000.tar/key`` per line; # begins a comment, at the
                                       start of a line or after a space

Built in parallel, written atomically, and reused while a tar's size and modification time, and what is excluded of it,
stay the same. Remote shards are indexed from local copies, and known by size and ETag.
"""

import fcntl
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy import ndarray
from tqdm import tqdm

from ipa_train.data.find import find_shards
from ipa_train.data.index_file import ShardEntry, make_index_folder, read_entries, write_entries
from ipa_train.data.local_copies import LocalCopies
from ipa_train.data.remote import Version, ask_version, find_remote, is_remote
from ipa_train.data.scan import EXTRAS, Content, Extra, row_type, scan
from ipa_train.data.sources import LocalFile, RemoteFile
from ipa_train.errors import ConfigError, DataError
from ipa_train.runtime.files import atomic_write
from ipa_train.runtime.processes import end_with_parent

MAX_MEMBER_BYTES = 64 * 2**20
"""What training takes unless data.max_member_bytes says otherwise."""
_PLACEABLE_BYTES = 2**30  # what 32 bits of a row can place
_SAVE_EVERY = 256  # shards: what a killed run may have to do again
_MAX_NAMED = 5
_COMMENT = re.compile(r"(?:^|\s)#")


@dataclass(frozen=True)
class Shard:
    """An indexed shard."""

    tar: LocalFile | RemoteFile
    rows_path: Path
    entry: ShardEntry

    @property
    def path(self) -> Path:
        """Of the tar; of a remote one, where its copy lies while there is one."""
        return self.tar.path

    @cached_property
    def name(self) -> str:
        """Base name of the tar."""
        return self.tar.name

    def open(self) -> int:
        """A descriptor of the tar, which is downloaded first if need be.

        Raises:
            DataError: it cannot be downloaded.
            OSError: it cannot be opened.
        """
        descriptor = self.tar.open()
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # it outlives the copy, whose place may be needed
        return descriptor

    def rows(self) -> ndarray:
        """The rows, mapped into memory rather than read.

        Raises:
            DataError: the file is not what was written.
        """
        try:
            mode: Literal["r"] | None = "r" if self.entry.num_samples else None  # nothing cannot be mapped
            rows = np.load(self.rows_path, mmap_mode=mode, allow_pickle=False)
            if (
                rows.dtype == row_type(self.entry.extras)
                and hashlib.sha256(rows.tobytes()).hexdigest() == self.entry.rows_sha256
            ):
                return rows
        except (ValueError, EOFError):
            pass
        raise DataError(
            f"{self.rows_path}: damaged index; delete it, and it is built anew (or start this run again, if another "
            "has indexed these shards meanwhile, say with other exclude lists)."
        )


@dataclass(frozen=True)
class Index:
    """All shards of a run, in the order they were named."""

    shards: tuple[Shard, ...]

    @cached_property
    def counts(self) -> ndarray:
        """Samples of each shard, int64."""
        return np.array([shard.entry.num_samples for shard in self.shards], dtype=np.int64)

    @property
    def is_remote(self) -> bool:
        """Whether any shard is read through a local copy."""
        return any(isinstance(shard.tar, RemoteFile) for shard in self.shards)

    @property
    def content(self) -> Content:
        """What the shards hold.

        Raises:
            ConfigError: some hold pictures, and some features.
        """
        kinds = {shard.entry.content: shard.tar.location for shard in self.shards}
        if len(kinds) > 1:
            raise ConfigError(
                f"data.shards: {kinds['features']} holds cached features and {kinds['pictures']} pictures: "
                "train on one kind, or encode the pictures too (ipa data encode)."
            )
        return next(iter(kinds))

    @cached_property
    def index_id(self) -> str:
        """Identity of the data: names, sizes and contents of the rows, in order."""
        facts = [(s.name, s.entry.num_samples, s.entry.rows_sha256) for s in self.shards]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


_Stale = tuple[LocalFile | RemoteFile, Path, frozenset[str]]
"""A tar, where its rows go, and the keys that are left out."""


def build_index(
    spec: str | Sequence[str],
    *,
    index_dir: Path | None = None,
    allow_missing_stats: bool = False,
    max_member_bytes: int = MAX_MEMBER_BYTES,
    num_workers: int | None = None,
    copies: LocalCopies | None = None,
    trust_index: bool = False,
    extras: Collection[Extra] = (),
) -> Index:
    """Index all shards of ``spec``, reusing what is up to date; the index goes beside the tars, or into ``index_dir``.

    Remote shards are read through ``copies``. ``trust_index`` takes them for what the index says, without asking the
    server: for processes that come after one that has asked. A shard is held to its version when it is downloaded.
    Samples of pictures that lack any of ``extras`` are incomplete.

    Raises:
        ConfigError: see :func:`find_shards` and :func:`find_remote`; or no folder to write to.
        DataError: shards are damaged, unfinished or empty; names them and the cure. The others stay indexed.
    """
    index, refused = index_sound_shards(
        spec,
        index_dir=index_dir,
        allow_missing_stats=allow_missing_stats,
        max_member_bytes=max_member_bytes,
        num_workers=num_workers,
        copies=copies,
        trust_index=trust_index,
        extras=extras,
    )
    if refused:
        raise DataError(" | ".join(map(str, refused[:_MAX_NAMED])) + _and_more(len(refused) - _MAX_NAMED))
    return index


def index_sound_shards(
    spec: str | Sequence[str],
    *,
    index_dir: Path | None = None,
    allow_missing_stats: bool = False,
    max_member_bytes: int = MAX_MEMBER_BYTES,
    num_workers: int | None = None,
    copies: LocalCopies | None = None,
    trust_index: bool = False,
    extras: Collection[Extra] = (),
) -> tuple[Index, list[DataError]]:
    """As :func:`build_index`, but an index of the sound shards and what is wrong with the others.

    Raises:
        ConfigError: see :func:`find_shards` and :func:`find_remote`; or no folder to write to.
    """
    if not 1 <= max_member_bytes <= _PLACEABLE_BYTES:
        raise ConfigError(f"data.max_member_bytes must be from 1 to {_PLACEABLE_BYTES}, got {max_member_bytes}.")
    if num_workers is not None and num_workers < 1:
        raise ConfigError(f"--workers must be at least 1, got {num_workers}.")
    tars = _find_tars(spec, index_dir, copies, trust_index, extras)
    folders = {tar.path.parent: index_dir or tar.path.parent for tar in tars}
    known = {folder: read_entries(folder) for folder in set(folders.values())}
    excluded = {folder: read_excluded(folder) for folder in known}
    shards: dict[str, Shard] = {}
    refused: list[DataError] = []
    stale: list[_Stale] = []
    for tar in tars:
        folder = folders[tar.path.parent]
        rows_path = folder / _rows_name(tar, extras, shared=index_dir is not None)
        keys = excluded[folder].get(tar.name, frozenset())
        entry = known[folder].get(rows_path.name)
        is_current = entry is not None and (Version(entry.tar_bytes, entry.tar_version), entry.excluded_sha256) == (
            tar.version,
            _hash_keys(keys),
        )
        if entry and is_current and rows_path.exists():
            shards[tar.location] = Shard(tar, rows_path, entry)
        else:
            stale.append((tar, rows_path, keys))
    if stale:
        for folder in known:
            make_index_folder(folder)
        options: dict[str, Any] = {"allow_missing_stats": allow_missing_stats, "max_member_bytes": max_member_bytes}
        task = partial(_index_shard, **options, extras=extras)
        try:
            for number, result in enumerate(_run(task, stale, num_workers), 1):
                if isinstance(result, DataError):
                    refused.append(result)
                    continue
                shards[result.tar.location] = result
                known[result.rows_path.parent][result.rows_path.name] = result.entry
                if number % _SAVE_EVERY == 0:
                    write_entries(known)
        finally:  # hours of indexing survive one bad shard, and Ctrl-C
            write_entries(known)
    return Index(tuple(shards[tar.location] for tar in tars if tar.location in shards)), refused


def _find_tars(
    spec: str | Sequence[str],
    index_dir: Path | None,
    copies: LocalCopies | None,
    trust_index: bool,
    extras: Collection[Extra],
) -> list[LocalFile | RemoteFile]:
    """The tars of ``spec`` in order, local ones as :func:`find_shards` has them."""
    items = [spec] if isinstance(spec, str) else list(spec)
    if not any(map(is_remote, items)):
        return [LocalFile.find(path) for path in find_shards(spec)]
    if copies is None or index_dir is None:
        raise ConfigError(
            f"data.shards={next(filter(is_remote, items))}: remote shards need data.cache_dir, a folder on a local "
            "disk for copies of them, and data.index_dir, a folder that all nodes see."
        )
    tars: list[LocalFile | RemoteFile] = []
    entries = read_entries(index_dir) if trust_index else {}
    patience = copies.patience_seconds
    for item in items:
        if not is_remote(item):
            tars += [LocalFile.find(path) for path in find_shards(item)]
            continue
        for url, version in find_remote(item, patience_seconds=patience, ask=not trust_index).items():
            entry = entries.get(_rows_name(RemoteFile(url, Version(0, ""), copies), extras, shared=True))
            version = Version(entry.tar_bytes, entry.tar_version) if entry else version
            tars.append(RemoteFile(url, version or ask_version(url, patience_seconds=patience), copies))
    twice = [name for name, count in Counter(tar.location for tar in tars).items() if count > 1]
    if twice:
        raise ConfigError(f"data.shards names {twice[0]} more than once.")
    copies.prepare()
    return tars


def _and_more(number: int) -> str:
    return f" | and {number} more shards" if number > 0 else ""


def _run(task: partial[Shard | DataError], stale: list[_Stale], num_workers: int | None) -> Iterator[Shard | DataError]:
    workers = min(num_workers or os.cpu_count() or 1, len(stale))
    bar = partial(tqdm, total=len(stale), desc="index", unit="shard", disable=len(stale) < 8)
    if workers == 1 or len(stale) < 8:
        yield from bar(map(task, stale))
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=end_with_parent) as pool:
        yield from bar(pool.map(task, stale, chunksize=4))


def _index_shard(
    stale: _Stale, *, allow_missing_stats: bool, max_member_bytes: int, extras: Collection[Extra]
) -> Shard | DataError:
    """Index one shard; a refusal is handed back, so that one bad shard does not end the work on the others."""
    try:
        return _index_sound_shard(stale, allow_missing_stats, max_member_bytes, extras)
    except DataError as error:
        return error
    except OSError as error:
        return DataError(f"{stale[0].location}: cannot be indexed: {error}")


def _index_sound_shard(
    stale: _Stale, allow_missing_stats: bool, max_member_bytes: int, extras: Collection[Extra]
) -> Shard:
    tar, rows_path, excluded = stale
    num_written = 0 if allow_missing_stats else _num_written(tar)
    descriptor = tar.open()  # keeps a copy from being evicted
    try:
        found = scan(tar.path, max_member_bytes=max_member_bytes, excluded=excluded, extras=extras)
    except DataError as error:
        raise DataError(str(error).replace(str(tar.path), tar.location)) from error
    finally:
        os.close(descriptor)
    num_found = len(found.rows) + found.num_incomplete + found.num_excluded
    if num_found < num_written:
        raise DataError(
            f"{tar.location}: holds {num_found} samples, but {_stats_name(tar)} says that {num_written} were written; "
            "download the shard again, or set data.allow_missing_stats=true to train on what is left."
        )
    with atomic_write(rows_path) as temporary, temporary.open("wb") as file:
        np.save(file, found.rows)
    short_sides = np.minimum(found.rows["width"], found.rows["height"]).astype(np.int64)
    known = short_sides[short_sides > 0]
    entry = ShardEntry(
        tar_bytes=tar.version.num_bytes,
        tar_version=tar.version.tag,
        num_samples=len(found.rows),
        num_incomplete=found.num_incomplete,
        num_excluded=found.num_excluded,
        excluded_sha256=_hash_keys(excluded),
        content=found.content,
        min_short_side=int(known.min()) if len(known) else 0,
        max_short_side=int(known.max()) if len(known) else 0,
        rows_sha256=hashlib.sha256(found.rows.tobytes()).hexdigest(),
        extras=list(found.extras),
        found_extras=list(found.found_extras),
    )
    return Shard(tar, rows_path, entry)


def _stats_name(tar: LocalFile | RemoteFile) -> str:
    return f"{Path(tar.name).stem}_stats.json"


def _num_written(tar: LocalFile | RemoteFile) -> int:
    """How many samples the mark beside a complete shard tells of; 0 if it tells nothing.

    Raises:
        DataError: there is no such mark, or it is damaged.
    """
    name = _stats_name(tar)
    try:
        stats = json.loads(tar.read_beside(name))
        return int(stats.get("successes", 0)) if isinstance(stats, dict) else 0
    except FileNotFoundError as error:
        raise DataError(
            f"{tar.location}: no {name} beside it, which img2dataset writes when a shard is complete; download the "
            "shard again, or set data.allow_missing_stats=true for shards of another writer."
        ) from error
    except (ValueError, TypeError) as error:
        raise DataError(f"{tar.location}: {name} is damaged ({error}); download the shard again.") from error


def read_excluded(folder: Path, *, but: str = "") -> dict[str, frozenset[str]]:
    """Shard name -> keys to leave out, from all exclude lists of a folder ``but`` the one of that name.

    Raises:
        DataError: a list is not UTF-8, or a line is not ``00000.tar/key``.
    """
    keys: dict[str, set[str]] = {}
    for path in sorted(folder.glob("exclude-*.txt")):
        if path.name == but:
            continue
        try:
            lines = path.read_text("utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: not UTF-8 ({error.reason}); write it anew.") from error
        for number, line in enumerate(lines, 1):
            shard, slash, key = _COMMENT.split(line)[0].strip().partition("/")
            if slash and shard and key:
                keys.setdefault(shard, set()).add(key)
            elif shard:
                raise DataError(f"{path}: line {number} is {line!r}; write one 00000.tar/key per line.")
    return {shard: frozenset(found) for shard, found in keys.items()}


def _hash_keys(keys: frozenset[str]) -> str:
    return hashlib.sha256("\n".join(sorted(keys)).encode()).hexdigest()[:16] if keys else ""


def _rows_name(tar: LocalFile | RemoteFile, extras: Collection[Extra], *, shared: bool) -> str:
    """Another one for other extras: runs that need them and runs that do not may use the shards at once."""
    if isinstance(tar, LocalFile):
        name = name_beside(tar.path, shared=shared)
    else:
        name = f"{Path(tar.name).stem}-{hashlib.sha256(tar.location.encode()).hexdigest()[:8]}"
    return ".".join([name, *(extra for extra in EXTRAS if extra in extras), "idx.npy"])


def name_beside(path: Path, *, shared: bool) -> str:
    """How files that belong to a shard begin; in a folder shared by several sources it tells them apart."""
    return f"{path.stem}-{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]}" if shared else path.stem
