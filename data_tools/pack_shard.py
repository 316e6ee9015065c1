"""One shard from the entries of a pack list: every sample is read, judged, and written or left out by name."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_tools.pack_list import Entry, read_list
from data_tools.shard_writer import open_shard
from ipa_train.data.decode import decode
from ipa_train.data.image_prompts import check_extras
from ipa_train.data.index import MAX_MEMBER_BYTES
from ipa_train.data.scan import EXTRAS, IMAGE_SUFFIXES, TEXT_SUFFIX, Extra
from ipa_train.errors import DataError
from ipa_train.runtime.files import atomic_write

REPEATED = "entries that came before"


@dataclass(frozen=True)
class PackTask:
    """One shard to write."""

    list_path: Path
    number: int
    shard: Path
    first: int
    """Position of its first entry among all."""
    repeated: frozenset[int]
    """Which of its entries came before."""


class _LeftOutError(Exception):
    """A sample that cannot be packed: what kind of failure, a word on it, and the file, if not the sample's picture."""

    def __init__(self, kind: str, why: str = "", path: Path | None = None) -> None:
        super().__init__(kind, why, path)
        self.kind, self.why, self.path = kind, why, path


def pack_shard(task: PackTask, *, max_pixels: int) -> None:
    """Write a shard, the parquet of its metadata beside it, and what was left out of it into its statistics.

    Raises:
        DataError: nothing is left of it.
    """
    rows = []
    with open_shard(task.shard) as writer:
        for row, entry in enumerate(read_list(task.list_path, task.number)):
            key = f"{task.first + row:09d}"  # 5 digits of shard and 4 of sample, at the usual 10,000 per shard
            try:
                if row in task.repeated:
                    raise _LeftOutError(REPEATED)
                members, facts = _read_sample(entry, max_pixels)
            except _LeftOutError as error:
                name = os.fsencode(error.path or entry.path(entry.image or b"")).decode(errors="replace")
                writer.leave_out(key, f"{error.kind}: {name}{error.why and f': {error.why}'}")
                continue
            rows.append({**json.loads(entry.columns), "key": key, **facts, "status": "success"})
            text = json.dumps(rows[-1]).encode()
            writer.write(key, {**members, TEXT_SUFFIX: facts["caption"].encode(), "json": text})
        if not rows:
            first = next(iter(writer.left_out.values()))
            raise DataError(f"none of its {len(writer.left_out)} samples can be packed, first {first}")
        with atomic_write(task.shard.with_suffix(".parquet")) as temporary:
            pq.write_table(_as_table(rows), temporary)


def _read_sample(entry: Entry, max_pixels: int) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Pictures and embedding by suffix, and what img2dataset says of a sample."""
    if not entry.image:
        raise _LeftOutError("without a picture's name", entry.columns)
    suffix, data = _read_picture(entry.path(entry.image), "pictures")
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
        height, width, _ = decode(data, max_pixels=max_pixels).shape
    except DataError as error:
        raise _LeftOutError("damaged pictures", str(error)) from error
    source = entry.image.decode(errors="replace")
    members = {suffix: data} | _read_extras(entry, (height, width), max_pixels)
    return members, {"source": source, "caption": text, "width": width, "height": height}


def _read_extras(entry: Entry, size: tuple[int, int], max_pixels: int) -> dict[str, bytes]:
    """By suffix; ``size`` is the (height, width) of the picture."""
    extras: dict[Extra, bytes] = {}
    suffixes = dict(EXTRAS)
    if entry.reference:
        suffix, extras["reference"] = _read_picture(entry.path(entry.reference), "references")
        suffixes["reference"] = f"ref.{suffix}"
    if entry.mask:
        extras["mask"] = _read(entry.path(entry.mask), "missing or unreadable masks")
    if entry.embedding:
        extras["embedding"] = _read(entry.path(entry.embedding), "missing or unreadable embeddings")
    try:
        check_extras(extras, size, max_pixels)
    except DataError as error:
        raise _LeftOutError("references, masks or embeddings that training would refuse", str(error)) from error
    return {suffixes[extra]: data for extra, data in extras.items()}


def _read_picture(path: Path, kind: str) -> tuple[str, bytes]:
    """Suffix and bytes."""
    suffix = path.suffix[1:].lower()
    if suffix not in IMAGE_SUFFIXES:
        raise _LeftOutError(f"{kind} of other kinds than " + "/".join(IMAGE_SUFFIXES), path=path)
    data = _read(path, f"missing or unreadable {kind}")
    if len(data) > MAX_MEMBER_BYTES:
        raise _LeftOutError(f"{kind} too large for training", f"above {MAX_MEMBER_BYTES} bytes", path)
    return suffix, data


def _read(path: Path, kind: str) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(MAX_MEMBER_BYTES + 1)
    except OSError as error:
        raise _LeftOutError(kind, str(error.strerror), path) from error
    except ValueError as error:  # a zero byte in the name
        raise _LeftOutError(kind, str(error), path) from error


def _as_table(rows: list[dict[str, Any]]) -> pa.Table:
    """A column of several types becomes text."""
    table = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row.get(name) for row in rows]
        try:
            table[name] = pa.array(values)
        except (pa.ArrowException, OverflowError):
            table[name] = pa.array([value if value is None else json.dumps(value) for value in values])
    return pa.table(table)
