"""What is measured of the pictures and captions of one shard, in counts that add up over shards."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy import ndarray

from data_tools.histogram import Histogram
from data_tools.metadata import find_column
from ipa_train.data.buckets import Bucket, shard_buckets
from ipa_train.data.index import Index, Shard, read_excluded
from ipa_train.data.reader import ShardReader
from ipa_train.errors import DataError
from ipa_train.runtime.files import atomic_write


@dataclass(frozen=True)
class Measure:
    """One quantity of a sample, and how it is shown."""

    title: str
    unit: str
    edges: ndarray
    is_log: bool = False
    """Bins grow by a factor."""
    is_score: bool = False
    """It stands in the parquet beside the shard, in the column that ``metadata.COLUMNS`` knows under its name."""


MEASURES = {
    "short_side": Measure("Short side", "px", np.linspace(0, 2048, 65)),
    "megapixels": Measure("Picture size", "MP", np.geomspace(0.01, 100, 65), is_log=True),
    "aspect_ratio": Measure("Width to height", "", np.geomspace(0.25, 4, 65), is_log=True),
    "sample_kib": Measure("Bytes per sample", "KiB", np.geomspace(1, 65536, 129), is_log=True),
    "caption_characters": Measure("Caption length", "characters", np.linspace(0, 400, 81)),
    "caption_words": Measure("Caption length", "words", np.linspace(0, 80, 81)),
    "similarity": Measure("CLIP similarity", "", np.linspace(0, 0.6, 121), is_score=True),
    "aesthetic": Measure("Aesthetic score", "", np.linspace(0, 10, 81), is_score=True),
    "watermark": Measure("Watermark probability", "", np.linspace(0, 1, 51), is_score=True),
    "unsafe": Measure("Unsafe probability", "", np.linspace(0, 1, 51), is_score=True),
}
_BATCH_ROWS = 65_536


class ShardStats:
    """Counts over samples; those of several shards add up."""

    def __init__(self, num_buckets: int) -> None:
        self.histograms = {name: Histogram(measure.edges) for name, measure in MEASURES.items()}
        self.counts: Counter[str] = Counter()
        self.bucket_counts = np.zeros(num_buckets, np.int64)
        self.bucket_enlarged = np.zeros(num_buckets, np.int64)
        """Of these, pictures smaller than their bucket on a side: training would enlarge them."""

    def merge(self, other: "ShardStats") -> None:
        """Add those of another shard."""
        for name, histogram in self.histograms.items():
            histogram.merge(other.histograms[name])
        self.counts.update(other.counts)
        self.bucket_counts += other.bucket_counts
        self.bucket_enlarged += other.bucket_enlarged

    def write(self, path: Path, identity: str) -> None:
        """Keep them, together with what they depend on."""
        content = {
            "identity": identity,
            "histograms": {name: histogram.state() for name, histogram in self.histograms.items()},
            "counts": dict(self.counts),
            "bucket_counts": self.bucket_counts.tolist(),
            "bucket_enlarged": self.bucket_enlarged.tolist(),
        }
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(content))

    @classmethod
    def read(cls, path: Path, identity: str) -> "ShardStats | None":
        """What was kept; None if nothing was, or not of this identity."""
        try:
            content = json.loads(path.read_text())
            if content["identity"] != identity:
                return None
            found = cls(len(content["bucket_counts"]))
            for name, histogram in found.histograms.items():
                histogram.load(content["histograms"][name])
            found.counts.update(content["counts"])
            found.bucket_counts += content["bucket_counts"]
            found.bucket_enlarged += content["bucket_enlarged"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return found


def measure_shard(shard: Shard, *, parts: Path, buckets: Sequence[Bucket], resolution: int) -> ShardStats:
    """Measure an indexed shard, or read what an earlier run kept of it in ``parts``.

    Raises:
        DataError: the shard, or the parquet beside it, cannot be read.
    """
    parquet = shard.path.with_suffix(".parquet")
    written = parquet.stat().st_mtime_ns if parquet.exists() else None
    measures = {name: measure.edges.tolist() for name, measure in MEASURES.items()}
    facts = [asdict(shard.entry), written, list(buckets), resolution, measures]
    identity = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    path = parts / f"{shard.path.stem}-{hashlib.sha256(str(shard.path).encode()).hexdigest()[:8]}.json"
    if kept := ShardStats.read(path, identity):
        kept.counts["shards measured before"] = 1
        return kept
    stats = ShardStats(len(buckets))
    _measure_pictures(stats, shard.rows(), buckets, resolution)
    _measure_captions(stats, shard)
    if written is not None:
        _measure_scores(stats, parquet, read_excluded(shard.rows_path.parent).get(shard.name, frozenset()))
    stats.write(path, identity)
    return stats


def _measure_pictures(stats: ShardStats, rows: ndarray, buckets: Sequence[Bucket], resolution: int) -> None:
    stats.counts["samples"] = len(rows)
    stats.histograms["sample_kib"].add(rows["length"] / 1024)
    stats.counts["bytes"] = int(rows["length"].sum(dtype=np.int64))
    rows = rows[rows["height"] > 0]
    stats.counts["pictures whose size cannot be read"] = stats.counts["samples"] - len(rows)
    heights, widths = rows["height"].astype(np.int64), rows["width"].astype(np.int64)
    stats.histograms["short_side"].add(np.minimum(heights, widths))
    stats.histograms["megapixels"].add(heights * widths / 1e6)
    stats.histograms["aspect_ratio"].add(widths / heights)
    stats.counts["pictures smaller than the resolution"] = int((np.minimum(heights, widths) < resolution).sum())
    numbers, sizes = shard_buckets(rows, buckets), np.array(buckets)
    is_enlarged = (heights < sizes[numbers, 0]) | (widths < sizes[numbers, 1])
    stats.bucket_counts += np.bincount(numbers, minlength=len(buckets))
    stats.bucket_enlarged += np.bincount(numbers[is_enlarged], minlength=len(buckets))


def _measure_captions(stats: ShardStats, shard: Shard) -> None:
    reader = ShardReader(Index((shard,)))
    characters, words = [], []
    for row in range(shard.entry.num_samples):
        try:
            caption = reader.caption(0, row)
        except DataError:
            stats.counts["captions that cannot be read"] += 1
            continue
        characters.append(len(caption))
        words.append(len(caption.split()))
    stats.histograms["caption_characters"].add(np.array(characters))
    stats.histograms["caption_words"].add(np.array(words))
    stats.counts["empty captions"] = characters.count(0)


def _measure_scores(stats: ShardStats, path: Path, excluded: frozenset[str]) -> None:
    """Scores that came with the metadata, of the samples that img2dataset could download and nothing excludes."""
    try:
        with pq.ParquetFile(path) as file:
            scores = [name for name, measure in MEASURES.items() if measure.is_score]
            columns = {name: find_column(file.schema_arrow, name) for name in (*scores, "key", "status")}
            found = {name: column for name, column in columns.items() if column is not None}
            has_scores = any(name in found for name in scores)
            for batch in file.iter_batches(_BATCH_ROWS, columns=list(found.values())) if has_scores else ():
                keys, status = (batch[found[name]].to_pylist() if name in found else None for name in ("key", "status"))
                kept = np.ones(len(batch), bool)
                if status is not None:
                    kept &= np.array([value == "success" for value in status])
                if keys is not None and excluded:
                    kept &= np.array([key not in excluded for key in keys])
                for measure in scores:
                    if (column := found.get(measure)) is None:
                        continue
                    values = np.array(batch[column].cast(pa.float64()).to_numpy(zero_copy_only=False))[kept]
                    known = values[np.isfinite(values)]
                    stats.histograms[measure].add(known)
                    if len(known) < len(values):
                        stats.counts[f"samples without {measure}"] += len(values) - len(known)
    except pa.ArrowException as error:
        raise DataError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from error
