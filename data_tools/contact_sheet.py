"""A few samples of a data set, drawn at random, small enough to be kept inside a page."""

import io
from dataclasses import dataclass

import numpy as np

from ipa_train.data.decode import MAX_PIXELS, decode_image
from ipa_train.data.index import Index
from ipa_train.data.reader import ShardReader
from ipa_train.errors import DataError

_THUMBNAIL_SIZE = 256  # pixels of the longer side
_JPEG_QUALITY = 80


@dataclass(frozen=True)
class DrawnSample:
    """A picture for the sheet."""

    name: str
    """``00000.tar/key``"""
    caption: str
    size: tuple[int, int]
    """Height and width of the stored picture, in pixels."""
    jpeg: bytes
    """Of the thumbnail; empty where the sample is bad, and the caption says why."""


def draw_samples(index: Index, num_samples: int, *, seed: int) -> list[DrawnSample]:
    """Draw up to ``num_samples`` samples without replacement, in the order of the shards."""
    ends = np.cumsum(index.counts)
    total = int(ends[-1])
    chosen = np.sort(np.random.default_rng(seed).choice(total, min(num_samples, total), replace=False))
    reader = ShardReader(index)
    drawn = []
    for number in chosen.tolist():
        shard = int(np.searchsorted(ends, number, side="right"))
        drawn.append(_draw(reader, shard, number - int(ends[shard] - index.counts[shard])))
    return drawn


def _draw(reader: ShardReader, shard: int, row: int) -> DrawnSample:
    name = f"{reader.index.shards[shard].name}/{reader.key(shard, row)}"
    try:
        data, caption, *_ = reader.read(shard, row)
        image = decode_image(data, max_pixels=MAX_PIXELS)
    except DataError as error:
        return DrawnSample(name, str(error), (0, 0), b"")
    size = (image.height, image.width)
    image.thumbnail((_THUMBNAIL_SIZE, _THUMBNAIL_SIZE))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=_JPEG_QUALITY)
    return DrawnSample(name, caption, size, buffer.getvalue())
