"""What ``ipa data pack`` packs, as one parquet file whose row groups are the shards, whatever the sources are.

So a worker reads the rows of its shard alone. In memory are the rows of one shard, and eight bytes per sample to find
those that come twice.
"""

import hashlib
import os
from array import array
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int64
from numpy import ndarray

from ipa_train.data.scan import EXTRAS
from ipa_train.runtime.files import atomic_write


class Entry(NamedTuple):
    """One sample to be; names and captions are bytes, because nothing says yet that they are UTF-8."""

    root: bytes
    """Absolute path."""
    image: bytes | None
    """Path below ``root``."""
    caption: bytes | None
    caption_file: bytes | None
    """Path below ``root`` of the file that holds the caption instead."""
    columns: str
    """Whatever else the source says of the sample, as a JSON object."""
    reference: bytes | None = None
    """Path below ``root``, as of the next two."""
    mask: bytes | None = None
    embedding: bytes | None = None

    def path(self, name: bytes) -> Path:
        """Of the file ``name``."""
        return Path(os.fsdecode(self.root)) / os.fsdecode(name)


_SCHEMA = pa.schema([(name, pa.string() if name == "columns" else pa.binary()) for name in Entry._fields])


class PackList(NamedTuple):
    """A written list."""

    path: Path
    num_entries: int
    sha256: str
    """Of names, captions and columns; not of what the files hold, nor of where the sources lie."""
    repeated: Int64[ndarray, "r"]
    """Positions of entries whose picture, caption, and what else the image prompt is made of came before, in order."""


def write_list(path: Path, entries: Iterable[Entry], *, shard_size: int) -> PackList:
    """Write ``entries`` in row groups of ``shard_size``."""
    remaining, identity, keys, num_entries = iter(entries), hashlib.sha256(), array("Q"), 0
    with atomic_write(path) as temporary, pq.ParquetWriter(temporary, _SCHEMA) as writer:
        while rows := list(islice(remaining, shard_size)):
            for entry in rows:
                identity.update(repr(entry[1:]).encode())
                same = entry.root + b"/" + (entry.image or b""), entry.caption, *(getattr(entry, e) for e in EXTRAS)
                keys.frombytes(hashlib.blake2b(repr(same).encode(), digest_size=8).digest())
            columns = zip(_SCHEMA, zip(*rows, strict=True), strict=True)
            table = pa.Table.from_arrays([pa.array(column, field.type) for field, column in columns], schema=_SCHEMA)
            writer.write_table(table, row_group_size=shard_size)
            num_entries += len(rows)
    hashes = np.frombuffer(keys, np.uint64)
    order = np.argsort(hashes, kind="stable")
    is_repeated = hashes[order][1:] == hashes[order][:-1]
    return PackList(path, num_entries, identity.hexdigest()[:16], np.sort(order[1:][is_repeated]))


def read_list(path: Path, shard: int) -> list[Entry]:
    """The entries of one shard."""
    table = pq.ParquetFile(path).read_row_group(shard)
    return [Entry(*row) for row in zip(*(column.to_pylist() for column in table.columns), strict=True)]
