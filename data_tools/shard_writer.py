"""Writing shards: what img2dataset's own would be, there whole or not at all."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import webdataset

from ipa_train.errors import DataError
from ipa_train.runtime.files import atomic_write


class ShardWriter:
    """One open shard; see :func:`open_shard`."""

    def __init__(self, tar: webdataset.TarWriter) -> None:
        self._tar = tar
        self._keys: set[str] = set()
        self.num_samples = 0
        self.left_out: dict[str, str] = {}

    def write(self, key: str, members: Mapping[str, bytes]) -> None:
        """Add a sample: ``{"jpg": ..., "txt": ...}``, by suffix. Raises DataError if it has no key of its own."""
        if not key or key in self._keys:
            raise DataError(f"two samples have the key {key!r}: repack their shard with short names of ASCII")
        self._keys.add(key)
        self._tar.write({"__key__": key, **members})
        self.num_samples += 1

    def leave_out(self, key: str, why: str) -> None:
        """Note a sample that should be here and cannot; it is named in the mark of the complete shard."""
        self.left_out[key] = why


@contextmanager
def open_shard(path: Path) -> Iterator[ShardWriter]:
    """Write the tar ``path``, and then ``NAME_stats.json``, the mark of a complete shard, if the block succeeds.

    The same samples make the same bytes, whoever writes them and when, so that a re-run can be compared. What killed
    writers of this very shard have left behind is removed.
    """
    for leftover in path.parent.glob(f".tmp-{path.name}-*"):
        leftover.unlink(missing_ok=True)
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        tar = webdataset.TarWriter(file, user="", group="", mode=0o644, mtime=0, encoder=False)
        try:
            writer = ShardWriter(tar)
            yield writer
        finally:
            tar.close()
    count = writer.num_samples + len(writer.left_out)
    stats = {"count": count, "successes": writer.num_samples, "left_out": writer.left_out}
    with atomic_write(stats_path(path)) as temporary:
        temporary.write_text(json.dumps(stats))


def read_stats(shard: Path) -> tuple[int, dict[str, str]]:
    """What a shard's mark says: how many samples were written, and why which were left out.

    Raises:
        DataError: it is damaged.
    """
    path = stats_path(shard)
    try:
        stats = json.loads(path.read_text())
        return int(stats["successes"]), dict(stats["left_out"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: damaged; delete it, and its shard is written anew.") from error


def stats_path(shard: Path) -> Path:
    """Where the mark of a complete shard lies."""
    return shard.with_name(f"{shard.stem}_stats.json")
