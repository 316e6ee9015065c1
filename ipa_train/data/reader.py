"""Random access to the samples of indexed shards."""

import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy import ndarray

from ipa_train.data.buckets import Bucket, shard_buckets
from ipa_train.data.index import Index
from ipa_train.data.scan import Extra
from ipa_train.data.tar import BLOCK
from ipa_train.errors import DataError

_MAX_OPEN_SHARDS = 256
"""What the windows of all lanes span, at shards of 10,000 samples. Each takes two descriptors, of the tar and of its
rows, and a process may usually have 1,024."""
_MAX_GAP_BYTES = 2**16


@dataclass
class _OpenShard:
    descriptor: int
    rows: ndarray
    by_bucket: list[ndarray]
    """Row numbers of each bucket, where the shard's pictures fall into several; else empty."""


class StoredSample(NamedTuple):
    """One sample as it is stored."""

    content: bytes
    caption: str
    key: str
    extras: dict[Extra, bytes]
    """What its index places besides."""


class ShardReader:
    """Reads single samples of indexed shards; keeps the last used shards open."""

    def __init__(self, index: Index, buckets: Sequence[Bucket] = ()) -> None:
        self.index = index
        self.buckets = list(buckets) if len(buckets) > 1 and index.content == "pictures" else []
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()

    def counts(self, shard: int) -> list[int]:
        """Samples of a shard in each bucket. Raises DataError as :meth:`read` does."""
        opened = self._shard(shard)
        return [len(numbers) for numbers in opened.by_bucket] if self.buckets else [len(opened.rows)]

    def row(self, shard: int, bucket: int, number: int) -> int:
        """Row of the shard's ``number``-th sample in a bucket. Raises DataError as :meth:`read` does."""
        return int(self._shard(shard).by_bucket[bucket][number]) if self.buckets else number

    def read(self, shard: int, row: int) -> StoredSample:
        """Read a sample, with one system call.

        Raises:
            DataError: the shard cannot be read or is shorter than its index says, or the caption is no UTF-8.
        """
        opened = self._shard(shard)
        offset, length, content_start, content_length, text_start, text_length, _, _, _, *places = opened.rows.item(row)
        data = _pread(opened.descriptor, length, offset)
        content = data[content_start : content_start + content_length]
        caption = _decode_caption(data[text_start : text_start + text_length])
        parts = (data[start : start + size] for start, size in zip(places[::2], places[1::2], strict=True))
        extras = dict(zip(self.index.shards[shard].entry.extras, parts, strict=True))
        return StoredSample(content, caption, _key(data[content_start - BLOCK : content_start]), extras)

    def caption(self, shard: int, row: int) -> str:
        """A sample's caption alone. Raises DataError as :meth:`read` does."""
        opened = self._shard(shard)
        offset, _, _, _, text_start, text_length, *_ = opened.rows.item(row)
        return _decode_caption(_pread(opened.descriptor, text_length, offset + text_start))

    def read_into(
        self, shard: int, row: int, buffers: Sequence[bytearray | memoryview], *, num_bytes: int, flipped: bool
    ) -> tuple[str, str]:
        """Read the sample's features straight into ``buffers``, ``num_bytes`` in all; return (caption, key).

        A caption that lies close behind its features, as it does in our own caches, comes with the same system call.

        Raises:
            DataError: as :meth:`read`, or the features are of another length, or there are no flipped ones.
        """
        opened = self._shard(shard)
        offset, _, content_start, content_length, text_start, text_length, flipped_start, *_ = opened.rows.item(row)
        start = flipped_start if flipped else content_start
        if not start:
            raise DataError("has no flipped features: encode with --flip, or set data.flip_rate=0")
        if content_length != num_bytes:
            raise DataError(f"its features are {content_length} bytes long, unlike those of its neighbours")
        header, gap = bytearray(BLOCK), text_start - start - num_bytes
        is_near = 0 <= gap <= _MAX_GAP_BYTES
        behind = bytearray(gap + text_length if is_near else 0)
        try:
            length = os.preadv(opened.descriptor, [header, *buffers, behind], offset + start - BLOCK)
        except OSError as error:
            raise DataError(f"cannot read: {error.strerror}") from error
        if length < BLOCK + num_bytes:
            raise _truncated(max(0, length - BLOCK), num_bytes)
        caption: bytes | bytearray
        if not is_near:
            caption = _pread(opened.descriptor, text_length, offset + text_start)
        elif length == BLOCK + num_bytes + len(behind):
            caption = behind[gap:]
        else:
            raise _truncated(max(0, length - BLOCK - num_bytes - gap), text_length)
        return _decode_caption(caption), _key(header)

    def head(self, shard: int, length: int) -> bytes:
        """The first bytes of the content of the shard's first sample. Raises DataError as :meth:`read` does."""
        opened = self._shard(shard)
        row = opened.rows[0]
        return _pread(opened.descriptor, length, int(row["offset"]) + int(row["content_start"]))

    def key(self, shard: int, row: int) -> str:
        """Name of a sample in its shard, as far as it can still be read."""
        try:
            opened = self._shard(shard)
            where = opened.rows[row]
            start = int(where["offset"]) + int(where["content_start"]) - BLOCK
            key = _key(os.pread(opened.descriptor, BLOCK, start))
        except (OSError, DataError):
            key = ""
        return key or f"row {row}"

    def _shard(self, shard: int) -> _OpenShard:
        opened = self._open.get(shard)
        if opened is None:
            source = self.index.shards[shard]
            try:
                rows = source.rows()
                by_bucket = []
                if self.buckets:
                    numbers = shard_buckets(rows, self.buckets)
                    by_bucket = [np.flatnonzero(numbers == bucket) for bucket in range(len(self.buckets))]
                opened = self._open[shard] = _OpenShard(source.open(), rows, by_bucket)
            except OSError as error:
                raise DataError(f"cannot open: {error.strerror}") from error
            if len(self._open) > _MAX_OPEN_SHARDS:
                os.close(self._open.popitem(last=False)[1].descriptor)
        self._open.move_to_end(shard)
        return opened

    def __getstate__(self) -> dict[str, object]:
        # Descriptors do not cross to another process.
        return {"index": self.index, "buckets": self.buckets, "_open": OrderedDict()}

    def __del__(self) -> None:
        for opened in self._open.values():
            os.close(opened.descriptor)


def _pread(descriptor: int, length: int, offset: int) -> bytes:
    try:
        data = os.pread(descriptor, length, offset)
    except OSError as error:
        raise DataError(f"cannot read: {error.strerror}") from error
    if len(data) < length:
        raise _truncated(len(data), length)
    return data


def _truncated(got: int, length: int) -> DataError:
    return DataError(f"truncated since it was indexed: {got} of {length} bytes")


def _decode_caption(data: bytes | bytearray) -> str:
    try:
        return data.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise DataError("the caption is not UTF-8") from error


def _key(header: bytes | bytearray) -> str:
    return header[:100].split(b"\0", 1)[0].decode(errors="replace").removeprefix("./").partition(".")[0]
