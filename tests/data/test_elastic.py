"""Whoever loads the stream, and however often it stops, it is the same stream: each sample once per epoch."""

import hashlib
import json
import multiprocessing

import numpy as np
import pytest
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

from ipa_train.data.buckets import BucketSchedule
from ipa_train.data.pipeline import StreamSampler
from ipa_train.data.plan import Plan
from tests.data.conftest import write_shards
from tests.data.test_pipeline import BUCKETS, SIZES, damage, datamodule, stream


class Located(Dataset):
    """The samples of a micro-batch by number, without reading them."""

    def __init__(self, plans):
        self.plans = plans

    def __getitem__(self, places):
        plan = self.plans[places.bucket]
        _, shards, rows = plan.locate(places.bucket_positions)
        return (
            places.bucket,
            places.positions.tolist(),
            ((np.cumsum(plan.counts) - plan.counts)[shards] + rows).tolist(),
        )


@settings(max_examples=25, deadline=None)
@given(
    counts=st.lists(st.lists(st.integers(0, 20), min_size=3, max_size=3).filter(any), min_size=1, max_size=3),
    num_lanes=st.integers(1, 9),
    window_size=st.integers(1, 30),
    batch_size=st.integers(1, 5),
    micro_batches=st.integers(1, 3),
    world_size=st.integers(1, 4),
    workers=st.sampled_from([0, 0, 0, 1, 2]),
)
def test_each_sample_exactly_once(counts, num_lanes, window_size, batch_size, micro_batches, world_size, workers):
    """Over all ranks and their workers, for about two epochs: no position twice or never, and so no sample."""
    plans = [Plan(np.array(of_bucket), num_lanes=num_lanes, window_size=window_size) for of_bucket in counts]
    sizes = [plan.num_samples for plan in plans]
    schedule = BucketSchedule(np.array(sizes) / sum(sizes), np.zeros(len(plans), np.int64))
    global_batch_size = batch_size * micro_batches * world_size
    steps = -(-2 * sum(sizes) // global_batch_size) + len(plans)
    positions, samples = [], [[] for _ in plans]
    for rank in range(world_size):
        sampler = StreamSampler(
            plans,
            schedule,
            global_batch_size=global_batch_size,
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
        )
        loader = iter(DataLoader(Located(plans), sampler=sampler, batch_size=None, num_workers=workers))
        for _ in range(steps * micro_batches):
            bucket, of_batch, found = next(loader)
            positions += of_batch
            samples[bucket] += found
    assert sorted(positions) == list(range(steps * global_batch_size))
    for size, found in zip(sizes, samples, strict=True):
        times = np.bincount(found, minlength=size)
        assert len(times) == size
        assert times.min() == len(found) // size
        assert times.max() == -(-len(found) // size)


@pytest.mark.parametrize(
    ("options", "chain"),
    [
        pytest.param({}, [(4, 8, 2), (8, 16, 1), (1, 8, 2), (3, 12, 2), (2, 8, 1)], id="one bucket"),
        pytest.param(BUCKETS, [(4, 8, 3), (8, 8, 2), (1, 8, 4), (2, 8, 3)], id="buckets"),
    ],
)
def test_a_chain_of_resumed_runs_is_pixel_identical(tmp_path, options, chain):
    """Ranks, workers and batch size change in mid-epoch, and some samples are bad."""
    shards = write_shards(tmp_path / "shards", (9, 7, 12), sizes=SIZES)
    options = options | {"crop": "random", "flip_rate": 0.5}
    damage(shards, {"00000.tar/2", "00002.tar/0", "00002.tar/5"})
    seen, positions = {}, None
    for number, (world_size, size, steps) in enumerate(chain):
        data = datamodule(shards, global_batch_size=size, **options)
        schedule = BucketSchedule(data.stream.shares, np.zeros(len(data.stream.buckets), np.int64))
        schedule.positions = schedule.positions if positions is None else positions
        part = stream(data, schedule.positions, steps, world_size=world_size, workers=number % 2)
        assert seen.keys().isdisjoint(part)
        seen |= part
        for _ in range(steps):
            schedule.step(size)
        positions = schedule.positions
    assert sorted(seen) == list(range(positions.sum()))
    assert seen == stream(datamodule(shards, **options), 0, positions.sum() // 8)


def load_as_a_rank(rank, method, shards, folder):
    """One of two processes, with a worker: rank 0 writes what both have loaded, {position: hash of pixels} of each."""
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    multiprocessing.set_start_method(method, force=True)
    loader = iter(datamodule(shards).loader(rank=dist.get_rank(), world_size=dist.get_world_size(), workers=1))
    mine = [hashes(next(loader).batch) for _ in range(3)]
    of_both = [None, None]
    dist.all_gather_object(of_both, mine)
    if rank == 0:
        (folder / "loaded.json").write_text(json.dumps(of_both))
    dist.destroy_process_group()


def hashes(batch):
    pixels = [hashlib.sha256(picture.numpy().tobytes()).hexdigest() for picture in batch.content.pixels]
    return dict(zip(map(str, batch.positions.tolist()), pixels, strict=True))


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_two_processes_share_the_stream_however_workers_are_started(shards, tmp_path, method):
    alone = iter(datamodule(shards).loader())
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=load_as_a_rank, args=(rank, method, shards, tmp_path)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
        assert process.exitcode == 0
    for first, second in zip(*json.loads((tmp_path / "loaded.json").read_text()), strict=True):
        assert first.keys().isdisjoint(second)
        assert first | second == hashes(next(alone).batch)
