"""Shards are there before they are used, in the order of the plan, and no more of them than fit."""

import os
import signal
import time
from dataclasses import replace

import numpy as np
import pytest

from ipa_train.data.index import Index
from ipa_train.data.local_copies import GIB
from ipa_train.data.prefetch import (
    NUM_CONNECTIONS,
    Downloads,
    Prefetcher,
    lanes_of_node,
    remote_sizes,
    require_room,
    shards_ahead,
)
from ipa_train.errors import ConfigError
from tests.data.conftest import write_shards
from tests.data.http_server import http_server
from tests.data.test_remote import remote_data


def load(data, steps):
    """The keys of a few batches without a bad sample."""
    loader = iter(data.loader())
    batches = [next(loader) for _ in range(steps)]
    assert not any(batch.bad for batch in batches)
    return [key for batch in batches for key in batch.batch.keys]


def all_lanes(stream):
    return lanes_of_node(stream, np.zeros(len(stream.plans), np.int64), global_batch_size=8, node=0, num_nodes=1)


def wait_for(condition):
    for _ in range(1500):
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError("waited for 30 s")


def test_shards_arrive_in_the_order_of_the_plan_before_they_are_used(tmp_path):
    folder = write_shards(tmp_path / "shards", (6,) * 24)
    size = max(path.stat().st_size for path in folder.glob("*.tar"))
    with http_server(folder) as server:
        data = remote_data(server, tmp_path, num_lanes=2, window_size=6, cache_gib=12 * size / GIB)
        plan, copies, start = data.stream, data.copies, np.zeros(1, np.int64)
        sizes, lanes = remote_sizes(plan), all_lanes(plan)
        order = shards_ahead(plan, start, lanes, sizes, max_bytes=2**40)
        first = shards_ahead(plan, start, lanes, sizes, max_bytes=copies.max_bytes)
        assert order[: len(first)] == first
        assert 12 <= len(first) < 24
        copies.keep_only(())
        server.requests.clear()
        prefetcher = Prefetcher(plan, start, lanes, copies)
        paths = [shard.path for shard in data.index.shards]
        wait_for(lambda: all(paths[number].exists() for number in first))
        arrived = [int(name[:5]) for name in server.names("GET")]
        assert all(abs(first.index(n) - i) < NUM_CONNECTIONS for i, n in enumerate(arrived)), (first, arrived)
        server.requests.clear()
        assert len(load(data, 4)) == 32
        assert not server.requests, "all was there before it was used"

        later = np.array([72])
        prefetcher.advance(later)
        second = shards_ahead(plan, later, lanes, sizes, max_bytes=copies.max_bytes)
        wait_for(lambda: {n for n, path in enumerate(paths) if path.exists()} == set(second))
        assert copies.num_bytes() <= copies.max_bytes
        assert set(server.names("GET")) == {f"{n:05d}.tar" for n in set(second) - set(first)}
        prefetcher.advance(start)
        wait_for(lambda: {n for n, path in enumerate(paths) if path.exists()} == set(first))
        wait_for(lambda: prefetcher.advance(start) or prefetcher.num_again == len(set(first) - set(second)))
        prefetcher.stop()
        assert prefetcher.num_downloaded == len(first) + len(set(second) - set(first)) + prefetcher.num_again


def test_a_cap_below_what_is_read_at_once_is_refused(server, tmp_path):
    with pytest.raises(ConfigError, match=r"data\.cache_gib=\S+ cannot hold the 3 shards .* at once: give at least"):
        _ = remote_data(server, tmp_path, cache_gib=(server.folder / "00002.tar").stat().st_size * 1.5 / GIB).stream


def test_a_cap_above_the_disk_is_refused(server, tmp_path):
    """The disk is as large as it is: so are the shards that the index tells of."""
    data = remote_data(server, tmp_path, cache_gib=2.0**20)
    stream, shards = data.stream, data.index.shards
    huge = [replace(shard, entry=replace(shard.entry, tar_bytes=2**48)) for shard in shards]
    stream.loader.reader.index = Index(tuple(huge))
    with pytest.raises(ConfigError, match=r"cache has \S+ GiB left, less than data\.cache_gib=1\.05e\+06: lower it"):
        require_room(stream, all_lanes(stream), data.copies)


def test_a_prefetcher_that_cannot_says_so_and_reading_goes_on(server, tmp_path, caplog):
    data = remote_data(server, tmp_path)
    plan = data.stream
    data.copies.keep_only(())
    server.faults["00001.tar"] = [("status", 403)]
    prefetcher = Prefetcher(plan, np.zeros(1, np.int64), all_lanes(plan), data.copies)
    wait_for(lambda: prefetcher.advance(np.zeros(1, np.int64)) or "00001.tar: 403" in caplog.text)
    os.kill(prefetcher._process.pid, signal.SIGKILL)
    prefetcher._process.join()
    prefetcher.advance(np.ones(1, np.int64))
    assert "the process has ended" in caplog.text
    prefetcher.advance(np.zeros(1, np.int64))
    prefetcher.stop()
    data.copies.prepare()
    assert len(load(data, 3)) == 24


def test_what_fails_ahead_of_its_time_is_tried_again_and_not_counted_against_it(server, tmp_path):
    data = remote_data(server, tmp_path)
    shard = data.index.shards[1]
    data.copies.keep_only(())
    server.faults["00001.tar"] = [("status", 403), ("status", 403)]
    downloads, events = Downloads(data.index.shards, pause_seconds=0.1), []

    def is_there():
        downloads.want([] if shard.path.exists() else [1])
        events.extend(downloads.finished())
        return any(not event.error for event in events)

    wait_for(is_there)
    assert [bool(event.error) for event in events] == [True, False], "told once"
    assert server.count("GET", "00001.tar") == 1 + 3


@pytest.mark.parametrize("sources", [1, 2])
def test_each_node_downloads_what_its_own_ranks_read(server, tmp_path, sources):
    """Foretold for each of four nodes: what the two ranks of it then read, and together it is all, once."""
    shards, options = None, {"num_lanes": 8, "window_size": 2, "global_batch_size": 8}
    if sources == 2:
        options["weights"] = {"a": 0.6, "b": 0.4}
        shards = {"a": f"{server.url}/00000.tar", "b": [f"{server.url}/00001.tar", f"{server.url}/00002.tar"]}
    data = remote_data(server, tmp_path, shards=shards, **options)
    stream, start, lanes = data.stream, np.zeros(1, np.int64), []
    for node in range(4):
        mine = lanes_of_node(stream, start, global_batch_size=8, node=node, num_nodes=4)
        lanes.append(mine[0])
        for rank in (2 * node, 2 * node + 1):
            sampler = iter(data.loader(rank=rank, world_size=8).sampler)
            for _ in range(20):
                places = next(sampler)
                assert set(stream.plans[0].lanes(places.bucket_positions).tolist()) <= mine[0]
    num_lanes = sum(plan.num_lanes for _, plan, *_ in stream.parts(start))
    assert frozenset().union(*lanes) == frozenset(range(num_lanes))
    # Nothing but the batches across the seams of these short epochs makes a lane belong to two nodes.
    assert sources == 2 or sum(map(len, lanes)) < 2 * num_lanes
