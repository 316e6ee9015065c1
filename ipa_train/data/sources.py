"""Where shards come from: a file on a disk of this machine, or one on a server that is read through a local copy."""

import fcntl
import hashlib
import os
import time
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ipa_train.data.local_copies import FAILED, PART, LocalCopies, open_locked
from ipa_train.data.remote import Version, ask_version, read_piece, without_query
from ipa_train.errors import DataError

_PIECE_BYTES = 16 * 2**20
_FORGIVEN_AFTER_SECONDS = 120.0


@dataclass(frozen=True)
class LocalFile:
    """A file on a disk, as it was when it was found."""

    path: Path
    version: Version

    @classmethod
    def find(cls, path: Path) -> "LocalFile":
        """The file as it is now."""
        stat = path.stat()
        return cls(path, Version(stat.st_size, str(stat.st_mtime_ns)))

    @property
    def name(self) -> str:
        """Base name."""
        return self.path.name

    @property
    def location(self) -> str:
        """The path, for messages."""
        return str(self.path)

    @property
    def folder(self) -> str:
        """The folder it lies in."""
        return str(self.path.parent)

    def open(self) -> int:
        """A descriptor. Raises OSError if it cannot be opened."""
        return os.open(self.path, os.O_RDONLY)

    def has_beside(self, name: str) -> bool:
        """Whether its folder holds a file of this name."""
        return self.path.with_name(name).exists()

    def read_beside(self, name: str) -> bytes:
        """Read a small file of its folder. Raises FileNotFoundError."""
        return self.path.with_name(name).read_bytes()


@dataclass(frozen=True)
class RemoteFile:
    """One version of a file on a server, and its local copy."""

    url: str
    version: Version
    copies: LocalCopies

    @property
    def name(self) -> str:
        """Base name on the server."""
        return PurePosixPath(self.location).name

    @property
    def location(self) -> str:
        """The URL, for messages."""
        return without_query(self.url)

    @property
    def folder(self) -> str:
        """The folder it lies in on the server."""
        return self.location.rpartition("/")[0]

    @property
    def path(self) -> Path:
        """Where the local copy lies, or will."""
        name, identity = PurePosixPath(self.name), f"{self.version.num_bytes}-{self.version.tag}"
        return self.copies.folder / _hash(self.folder) / f"{name.stem}-{_hash(identity)}{name.suffix}"

    def open(self) -> int:
        """A descriptor of the copy, downloaded if it is not there; while it is locked, the copy is not evicted.

        Raises:
            DataError: it cannot be downloaded, or could not a short while ago, or the server has another version now.
        """
        while True:
            found = open_locked(self.path, os.O_RDONLY, fcntl.LOCK_SH)
            if found is not None:
                return found
            self.download(insist=False)

    def download(self, *, insist: bool) -> None:
        """Make a copy, if there is none. Unless you ``insist``, a failure counts for a while, for all processes.

        Raises:
            DataError: as for :meth:`open`.
        """
        try:
            self._download(insist)
        except OSError as error:
            raise DataError(f"{self.location}: no copy in {self.copies.folder}: {error.strerror}") from error

    def has_beside(self, name: str) -> bool:
        """Whether its folder holds a file of this name. Raises DataError if the server does not answer."""
        try:
            self._ask_beside(name)
        except FileNotFoundError:
            return False
        return True

    def read_beside(self, name: str) -> bytes:
        """Read a small file of its folder. Raises FileNotFoundError; DataError if the server does not answer."""
        url, version = self._ask_beside(name)
        size, patience = version.num_bytes, self.copies.patience_seconds
        return read_piece(url, 0, size, num_bytes=size, patience_seconds=patience)

    def _ask_beside(self, name: str) -> tuple[str, Version]:
        _, question_mark, query = self.url.partition("?")
        url = f"{self.folder}/{name}{question_mark}{query}"
        return url, ask_version(url, patience_seconds=self.copies.patience_seconds)

    def _download(self, insist: bool) -> None:
        path = self.path
        part, failed = path.with_name(path.name + PART), path.with_name(path.name + FAILED)
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = open_locked(part, os.O_RDWR | os.O_CREAT, fcntl.LOCK_EX)
        if descriptor is None:  # another process has made it in the meantime
            return
        try:
            if path.exists():
                part.unlink()
                return
            if not insist:
                _raise_fresh(failed)
            os.ftruncate(descriptor, 0)  # what a killed process left is neither gone on with nor counted
            self.copies.reserve(descriptor, self.version.num_bytes, self.url)
            self._fill(descriptor)
            os.fsync(descriptor)
            part.replace(path)
            failed.unlink(missing_ok=True)
        except Exception as error:
            part.unlink(missing_ok=True)
            if isinstance(error, DataError) and not insist:
                failed.write_text(str(error))
            raise
        finally:
            os.close(descriptor)

    def _fill(self, descriptor: int) -> None:
        self._require_version()
        position, end = 0, self.version.num_bytes
        while position < end:
            data = read_piece(
                self.url,
                position,
                min(position + _PIECE_BYTES, end),
                num_bytes=end,
                patience_seconds=self.copies.patience_seconds,
            )
            position += os.pwrite(descriptor, data, position)
        self._require_version()  # nor may it have been replaced between two pieces

    def _require_version(self) -> None:
        try:
            now = ask_version(self.url, patience_seconds=self.copies.patience_seconds)
        except FileNotFoundError as error:
            raise DataError(f"{self.location}: there is no such file any more.") from error
        if now != self.version:
            raise DataError(
                f"{self.location}: replaced since it was indexed ({_in_words(self.version)}; now {_in_words(now)}): "
                "put the old file back, or start anew to index this one."
            )


def _in_words(version: Version) -> str:
    return f"{version.num_bytes} bytes, {version.tag or 'of no version'}"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _raise_fresh(marker: Path) -> None:
    """Raise what another process learnt a short while ago."""
    try:
        if time.time() - marker.stat().st_mtime < _FORGIVEN_AFTER_SECONDS:
            raise DataError(marker.read_text())
    except FileNotFoundError:
        pass
