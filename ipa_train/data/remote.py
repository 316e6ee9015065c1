"""Files of object stores and web servers, through fsspec: named, asked for their version, and read piece by piece.

Every request is bounded in time and tried again a few times; what is tried again is seen nowhere else.
"""

import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import aiohttp
import fsspec
from fsspec.asyn import AsyncFileSystem
from webdataset.shardlists import expand_urls

from ipa_train.errors import ConfigError, DataError, did_you_mean

T = TypeVar("T")
PACKAGES = {
    "http": "fsspec[http]",
    "https": "fsspec[http]",
    "s3": "'ipa-train[s3]'",
    "gs": "'ipa-train[gcs]'",
}
"""Protocols that can be read, and what to install for each."""
_WITHOUT_LISTING = ("http", "https")
_MAX_ATTEMPTS = 5
_FIRST_PAUSE = 1 / 32  # of the patience; each pause is twice the one before, so all take half of it
_NUM_CONNECTIONS = 32  # for questions that are answered by a few bytes
_VERSIONS = ("ETag", "etag", "generation", "Last-Modified", "LastModified", "mtime")


@dataclass(frozen=True)
class Version:
    """What tells a file from the one that may take its place."""

    num_bytes: int
    tag: str
    """The server's ETag, or its time of modification; empty if it gives neither."""


def is_remote(source: str) -> bool:
    """Whether a source is a URL."""
    return "://" in source


def without_query(url: str) -> str:
    """The URL as it may be shown: behind the question mark there may be a signature."""
    return url.partition("?")[0]


def file_system(url: str) -> AsyncFileSystem:
    """The file system of a URL, for this thread of this process.

    Raises:
        ConfigError: of a protocol that cannot be read, or whose package is not installed.
    """
    protocol = url.partition("://")[0]
    if protocol not in PACKAGES:
        raise ConfigError(
            f"{without_query(url)}: {protocol}:// cannot be read.{did_you_mean(protocol, PACKAGES)} For anything else "
            "see data=webdataset."
        )
    options: dict[str, Any] = {"use_listings_cache": False}
    if protocol == "s3":
        configured = fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
        options["config_kwargs"] = {**configured, "retries": {"total_max_attempts": 1}}
    try:
        found = fsspec.filesystem(protocol, **options)
    except ImportError as error:
        raise ConfigError(
            f"{without_query(url)}: {protocol}:// needs a package that is not installed: "
            f"pip install {PACKAGES[protocol]}"
        ) from error
    if protocol == "s3":
        found.retries = 1
    return found


def persist(action: Callable[[], T], url: str, *, patience_seconds: float) -> T:
    """Do it, and on failure again, a few times with growing pauses.

    Raises:
        FileNotFoundError: the server says that there is no such file.
        DataError: it failed to the end, or is forbidden.
    """
    pause = patience_seconds * _FIRST_PAUSE
    for attempt in range(1, _MAX_ATTEMPTS + 1):
        try:
            return action()
        except (ConfigError, DataError):
            raise
        except Exception as raised:  # the clients of four protocols raise nearly anything
            error = _cause(raised)
            if isinstance(error, FileNotFoundError):
                raise FileNotFoundError(f"{without_query(url)}: there is no such file") from None
            if attempt == _MAX_ATTEMPTS or _is_final(error):
                reason = str(error).replace(url, without_query(url)).partition("\n")[0]
                reason = f"no answer within {patience_seconds:g} s" if isinstance(error, TimeoutError) else reason
                times = f" ({attempt} attempts)" if attempt > 1 else ""
                raise DataError(f"{without_query(url)}: {reason or type(error).__name__}{times}") from raised
            time.sleep(pause * random.uniform(0.5, 1.5))  # many nodes must not come back at the same moment
            pause *= 2
    raise AssertionError("unreachable")


def _cause(error: Exception) -> Exception:
    """What went wrong: fsspec calls whatever a web server answers "file not found"."""
    cause = error.__cause__
    if isinstance(error, FileNotFoundError) and isinstance(cause, (aiohttp.ClientError, TimeoutError)):
        return error if getattr(cause, "status", None) == 404 else cause
    return error


def _is_final(error: Exception) -> bool:
    status = getattr(error, "status", None)
    if isinstance(status, int):
        return 400 <= status < 500 and status not in (408, 429)
    return isinstance(error, PermissionError)


def ask_version(url: str, *, patience_seconds: float) -> Version:
    """Ask the server which version of a file it has.

    Raises:
        FileNotFoundError: none.
        DataError: it does not answer, or does not say the size.
    """
    files = file_system(url)
    info = persist(partial(files.info, url, timeout=patience_seconds), url, patience_seconds=patience_seconds)
    return _version(url, info)


def _version(url: str, info: dict[str, Any]) -> Version:
    if info.get("size") is None:
        raise DataError(f"{without_query(url)}: the server does not say its size, so a cut could not be noticed.")
    tag = next((str(info[name]) for name in _VERSIONS if info.get(name)), "")
    return Version(int(info["size"]), tag)


def read_piece(url: str, start: int, end: int, *, num_bytes: int, patience_seconds: float) -> bytes:
    """Read bytes ``start`` to ``end`` of a file of ``num_bytes``; all from ``start`` on if the server knows no ranges.

    Raises:
        FileNotFoundError: there is no such file.
        DataError: it failed to the end.
    """
    files = file_system(url)

    def read() -> bytes:
        data = bytes(files.cat_file(url, start=start, end=end, timeout=patience_seconds))
        if len(data) == num_bytes:
            return data[start:]
        if len(data) != end - start:
            raise OSError(f"the server sent {len(data)} of {end - start} bytes from byte {start} on")
        return data

    return persist(read, url, patience_seconds=patience_seconds)


def find_remote(source: str, *, patience_seconds: float, ask: bool = True) -> dict[str, Version | None]:
    """Expand ``https://host/{00000..00010}.tar``, ``s3://bucket/folder/*.tar`` or ``s3://bucket/folder`` into files.

    Versions are asked for only if ``ask``: a glob or folder by listing, one request per thousand files, and what is
    named by a range, or is on a web server, one request per file.

    Raises:
        ConfigError: nothing matches, or files are missing.
        DataError: the server does not answer.
    """
    files = file_system(source)
    protocol = source.partition("://")[0]
    if "*" in source or not without_query(source).endswith(".tar"):
        if protocol in _WITHOUT_LISTING:
            raise ConfigError(f"data.shards={source}: web servers have no list of files; give {{00000..00010}}.tar.")
        pattern = source if "*" in source else f"{source.rstrip('/')}/*.tar"
        listing = partial(files.glob, pattern, detail=True, timeout=10 * patience_seconds)
        found = persist(listing, source, patience_seconds=patience_seconds)
        if not found:
            raise ConfigError(f"data.shards={source}: no .tar file matches.")
        return {f"{protocol}://{name}": _version(name, info) for name, info in sorted(found.items())}
    urls = list(expand_urls(source))
    if not ask:
        return dict.fromkeys(urls)

    def look(url: str) -> Version | None:
        try:
            return ask_version(url, patience_seconds=patience_seconds)
        except FileNotFoundError:
            return None

    with ThreadPoolExecutor(min(_NUM_CONNECTIONS, len(urls))) as pool:
        versions = dict(zip(urls, pool.map(look, urls), strict=True))
    missing = [url for url, version in versions.items() if version is None]
    if missing:
        raise ConfigError(
            f"data.shards={without_query(source)}: {len(missing)} of {len(urls)} shards missing, first "
            f"{without_query(missing[0])}."
        )
    return versions
