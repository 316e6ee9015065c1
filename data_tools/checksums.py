"""What is kept of a validated shard: per sample a hash of its key and the CRC-32 of its bytes, sorted by hash.

Files of 12 bytes per sample; with them keys that come twice are found among any number of shards in bounded memory,
and bytes that changed on disk are noticed (:mod:`data_tools.validate`).
"""

import hashlib
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt64
from numpy import ndarray

from ipa_train.runtime.files import atomic_write

CHECKSUM = np.dtype([("key", "<u8"), ("crc", "<u4")])
_KEYS_PER_PASS = 2**25
"""How many keys are looked at together: 0.8 GB."""


def hash_key(key: str) -> int:
    """64 bits of a key; of 372 million keys two differ and hash alike with a chance of 0.4 %."""
    return int.from_bytes(hashlib.blake2b(key.encode(errors="surrogateescape"), digest_size=8).digest(), "little")


def crc_of(members: Iterable[tuple[str, bytes]]) -> int:
    """CRC-32 of a sample's file names and bytes, in the order they have in the tar."""
    crc = 0
    for name, data in members:
        crc = zlib.crc32(data, zlib.crc32(name.encode(errors="surrogateescape"), crc))
    return crc


def write_checksums(path: Path, crcs: dict[str, int]) -> None:
    """Keep the CRC-32 of each key."""
    table = np.array([(hash_key(key), crc) for key, crc in crcs.items()], dtype=CHECKSUM)
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        np.save(file, np.sort(table, order="key"))


def read_checksums(path: Path) -> ndarray | None:
    """The table, mapped into memory; None if there is none that can be read: it is then made anew."""
    try:
        table = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return table if table.dtype == CHECKSUM else None


def changed_keys(table: ndarray, crcs: dict[str, int]) -> tuple[list[str], int]:
    """Keys whose bytes are not those of ``table``, and how many keys of ``table`` are gone."""
    before = dict(table.tolist())
    changed = [key for key, crc in crcs.items() if before.pop(hash_key(key), crc) != crc]
    return changed, len(before)


def repeated_hashes(tables: Sequence[Path], *, keys_per_pass: int = _KEYS_PER_PASS) -> UInt64[ndarray, "r"]:
    """Hashes that come more than once among sorted tables, in order.

    Every pass looks at one range of hashes in all tables, so that memory does not grow with the number of samples.
    """
    num_keys = sum(len(np.load(path, mmap_mode="r")) for path in tables)
    num_passes = -(-num_keys // keys_per_pass)
    edges = [number * 2**64 // num_passes for number in range(1, num_passes)]
    found = [np.empty(0, np.uint64)]
    for low, high in zip([0, *edges], [*edges, None], strict=True):
        part = np.sort(np.concatenate([found[0][:0], *(_between(path, low, high) for path in tables)]))
        found.append(np.unique(part[1:][part[1:] == part[:-1]]))
    return np.concatenate(found)


def _between(path: Path, low: int, high: int | None) -> UInt64[ndarray, "k"]:
    keys = np.ascontiguousarray(np.load(path, mmap_mode="r")["key"])
    start = np.searchsorted(keys, np.uint64(low))
    end = len(keys) if high is None else np.searchsorted(keys, np.uint64(high))
    return keys[start:end]
