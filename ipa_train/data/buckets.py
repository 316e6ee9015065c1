"""Aspect buckets: pictures of like shape are trained together, at about the same number of pixels.

Which bucket a picture falls into follows from its stored size alone; which bucket is next follows from how many samples
of each have been consumed (:class:`BucketSchedule`), so every rank runs the same bucket at each step.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float64, Int64
from numpy import ndarray
from tqdm import tqdm

from ipa_train.data.index import Index
from ipa_train.errors import ConfigError
from ipa_train.runtime.files import atomic_write

Bucket = tuple[int, int]
"""Height and width of the training pixels."""
_log = logging.getLogger(__name__)


def make_buckets(resolution: int, *, step: int | None = None, max_aspect_ratio: float = 2.0) -> list[Bucket]:
    """The square of ``resolution``; with ``step`` all sizes that are multiples of it with at most as many pixels.

    For every height there is one width, the largest; the longer side is at most ``max_aspect_ratio`` times the shorter.

    Raises:
        ConfigError: a step that is no multiple of 8 or does not divide the resolution, or a ratio below 1.
    """
    if resolution < 8 or resolution % 8:
        near = max(8, round(resolution / 8) * 8)
        raise ConfigError(f"data.resolution={resolution} must be a multiple of 8 (latents are); try {near}.")
    if max_aspect_ratio < 1.0:
        raise ConfigError(f"data.max_aspect_ratio must be at least 1, got {max_aspect_ratio}.")
    if step is None:
        return [(resolution, resolution)]
    if step < 8 or step % 8 or resolution % step:
        raise ConfigError(
            f"data.bucket_step={step} must be a multiple of 8 that divides data.resolution={resolution}; "
            "64 and 128 are usual."
        )
    buckets = set()
    for side in range(step, resolution + 1, step):
        other = resolution**2 // side // step * step
        if other <= max_aspect_ratio * side:
            buckets |= {(side, other), (other, side)}
    return sorted(buckets)


def nearest_bucket(
    heights: Int64[ndarray, "b"], widths: Int64[ndarray, "b"], buckets: Sequence[Bucket]
) -> Int64[ndarray, "b"]:
    """Number of the bucket whose aspect ratio is nearest; the squarest for a picture of unknown size (0)."""
    ratios = np.array([np.log(width / height) for height, width in buckets])
    order = np.argsort(ratios, kind="stable")
    known = (heights > 0) & (widths > 0)
    logs = np.log(np.where(known, widths, 1) / np.where(known, heights, 1))
    middles = (ratios[order][1:] + ratios[order][:-1]) / 2
    return order[np.searchsorted(middles, logs, side="right")]


def count_buckets(index: Index, buckets: Sequence[Bucket]) -> tuple[Int64[ndarray, "buckets shards"], bool]:
    """How many samples of each bucket every shard holds, and whether all pictures are stored at their bucket's size.

    Reads the size of every picture from the index once, and keeps the result beside it.
    """
    if len(buckets) == 1 and buckets[0][0] == buckets[0][1]:
        side = buckets[0][0]  # stored with that shorter side, a picture needs no resizing
        entries = [shard.entry for shard in index.shards if shard.entry.num_samples]
        return index.counts[None], all({e.min_short_side, e.max_short_side} == {side} for e in entries)
    identity = hashlib.sha256(json.dumps([index.index_id, buckets]).encode()).hexdigest()[:16]
    path = index.shards[0].rows_path.parent / f"buckets-{identity}.npy"
    table = _kept(path, (len(buckets) + 1, len(index.shards)))
    if table is None:
        sizes = np.array(buckets)
        rows = []
        for shard in tqdm(index.shards, desc="buckets", unit="shard", disable=None):
            found = shard.rows()
            numbers = shard_buckets(found, buckets)
            is_exact = (found["height"] == sizes[numbers, 0]) & (found["width"] == sizes[numbers, 1])
            unknown = found["height"] == 0
            rows.append([*np.bincount(numbers, minlength=len(buckets)), int((is_exact | unknown).all())])
        table = np.array(rows, dtype=np.int64).T
        _keep(path, table)
    return table[:-1], bool(table[-1].all())


def shard_buckets(rows: ndarray, buckets: Sequence[Bucket]) -> Int64[ndarray, "b"]:
    """The bucket of each row of a shard of pictures."""
    return nearest_bucket(rows["height"].astype(np.int64), rows["width"].astype(np.int64), buckets)


def _kept(path: Path, shape: tuple[int, int]) -> ndarray | None:
    """What was kept, unless it is not there or not what was written: then it is counted again."""
    try:
        table = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return table if table.shape == shape and table.dtype == np.int64 else None


def _keep(path: Path, table: ndarray) -> None:
    try:
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            np.save(file, table)
    except OSError as error:
        _log.warning("data: %s cannot be written (%s); buckets are counted again at the next start", path, error)


class BucketSchedule:
    """Which bucket comes next: the one whose share of the samples consumed so far lacks the most.

    No bucket is ever a global batch ahead of its exact proportion. ``positions`` (samples consumed of each bucket) is
    the whole state.
    """

    def __init__(self, shares: Float64[ndarray, "buckets"], positions: Int64[ndarray, "buckets"]) -> None:
        self.shares, self.positions = shares, positions.copy()
        self.position = int(positions.sum())
        """Samples consumed of all buckets together."""

    @staticmethod
    def positions_at(shares: Float64[ndarray, "buckets"], position: int) -> Int64[ndarray, "buckets"]:
        """The positions nearest to the exact proportion after ``position`` samples."""
        positions = np.floor(shares * position).astype(np.int64)
        positions[np.argmax(shares)] += position - positions.sum()
        return positions

    def step(self, global_batch_size: int) -> tuple[int, int, int]:
        """Consume one global batch: its bucket, its first position in the bucket, and in the stream of all buckets."""
        position = self.position
        lacking = self.shares * (position + global_batch_size) - self.positions
        bucket = int(np.argmax(lacking))
        start = int(self.positions[bucket])
        self.positions[bucket] += global_batch_size
        self.position += global_batch_size
        return bucket, start, position
