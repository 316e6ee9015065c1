"""Everything that can be wrong with one shard, found by reading and decoding all of it.

Beside the shard (or in the index's folder) stay ``NAME.crc.npy`` (:mod:`data_tools.checksums`) and, written last,
``NAME.validated.json``: what was found. It holds as long as the tar's size and time do, so that a killed run goes on.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data_tools.checksums import changed_keys, crc_of, read_checksums, write_checksums
from data_tools.shard_writer import stats_path
from ipa_train.data.cache import Layout, read_description
from ipa_train.data.decode import decode
from ipa_train.data.image_prompts import check_extras
from ipa_train.data.index import MAX_MEMBER_BYTES, name_beside
from ipa_train.data.scan import EXTRAS, FLIPPED_SUFFIX, TEXT_SUFFIX, Extra, Scan, find_samples, scan
from ipa_train.data.tar import Member
from ipa_train.errors import ConfigError, DataError
from ipa_train.runtime.files import atomic_write

_ROTTEN = "its bytes changed since they were validated, though size and time of the file did not"


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What is kept of a validated shard, and what it depends on."""

    tar_bytes: int
    tar_mtime_ns: int
    max_pixels: int
    extras: list[Extra] = field(default_factory=list)
    """What every sample should hold besides."""
    num_samples: int
    """Complete ones, good and bad."""
    num_incomplete: int
    num_empty_captions: int
    bad: dict[str, str]
    """Key -> what is wrong with the sample."""


@dataclass(frozen=True)
class ShardFindings:
    """One shard, sound on the whole."""

    kept: Kept
    reused: bool
    """Not read, because it was before."""
    num_changed: int = 0
    """Samples whose bytes are not those that were validated last."""
    problems: list[str] = field(default_factory=list)
    """Of the shard as a whole."""


def checksums_path(shard: Path, index_dir: Path | None) -> Path:
    """Where a shard's checksums lie."""
    folder, shared = (shard.parent, False) if index_dir is None else (index_dir, True)
    return folder / f"{name_beside(shard, shared=shared)}.crc.npy"


def check_shard(
    shard: Path,
    *,
    index_dir: Path | None,
    allow_missing_stats: bool,
    max_pixels: int,
    reread: bool,
    extras: Sequence[Extra] = (),
) -> ShardFindings:
    """Read and decode a whole shard, unless that was done and ``reread`` is not set; samples need all ``extras``.

    Raises:
        DataError: training would refuse the whole shard.
    """
    table_path = checksums_path(shard, index_dir)
    kept_path = table_path.with_name(f"{table_path.name.removesuffix('.crc.npy')}.validated.json")
    before, table = _read_kept(kept_path), read_checksums(table_path)
    stat = shard.stat()
    is_same_file = before is not None and (before.tar_bytes, before.tar_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
    is_same_check = before is not None and (before.max_pixels, before.extras) == (max_pixels, list(extras))
    if before and table is not None and is_same_file and is_same_check and not reread:
        return ShardFindings(before, True, problems=_compare_with_stats(shard, before, allow_missing_stats))
    found = scan(shard, max_member_bytes=MAX_MEMBER_BYTES, extras=extras)
    bad, crcs, num_empty = _check_samples(shard, found, max_pixels)
    changed, num_gone = ([], 0) if table is None else changed_keys(table, crcs)
    problems = []
    if is_same_file and (changed or num_gone):  # the checksums stay as they were: they are the right ones
        bad |= dict.fromkeys(changed, _ROTTEN)
        problems += [f"{shard}: {num_gone} samples are gone since it was validated"] if num_gone else []
    else:
        write_checksums(table_path, crcs)
    kept = Kept(
        tar_bytes=stat.st_size,
        tar_mtime_ns=stat.st_mtime_ns,
        max_pixels=max_pixels,
        extras=list(extras),
        num_samples=len(found.rows),
        num_incomplete=found.num_incomplete,
        num_empty_captions=num_empty,
        bad=bad,
    )
    with atomic_write(kept_path) as temporary:
        temporary.write_text(json.dumps(asdict(kept)))
    problems += _compare_with_stats(shard, kept, allow_missing_stats)
    return ShardFindings(kept, False, len(changed), problems)


def _read_kept(path: Path) -> Kept | None:
    try:
        return Kept(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _compare_with_stats(shard: Path, kept: Kept, allow_missing_stats: bool) -> list[str]:
    path = stats_path(shard)
    if not path.exists():
        missing = f"{shard}: no {path.name} beside it: unfinished, or of another writer (--allow-missing-stats)"
        return [] if allow_missing_stats else [missing]
    try:
        claimed: Any = json.loads(path.read_text())["successes"]
    except (ValueError, KeyError, TypeError) as error:
        return [f"{path}: damaged: it has no number of successes ({error})"]
    num_found = kept.num_samples + kept.num_incomplete
    return [] if claimed == num_found else [f"{shard}: holds {num_found} samples, but {path.name} says {claimed}"]


def _check_samples(shard: Path, found: Scan, max_pixels: int) -> tuple[dict[str, str], dict[str, int], int]:
    """What is wrong with which sample, every sample's CRC-32, and how many captions are empty."""
    if found.content == "features":
        try:
            read_description(shard.parent)
        except ConfigError as error:
            raise DataError(str(error)) from error
    bad: dict[str, str] = {}
    crcs: dict[str, int] = {}
    num_empty, layout = 0, None
    descriptor = os.open(shard, os.O_RDONLY)
    try:
        for key, members in find_samples(shard, max_member_bytes=MAX_MEMBER_BYTES).items():
            data = {kind: _read(descriptor, member) for kind, member in members.items()}
            crcs[key] = crc_of((member.name, data[kind]) for kind, member in members.items())
            if not {"content", TEXT_SUFFIX, *(EXTRAS[extra] for extra in found.extras)} <= data.keys():
                continue
            try:
                num_empty += not _caption(data).strip()
                if found.content == "pictures":
                    height, width, _ = decode(data["content"], max_pixels=max_pixels).shape
                    extras: list[Extra] = [*found.extras]
                    if "mask" in extras and EXTRAS["reference"] in data:
                        extras.append("reference")  # whose mask it is
                    check_extras({extra: data[EXTRAS[extra]] for extra in extras}, (height, width), max_pixels)
                else:
                    layout = layout or Layout(data["content"])
                    for kind in {"content", FLIPPED_SUFFIX} & data.keys():
                        layout.check(data[kind])
            except DataError as error:
                bad[key] = str(error)
    finally:
        os.close(descriptor)
    return bad, crcs, num_empty


def _read(descriptor: int, member: Member) -> bytes:
    data = os.pread(descriptor, member.size, member.data_offset)
    if len(data) < member.size:
        raise DataError(f"{member.name}: the tar became shorter while it was read")
    return data


def _caption(data: Mapping[str, bytes]) -> str:
    try:
        return data[TEXT_SUFFIX].decode()
    except UnicodeDecodeError as error:
        raise DataError("the caption is not UTF-8") from error
