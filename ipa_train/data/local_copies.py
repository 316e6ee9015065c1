"""Local copies of remote shards: there whole or not at all, shared by all processes of a node, within a size.

    cache_dir/5f1c/00000-9a3e.tar           a copy; its name holds a hash of where it is from, its length and version
    cache_dir/5f1c/00000-9a3e.tar.part      a download, written by whoever holds its lock; what a killed process left is
                                            begun anew, never gone on with: after a crash it may have holes
    cache_dir/5f1c/00000-9a3e.tar.failed    why it could not be downloaded; for two minutes no reader tries again

A reader's open descriptor outlives the eviction of the copy, so nothing needs to know who reads what.
"""

import fcntl
import os
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from ipa_train.data.remote import without_query
from ipa_train.errors import ConfigError, DataError

GIB = 2**30
PART, FAILED = ".part", ".failed"
_FULL_PAUSE_SECONDS = 0.1


class LocalCopies:
    """A folder of copies of at most ``max_gib``; one per node and run, on a local disk.

    ``patience_seconds`` is what a server gets for each piece of 16 MiB, and bounds the pauses between attempts.
    """

    def __init__(self, folder: Path, *, max_gib: float = 100.0, patience_seconds: float = 60.0) -> None:
        if not max_gib > 0:
            raise ConfigError(f"data.cache_gib must be above 0, got {max_gib}.")
        if not 0 < patience_seconds <= 300:
            raise ConfigError(f"data.patience_seconds must be above 0 and at most 300, got {patience_seconds}.")
        self.folder, self.patience_seconds = folder, patience_seconds
        self.max_bytes = int(max_gib * GIB)

    def prepare(self) -> None:
        """Make the folder, and give servers that failed an earlier run another chance.

        Raises:
            ConfigError: the folder cannot be made.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for marker in self.folder.glob(f"*/*{FAILED}"):
                marker.unlink(missing_ok=True)
        except OSError as error:
            raise ConfigError(f"data.cache_dir={self.folder}: {error.strerror}; give another folder.") from error

    def keep_only(self, paths: Collection[Path]) -> set[Path]:
        """Evict all other copies, and what killed processes left; return the copies that are there."""
        present = {path for path, _ in self._files()}
        for path in present:
            if path.with_name(path.name.removesuffix(PART)) not in paths:
                _remove(path)
        return present.intersection(paths)

    def num_bytes(self) -> int:
        """What copies and downloads take."""
        return sum(stat.st_size for _, stat in self._files())

    def reserve(self, descriptor: int, num_bytes: int, url: str) -> None:
        """Make room for a download in its file, evicting the oldest copies; waits while all are being made.

        Raises:
            DataError: it is larger than all there may be.
            OSError: the disk is full.
        """
        if num_bytes > self.max_bytes:
            raise DataError(
                f"{without_query(url)}: {num_bytes / GIB:.3g} GiB do not fit into data.cache_gib="
                f"{self.max_bytes / GIB:.3g}."
            )
        while not self._reserved(descriptor, num_bytes):
            time.sleep(_FULL_PAUSE_SECONDS)

    def _reserved(self, descriptor: int, num_bytes: int) -> bool:
        with _folder_lock(self.folder):
            files = sorted(self._files(), key=lambda file: file[1].st_mtime_ns)
            free = self.max_bytes - sum(stat.st_size for _, stat in files)
            for path, stat in files:
                if free >= num_bytes:
                    break
                if stat.st_size and _remove(path):
                    free += stat.st_size
            if free >= num_bytes:
                os.posix_fallocate(descriptor, 0, num_bytes)
            return free >= num_bytes

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        for path in self.folder.glob("*/*"):
            if path.suffix != FAILED:
                try:
                    yield path, path.stat()
                except FileNotFoundError:  # evicted in between
                    continue


@contextmanager
def _folder_lock(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def open_locked(path: Path, flags: int, lock: int) -> int | None:
    """Open and lock; None if there is no such file, or no more when the lock is got."""
    try:
        descriptor = os.open(path, flags, 0o666)
        try:
            fcntl.flock(descriptor, lock)
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
    except FileNotFoundError:
        pass
    return None


def _remove(path: Path) -> bool:
    """Delete a copy, or what is left of one, unless a process holds its lock."""
    try:
        descriptor = open_locked(path, os.O_RDONLY, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    if descriptor is not None:
        path.unlink(missing_ok=True)
        os.close(descriptor)
    return True
