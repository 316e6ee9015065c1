"""A strict walk over tar headers: every byte of a shard is accounted for, or the shard is refused.

Ordinary readers stop without a word at a damaged header or a cut on a 512-byte boundary (measured: 25 to 150 samples
lost, no error). Nothing is extracted, and nothing but sizes and names is believed.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ipa_train.errors import DataError

BLOCK = 512
_REGULAR = (b"0", b"\0")
_MAX_PADDING = 2**20
"""Zero bytes that may follow the last member; tar writers fill up to a record, of 10 KiB as a rule."""
_DIRECTORY, _PAX, _PAX_GLOBAL, _GNU_LONG_NAME = b"5", b"x", b"g", b"L"


@dataclass(frozen=True)
class Member:
    """One regular file of a tar."""

    name: str
    start: int
    """Offset of the first header block that belongs to it, in bytes."""
    data_offset: int
    size: int


def walk(path: Path, *, max_member_bytes: int) -> Iterator[Member]:
    """Yield the regular members of a tar in order.

    Raises:
        DataError: the file is cut short, a header is damaged, or there is a member that no shard should have (links,
            devices, sparse files, a path in its name, more than ``max_member_bytes``).
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield from _walk(descriptor, path, max_member_bytes)
    finally:
        os.close(descriptor)


def _walk(descriptor: int, path: Path, max_member_bytes: int) -> Iterator[Member]:
    end = os.fstat(descriptor).st_size
    position, start = 0, 0
    overrides: dict[str, str] = {}
    while True:
        header = os.pread(descriptor, BLOCK, position)
        if len(header) < BLOCK:
            raise DataError(
                f"{path}: truncated at byte {end} (no end-of-archive mark after byte {position}); download it again."
            )
        if not any(header):
            if overrides:
                raise DataError(f"{path}: truncated: an extended header at byte {start} has no member.")
            _check_padding(descriptor, path, position, end)
            return
        if _checksum(header) != _octal(header[148:156]):
            raise DataError(f"{path}: damaged tar header at byte {position}; download it again.")
        kind, size = header[156:157], _size(header, overrides)
        if not 0 <= size <= max_member_bytes:
            raise DataError(
                f"{path}: the member at byte {position} claims {size} bytes; allowed are 0 to "
                f"data.max_member_bytes={max_member_bytes}."
            )
        data = position + BLOCK
        following = data + -(-size // BLOCK) * BLOCK
        if following > end:
            raise DataError(f"{path}: truncated inside the member at byte {position}; download it again.")
        if kind == _PAX:
            records = _pax_records(os.pread(descriptor, size, data))
            if records is None:
                raise DataError(f"{path}: damaged extended header at byte {position}; download it again.")
            overrides |= records
        elif kind == _GNU_LONG_NAME:
            overrides["path"] = os.pread(descriptor, size, data).rstrip(b"\0").decode(errors="replace")
        elif kind in _REGULAR:
            name = overrides.pop("path", _name(header)).removeprefix("./")
            if "/" in name or name in ("", "..") or any("sparse" in key for key in overrides):
                raise DataError(f"{path}: member {name!r} at byte {position} is not a plain file name; pack it flat.")
            yield Member(name, start, data, size)
        elif kind not in (_DIRECTORY, _PAX_GLOBAL):
            raise DataError(
                f"{path}: the member at byte {position} is a link or special file; shards hold plain files."
            )
        position = following
        if kind not in (_PAX, _GNU_LONG_NAME):
            overrides.clear()
            start = position


def _check_padding(descriptor: int, path: Path, position: int, end: int) -> None:
    """Nothing but a little padding may follow the end mark.

    A wiped header, a second archive behind the first, or the hole that an interrupted download left in a file of full
    length would otherwise pass for the end, and hide every sample behind it.
    """
    if end - position > _MAX_PADDING or any(os.pread(descriptor, _MAX_PADDING, position)):
        raise DataError(
            f"{path}: damaged: its members end at byte {position}, but {end - position} more bytes follow that are "
            "not the padding of a tar; download or pack it again."
        )


def _checksum(header: bytes) -> int:
    return sum(header) - sum(header[148:156]) + 8 * ord(" ")


def _octal(field: bytes) -> int:
    try:
        return int(field.strip(b"\0 ") or b"0", 8)
    except ValueError:
        return -1


def _size(header: bytes, overrides: dict[str, str]) -> int:
    """Size in bytes, in octal, or big-endian binary if the top bit is set (GNU); -1 if it cannot be read."""
    if "size" in overrides:
        text = overrides["size"]
        return int(text) if text.isascii() and text.isdigit() else -1
    field = header[124:136]
    return int.from_bytes(field[1:], "big") if field[0] & 0x80 else _octal(field)


def _name(header: bytes) -> str:
    name = header[:100].rstrip(b"\0").decode(errors="replace")
    prefix = header[345:500].rstrip(b"\0").decode(errors="replace") if header[257:262] == b"ustar" else ""
    return f"{prefix}/{name}" if prefix else name


def _pax_records(data: bytes) -> dict[str, str] | None:
    """Read ``length key=value`` records; None if they are damaged."""
    records = {}
    while data:
        length, _, _ = data.partition(b" ")
        if not length.isdigit() or not len(length) < int(length) <= len(data):
            return None
        record, data = data[: int(length)], data[int(length) :]
        key, equals, value = record[len(length) + 1 : -1].partition(b"=")
        if not equals or record[-1:] != b"\n":
            return None
        records[key.decode(errors="replace")] = value.decode(errors="replace")
    return records
