"""Tars read from front to back: the output of commands, and whatever else has no random access."""

import random
import tarfile
from collections.abc import Collection, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

from webdataset import shuffle
from webdataset.gopen import gopen
from webdataset.shardlists import ResampledShards, expand_urls

from ipa_train.data.find import find_shards
from ipa_train.data.plan import keyed_generator
from ipa_train.data.remote import ask_version, find_remote, is_remote, read_piece, without_query
from ipa_train.data.scan import EXTRAS, FEATURES_SUFFIX, TEXT_SUFFIX, Extra, lacks, member_kind
from ipa_train.data.tar import BLOCK
from ipa_train.errors import ConfigError, DataError

_PIECE_BYTES = 16 * 2**20
_PIPE = "pipe:"


def find_sources(spec: str | Sequence[str], *, allow_shell: bool, patience_seconds: float) -> list[str]:
    """Expand local shards, URLs and, if ``allow_shell``, commands: ``pipe:ssh host cat {00000..00010}.tar``.

    Raises:
        ConfigError: a command that is not allowed; or see :func:`find_shards` and :func:`find_remote`.
    """
    found: list[str] = []
    for item in [spec] if isinstance(spec, str) else spec:
        if item.startswith(_PIPE):
            if not allow_shell:
                raise ConfigError(
                    f"data.shards={item}: this would run a shell command; if you trust it, set data.allow_shell=true."
                )
            found += expand_urls(item)
        elif is_remote(item):
            found += find_remote(item, patience_seconds=patience_seconds, ask=False)
        else:
            found += map(str, find_shards(item))
    return found


class Sample(NamedTuple):
    """One sample as it comes; of one that is bad, why."""

    source: str
    key: str
    image: bytes
    caption: bytes
    extras: dict[Extra, bytes]
    error: str = ""


class SampleReader:
    """Reads sources one after the other, for ever."""

    def __init__(
        self,
        sources: Sequence[str],
        *,
        seed: Sequence[int],
        shuffle_size: int,
        max_member_bytes: int,
        patience_seconds: float,
        extras: Collection[Extra] = (),
    ) -> None:
        self.extras = {extra: suffix for extra, suffix in EXTRAS.items() if extra in extras}
        self.sources, self.seed, self.shuffle_size = list(sources), tuple(seed), shuffle_size
        self.max_member_bytes, self.patience_seconds = max_member_bytes, patience_seconds

    def read(self, worker: int) -> Iterator[Sample]:
        """The samples of a worker, for ever; a source that breaks off is a bad sample itself."""
        seed = int(keyed_generator(*self.seed, worker).integers(2**31))
        shards = ResampledShards(self.sources, deterministic=True, worker_seed=lambda: seed)
        samples = (sample for shard in shards for sample in self._samples(shard["url"]))
        yield from shuffle(self.shuffle_size, rng=random.Random(seed))(samples)

    def _samples(self, source: str) -> Iterator[Sample]:
        name = without_query(source)
        try:
            with closing(_TarSource(source, self.patience_seconds)) as stream:
                is_empty = True
                for key, members in self._groups(stream):
                    is_empty = False
                    needed = ("content", TEXT_SUFFIX, *self.extras.values())
                    lacking = "" if all(kind in members for kind in needed) else f"is without {lacks(self.extras)}"
                    if "mask" in self.extras and "reference" not in self.extras and EXTRAS["reference"] in members:
                        lacking = "its mask is of its KEY.ref.*: set data.image_prompt=reference"
                    extras = {extra: members.get(suffix, b"") for extra, suffix in self.extras.items()}
                    yield Sample(name, key, members.get("content", b""), members.get(TEXT_SUFFIX, b""), extras, lacking)
                stream.require_end()
                if is_empty:
                    raise DataError("holds no picture and no caption")
        except (DataError, OSError, EOFError, tarfile.TarError) as error:
            if isinstance(error.__context__, GeneratorExit):  # a command that fails since nobody reads on
                return
            yield Sample(name, "", b"", b"", {}, str(error) or type(error).__name__)

    def _groups(self, stream: "_TarSource") -> Iterator[tuple[str, dict[str, bytes]]]:
        """Keys with their images, captions and what is needed besides, by kind; nothing else is read."""
        current, members = "", dict[str, bytes]()
        with tarfile.open(fileobj=stream, mode="r|") as tar:  # type: ignore[call-overload]
            for member in tar:
                tar.members.clear()  # of a stream none is asked for again
                key, _, suffix = member.name.removeprefix("./").partition(".")
                if key != current and members:
                    yield current, members
                    members = {}
                current = key
                kind = member_kind(suffix)
                is_needed = kind in ("content", TEXT_SUFFIX, *self.extras.values())
                if kind == EXTRAS["reference"]:
                    members[kind] = b""  # it is known to be there, if no more
                if not member.isreg() or not is_needed or suffix.lower() == FEATURES_SUFFIX:
                    continue
                if member.size > self.max_member_bytes:
                    raise DataError(f"{member.name} claims {member.size} bytes, above data.max_member_bytes")
                content = tar.extractfile(member)
                members[kind] = content.read() if content else b""
        if members:
            yield current, members


@runtime_checkable
class _Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...

    def close(self) -> None: ...


def _open(source: str, patience_seconds: float) -> _Readable:
    if source.startswith(_PIPE):
        pipe: _Readable = gopen(source)
        return pipe
    return _RemoteStream(source, patience_seconds) if is_remote(source) else Path(source).open("rb")


class _TarSource:
    """What tarfile reads from; knows whether a tar ended as it should, which tarfile does not tell."""

    def __init__(self, source: str, patience_seconds: float) -> None:
        self._stream = _open(source, patience_seconds)
        self._tail = b""

    def read(self, size: int) -> bytes:
        """At most ``size`` bytes, as a file."""
        data = self._stream.read(size)
        self._tail = (self._tail + data[-BLOCK:])[-BLOCK:]
        return data

    def close(self) -> None:
        """Close it; a command is ended."""
        self._stream.close()

    def require_end(self) -> None:
        """Read to the end, where a command says whether it has failed. Raises DataError if no end mark comes last."""
        while self.read(tarfile.RECORDSIZE):
            pass
        if len(self._tail) < BLOCK or any(self._tail):
            raise DataError("ends without the mark of a tar's end: it is cut")


class _RemoteStream:
    """A remote file from front to back, by pieces that are asked for again when they fail."""

    def __init__(self, url: str, patience_seconds: float) -> None:
        self._url, self._patience_seconds = url, patience_seconds
        self._num_bytes = ask_version(url, patience_seconds=patience_seconds).num_bytes
        self._position = 0
        self._piece = memoryview(b"")

    def read(self, size: int) -> bytes:
        """At most ``size`` bytes, as a file."""
        if not self._piece and self._position < self._num_bytes:
            end = min(self._position + _PIECE_BYTES, self._num_bytes)
            data = read_piece(
                self._url, self._position, end, num_bytes=self._num_bytes, patience_seconds=self._patience_seconds
            )
            self._position += len(data)
            self._piece = memoryview(data)
        found, self._piece = self._piece[:size], self._piece[size:]
        return bytes(found)

    def close(self) -> None:
        """Nothing is open between pieces."""
        self._piece = memoryview(b"")
