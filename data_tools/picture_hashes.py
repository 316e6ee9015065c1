"""Hashes of a shard's pictures, kept in NAME.hash.npz where its index lies, as long as the shard stays the same."""

import hashlib
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy import ndarray

from data_tools.perceptual_hash import DECODE_SIZE, perceptual_hash
from ipa_train.data.decode import MAX_PIXELS, decode, stored_size
from ipa_train.data.index import MAX_MEMBER_BYTES, name_beside
from ipa_train.data.scan import FEATURES_SUFFIX, TEXT_SUFFIX, find_samples
from ipa_train.errors import DataError
from ipa_train.runtime.files import atomic_write

ROW = np.dtype(
    [
        ("looks", "<u8"),  # perceptual hash
        ("is_plain", "?"),  # too plain for one: ``looks`` is 0
        ("content", "<u8"),  # the first bytes of the sha256
        ("pixels", "<u4"),
    ]
)
_VERSION = 1


@dataclass(frozen=True)
class PictureHashes:
    """A shard's complete samples."""

    keys: ndarray
    """Bytes strings."""
    rows: ndarray
    failed: list[str]
    """``key: why it cannot be decoded``; these have no row."""


def hash_shard(shard: Path, *, index_dir: Path | None) -> None:
    """Write the hashes of a shard's pictures.

    Raises:
        DataError: a damaged shard, or one of cached features.
    """
    identity, keys, rows, failed = _identity(shard), [], [], []
    with shard.open("rb") as file:
        for key, members in find_samples(shard, max_member_bytes=MAX_MEMBER_BYTES).items():
            picture = members.get("content")
            if picture is None or TEXT_SUFFIX not in members:
                continue  # the index leaves it out too, and counts it
            if picture.name.endswith(FEATURES_SUFFIX):
                raise DataError(f"{shard}: holds cached features, no pictures; give the shards they were made of.")
            try:
                rows.append(_hash_picture(os.pread(file.fileno(), picture.size, picture.data_offset)))
                keys.append(key.encode())
            except DataError as error:
                failed.append(f"{key}: {error}")
    with atomic_write(_hashes_path(shard, index_dir)) as temporary, temporary.open("wb") as out:
        np.savez(
            out,
            identity=np.array(identity),
            keys=np.array(keys, np.bytes_),
            rows=np.array(rows, ROW),
            failed=np.array(failed, np.str_),
        )


def _hash_picture(data: bytes) -> tuple[int, bool, int, int]:
    looks = perceptual_hash(decode(data, max_pixels=MAX_PIXELS, min_size=DECODE_SIZE))
    content = int.from_bytes(hashlib.sha256(data).digest()[:8], "big")
    height, width = stored_size(data)
    return looks or 0, looks is None, content, height * width


def has_hashes(shard: Path, *, index_dir: Path | None) -> bool:
    """Whether the shard's hashes are there and of its present content."""
    try:
        with _hashes_path(shard, index_dir).open("rb") as file, np.load(file, allow_pickle=False) as content:
            whole = {name: content[name] for name in ("identity", "keys", "rows", "failed")}  # damage shows here
            return whole["identity"].tolist() == _identity(shard)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return False


def read_hashes(shard: Path, *, index_dir: Path | None) -> PictureHashes:
    """What :func:`hash_shard` wrote."""
    with np.load(_hashes_path(shard, index_dir), allow_pickle=False) as content:
        return PictureHashes(content["keys"], content["rows"], content["failed"].tolist())


def _hashes_path(shard: Path, index_dir: Path | None) -> Path:
    return (index_dir or shard.parent) / f"{name_beside(shard, shared=index_dir is not None)}.hash.npz"


def _identity(shard: Path) -> list[int]:
    stat = shard.stat()
    return [_VERSION, stat.st_size, stat.st_mtime_ns]
