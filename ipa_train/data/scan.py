"""One tar -> one row per complete sample: where its content and caption lie, and how large its picture is.

A sample's content is its picture, or the features that the frozen encoders made of it (``cache.py``). What else the
image prompt is made of has fixed names: ``KEY.ref.jpg`` (or .jpeg, .png, .webp), ``KEY.mask.png`` and ``KEY.npy``.
"""

import os
from collections.abc import Collection, Container
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy import ndarray

from ipa_train.data import tar
from ipa_train.data.decode import stored_size
from ipa_train.errors import DataError

Content = Literal["pictures", "features"]
Extra = Literal["reference", "mask", "embedding"]
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
TEXT_SUFFIX = "txt"
FEATURES_SUFFIX, FLIPPED_SUFFIX = "safetensors", "flipped.safetensors"
EXTRAS: dict[Extra, str] = {"reference": "ref.*", "mask": "mask.png", "embedding": "npy"}
"""Suffixes of what a sample may hold besides, in the order of :data:`Extra`."""
ROW = np.dtype(
    [
        ("offset", "<u8"),  # of the sample's first byte in the tar
        ("length", "<u4"),  # to the end of its last used member
        ("content_start", "<u4"),  # relative to offset
        ("content_length", "<u4"),
        ("text_start", "<u4"),
        ("text_length", "<u4"),
        ("flipped_start", "<u4"),  # of the mirrored picture's features, as long as the others; 0: there are none
        ("width", "<u2"),  # of the upright picture, in pixels; 0: features, or a header that cannot be read
        ("height", "<u2"),
    ]
)
_HEAD_BYTES = 4096  # holds the size of nearly every picture


def row_type(extras: Collection[str]) -> np.dtype:
    """Of a row that also places these :data:`EXTRAS`: :data:`ROW`, and start and length of each, as of the caption."""
    return np.dtype(ROW.descr + [(f"{extra}_{what}", "<u4") for extra in extras for what in ("start", "length")])


def lacks(extras: Collection[str]) -> str:
    """What a sample without any of its needed parts is told to be without, after "without "."""
    names = ["an image", "a caption", *(f"KEY.{EXTRAS[extra]}" for extra in EXTRAS if extra in extras)]
    return f"{', '.join(names[:-1])} or {names[-1]}"


def member_kind(suffix: str) -> str:
    """What a member is, by what follows the first dot of its name: "content", one of :data:`EXTRAS`, or its suffix."""
    kind = suffix.lower()
    if kind in IMAGE_SUFFIXES or kind == FEATURES_SUFFIX:
        return "content"
    return EXTRAS["reference"] if kind.removeprefix("ref.") in IMAGE_SUFFIXES else kind


@dataclass(frozen=True)
class Scan:
    """What a tar holds."""

    rows: ndarray
    content: Content
    num_incomplete: int
    num_excluded: int
    extras: tuple[Extra, ...]
    """What each row places besides."""
    found_extras: tuple[Extra, ...]
    """What any sample holds besides."""


def scan(path: Path, *, max_member_bytes: int, excluded: Container[str] = (), extras: Collection[Extra] = ()) -> Scan:
    """Find all complete samples of a tar but those whose key is ``excluded``.

    A sample of a picture is complete only if it has all ``extras``; features have no use for them.

    Raises:
        DataError: a damaged tar (see :func:`tar.walk`), a key that comes twice, no complete sample, or pictures beside
            features.
    """
    samples = find_samples(path, max_member_bytes=max_member_bytes)
    complete = {key: found for key, found in samples.items() if "content" in found and TEXT_SUFFIX in found}
    needed = tuple(extra for extra in EXTRAS if extra in extras)
    if any(_content(found["content"]) == "features" for found in complete.values()):
        needed = ()
    suffixes = {EXTRAS[extra] for extra in needed}
    complete = {key: found for key, found in complete.items() if suffixes <= found.keys()}
    kept = [found for key, found in complete.items() if key not in excluded]
    kinds = {_content(found["content"]) for found in complete.values()}
    if len(kinds) > 1:
        raise DataError(f"{path}: holds both pictures and cached features; keep them in shards of their own.")
    if not complete:
        besides = "".join(f" and KEY.{suffix}" for suffix in EXTRAS.values() if suffix in suffixes)
        raise DataError(
            f"{path}: no sample with both an image ({'/'.join(IMAGE_SUFFIXES)}) and a .txt caption{besides}."
        )
    content: Content = kinds.pop() if kinds else "pictures"
    descriptor = os.open(path, os.O_RDONLY)
    try:
        rows = [_row(found, descriptor, content, path, needed) for found in kept]
    finally:
        os.close(descriptor)
    found_extras = tuple(extra for extra in EXTRAS if any(EXTRAS[extra] in found for found in samples.values()))
    return Scan(
        rows=np.array(rows, dtype=row_type(needed)),
        content=content,
        num_incomplete=len(samples) - len(complete),
        num_excluded=len(complete) - len(kept),
        extras=needed,
        found_extras=found_extras,
    )


def find_samples(path: Path, *, max_member_bytes: int) -> dict[str, dict[str, tar.Member]]:
    """All members of a tar by key and suffix, pictures and features under "content"; complete samples or not.

    Raises:
        DataError: a damaged tar (see :func:`tar.walk`), or a key that comes twice.
    """
    samples: dict[str, dict[str, tar.Member]] = {}
    last = ""
    for member in tar.walk(path, max_member_bytes=max_member_bytes):
        key, _, suffix = member.name.partition(".")
        kind = member_kind(suffix)
        if key in samples and (key != last or kind in samples[key]):
            raise DataError(f"{path}: the key {key!r} appears twice; keys must be unique in a shard.")
        samples.setdefault(key, {})[kind] = member
        last = key
    return samples


def _content(member: tar.Member) -> Content:
    return "features" if member.name.endswith(FEATURES_SUFFIX) else "pictures"


def _row(
    found: dict[str, tar.Member], descriptor: int, content: Content, path: Path, extras: Collection[Extra]
) -> tuple[int, ...]:
    picture, text, flipped = found["content"], found[TEXT_SUFFIX], found.get(FLIPPED_SUFFIX)
    besides = [found[EXTRAS[extra]] for extra in extras]
    used = [picture, text, *besides] + ([flipped] if flipped else [])
    offset = min(member.start for member in used)
    end = max(member.data_offset + member.size for member in used)
    if flipped and flipped.size != picture.size:
        raise DataError(f"{path}: {flipped.name} is not as long as {picture.name}; encode the shard again.")
    height, width = _size(picture, descriptor) if content == "pictures" else (0, 0)
    return (
        offset,
        end - offset,
        picture.data_offset - offset,
        picture.size,
        text.data_offset - offset,
        text.size,
        flipped.data_offset - offset if flipped else 0,
        width,
        height,
        *(number for member in besides for number in (member.data_offset - offset, member.size)),
    )


def _size(picture: tar.Member, descriptor: int) -> tuple[int, int]:
    """Height and width; (0, 0) for what has none: it stays in the index, and is a bad sample when its turn comes."""
    size = stored_size(os.pread(descriptor, min(_HEAD_BYTES, picture.size), picture.data_offset))
    if size == (0, 0) and picture.size > _HEAD_BYTES:
        size = stored_size(os.pread(descriptor, picture.size, picture.data_offset))
    return size if max(size) < 2**16 else (0, 0)
