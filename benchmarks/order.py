"""What the order of the samples costs at 372M samples in 41k shards, and how well it mixes them."""

import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import webdataset
from numpy import ndarray

from ipa_train.data.buckets import BucketSchedule
from ipa_train.data.decode import Decoder
from ipa_train.data.image_prompts import ImagePrompts
from ipa_train.data.index import Index, build_index
from ipa_train.data.index_file import write_entries
from ipa_train.data.pictures import PictureLoader
from ipa_train.data.pipeline import StreamSampler
from ipa_train.data.plan import Plan
from ipa_train.data.reader import ShardReader
from ipa_train.data.stream import Stream, make_stream

GLOBAL_BATCH_SIZE = 256
NUM_BUCKETS, NUM_SOURCES = 10, 3


def draw_counts(num_samples: int, num_shards: int) -> ndarray:
    """Samples per shard, as uneven as downloads leave them."""
    rng = np.random.default_rng(0)
    counts = rng.normal(1.0, 0.05, num_shards).clip(0.5, 1.5)
    return (counts * num_samples / counts.sum()).astype(np.int64)


def single(counts: ndarray) -> Stream:
    return _stream(counts[None], num_sources=1)


def bucketed(counts: ndarray) -> Stream:
    rates = np.random.default_rng(1).dirichlet(np.full(NUM_BUCKETS, 2.0))
    return _stream((counts * rates[:, None]).astype(np.int64), num_sources=1)


def mixed(counts: ndarray) -> Stream:
    return _stream(counts[None], num_sources=NUM_SOURCES)


def _stream(counts: ndarray, *, num_sources: int) -> Stream:
    buckets = [(512, 512)] * len(counts)
    loader = PictureLoader(ShardReader(Index(())), buckets, decoder=Decoder(), image_prompts=ImagePrompts(size=None))
    parts = np.array_split(np.arange(counts.shape[1]), num_sources)
    sources = {f"source{number}": part for number, part in enumerate(parts)}
    weights = {name: 1.0 + number for number, name in enumerate(sources)} if num_sources > 1 else None
    options: dict[str, Any] = {"seed": 0, "num_lanes": 64, "window_size": 20_000}
    return make_stream(loader, buckets, counts, sources, weights=weights, **options)


def _locations(stream: Stream, start: ndarray) -> Iterator[tuple[ndarray, ...]]:
    """Where the samples of rank 3 of 8 lie, batch by batch, from ``start`` on."""
    schedule = BucketSchedule(stream.shares, start)
    options = {"global_batch_size": GLOBAL_BATCH_SIZE, "batch_size": GLOBAL_BATCH_SIZE // 8}
    for places in StreamSampler(stream.plans, schedule, rank=3, world_size=8, **options):
        yield stream.plans[places.bucket].locate(places.bucket_positions)


def measure_order(make: Callable[[ndarray], Stream], counts: ndarray, *, num_steps: int) -> dict[str, float]:
    """Resume in mid-epoch, then go on for ``num_steps``; wall time, for nothing here waits."""

    def resume() -> tuple[Stream, Iterator[tuple[ndarray, ...]]]:
        stream = make(counts)
        start = BucketSchedule.positions_at(stream.shares, int(counts.sum()) * 2 // 3)
        batches = _locations(stream, start)
        next(batches)
        return stream, batches

    tracemalloc.start()
    stream, batches = resume()
    for _ in range(num_steps):
        next(batches)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    del stream, batches
    start = time.perf_counter()
    stream, batches = resume()
    resumed = time.perf_counter()
    for _ in range(num_steps):
        next(batches)
    samples = num_steps * GLOBAL_BATCH_SIZE // 8
    per_sample = (time.perf_counter() - resumed) / samples
    schedule = BucketSchedule(stream.shares, np.zeros(len(stream.buckets), np.int64))
    replayed = time.perf_counter()
    for _ in range(10_000):
        schedule.step(GLOBAL_BATCH_SIZE)
    return {
        "resume_ms": 1e3 * (resumed - start),
        "us_per_sample": 1e6 * per_sample,
        "peak_mb": peak / 1e6,
        "replay_10000_steps_ms": 1e3 * (time.perf_counter() - replayed),
    }


def measure_index(folder: Path, scratch: Path, *, num_shards: int) -> dict[str, float]:
    """What building the index of ``folder`` costs per sample, and what reading one of ``num_shards`` costs a start."""
    started = time.process_time()
    index = build_index(str(folder), index_dir=scratch / "index", num_workers=1)
    seconds, num_samples = time.process_time() - started, int(index.counts.sum())
    num_bytes = sum(shard.rows_path.stat().st_size for shard in index.shards)
    many, entry = scratch / "many", replace(index.shards[0].entry, tar_bytes=0)
    many.mkdir()
    entries = {}
    for number in range(num_shards):
        tar, rows = many / f"{number:05d}.tar", many / f"{number:05d}.idx.npy"
        tar.touch()
        rows.touch()
        entries[rows.name] = replace(entry, tar_version=str(tar.stat().st_mtime_ns))
    write_entries({many: entries})
    started = time.perf_counter()
    build_index(str(many))
    return {
        "us_per_sample": 1e6 * seconds / num_samples,
        "bytes_per_sample": num_bytes / num_samples,
        "read_seconds": time.perf_counter() - started,
    }


def distinct_shards(
    *, num_shards: int, shard_size: int, window_size: int, buffer_size: int, num_lanes: int = 64
) -> dict[str, float]:
    """Different shards in a global batch on average: ours, webdataset's over as many streams as ranks, and ideal."""
    counts = np.full(num_shards, shard_size)
    plan = Plan(counts, num_lanes=num_lanes, window_size=window_size)
    starts = range(0, plan.num_samples // 2, plan.num_samples // 50)
    mine = [len(np.unique(plan.locate(np.arange(s, s + GLOBAL_BATCH_SIZE))[1])) for s in starts]
    streams = [_webdataset_shards(rank, num_shards, shard_size, buffer_size) for rank in range(8)]
    theirs = []
    for _ in range(8):
        batch = [next(stream) for stream in streams for _ in range(GLOBAL_BATCH_SIZE // 8)]
        theirs.append(len(set(batch)))
        for stream in streams:
            for _ in range(shard_size // 2):
                next(stream)
    ideal = num_shards * (1 - (1 - 1 / num_shards) ** GLOBAL_BATCH_SIZE)
    return {"ours": float(np.mean(mine)), "webdataset": float(np.mean(theirs)), "ideal": ideal}


def _webdataset_shards(rank: int, num_shards: int, shard_size: int, buffer_size: int) -> Iterator[int]:
    """The shard of each sample of one of 8 ranks; webdataset's own shuffling of the numbers of shards alone."""
    own = np.random.default_rng(rank).permutation(np.arange(rank, num_shards, 8))
    return iter(
        webdataset.DataPipeline(
            lambda: (int(shard) for shard in np.tile(own, 100) for _ in range(shard_size)),
            webdataset.shuffle(buffer_size, initial=buffer_size),
        )
    )
