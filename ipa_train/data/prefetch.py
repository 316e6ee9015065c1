"""Remote shards are downloaded ahead of training in the order of the plan, and evicted when they are no longer needed.

One process per node does it, so that neither Python's lock nor a fork of the training process meets its threads. It
holds those shards that come next, as many as fit into ``data.cache_gib``; what is not among them is evicted. Readers
depend on none of this: they download what they do not find.
"""

import heapq
import logging
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from multiprocessing.connection import Connection
from operator import itemgetter
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64
from numpy import ndarray

from ipa_train.data.index import Shard
from ipa_train.data.local_copies import GIB, LocalCopies
from ipa_train.data.plan import Plan, rank_share
from ipa_train.data.sources import RemoteFile
from ipa_train.data.stream import Stream
from ipa_train.errors import ConfigError

NUM_CONNECTIONS = 4
_MAX_WINDOWS = 20_000
_NUM_BATCHES = 64  # which lanes a node reads shows within so many
Lanes = list[frozenset[int]]
"""Of each bucket, those that a node reads."""
_TICK_SECONDS = 0.2
_log = logging.getLogger(__name__)


def lanes_of_node(
    stream: Stream, positions: Int64[ndarray, "buckets"], *, global_batch_size: int, node: int, num_nodes: int
) -> Lanes:
    """The lanes that one of several nodes reads: batches are shared out lane by lane, so each reads its own."""
    found = []
    for plan, position, share in zip(stream.plans, positions.tolist(), stream.shares, strict=True):
        lanes = set[int]()
        for start in range(position, position + _NUM_BATCHES * global_batch_size, global_batch_size):
            if share > 0:
                lanes.update(plan.lanes(start + rank_share(plan, start, global_batch_size, node, num_nodes)).tolist())
        found.append(frozenset(lanes))
    return found


def shards_ahead(
    stream: Stream, positions: Int64[ndarray, "buckets"], lanes: Lanes, sizes: Mapping[int, int], *, max_bytes: int
) -> list[int]:
    """Remote shards in the order in which these lanes need them from ``positions`` on, as many as fit together.

    ``sizes`` are those of :func:`remote_sizes`.
    """
    windows = heapq.merge(*(_windows(stream, lanes, *part) for part in stream.parts(positions)), key=itemgetter(0))
    wanted: dict[int, None] = {}
    for shard in (shard for _, shards in islice(windows, _MAX_WINDOWS) for shard in shards):
        if shard in sizes and shard not in wanted:
            max_bytes -= sizes[shard]
            if max_bytes < 0:
                break
            wanted[shard] = None
            if len(wanted) == len(sizes):
                break
    return list(wanted)


def require_room(stream: Stream, lanes: Lanes, copies: LocalCopies) -> None:
    """See whether the copies fit: those that are read at once under the cap, and all under the cap on the disk.

    At once are read the shards of the open windows and, as workers run ahead, of the next ones.

    Raises:
        ConfigError: they do not; says what would.
    """
    sizes, needed = remote_sizes(stream), set[int]()
    for bucket, plan, position, share, lane in stream.parts(np.zeros(len(stream.plans), np.int64)):
        for samples, shards in _windows(stream, lanes, bucket, plan, position, share, lane):
            if samples * share > plan.round_size + plan.num_lanes:
                break
            needed.update(shards)
    num_bytes = sum(sizes.get(shard, 0) for shard in needed)
    if num_bytes > copies.max_bytes:
        raise ConfigError(
            f"data.cache_gib={copies.max_bytes / GIB:.3g} cannot hold the {len(needed)} shards that are read at once: "
            f"give at least {1.1 * num_bytes / GIB:.3g}, or lower data.num_lanes or data.window_size."
        )
    free = shutil.disk_usage(copies.folder).free + copies.num_bytes()
    if free < min(copies.max_bytes, sum(sizes.values())):
        raise ConfigError(
            f"data.cache_dir={copies.folder} has {free / GIB:.3g} GiB left, less than data.cache_gib="
            f"{copies.max_bytes / GIB:.3g}: lower it, or give a folder on another disk."
        )


def remote_sizes(stream: Stream) -> dict[int, int]:
    """Bytes of each remote shard that holds samples, by its number."""
    shards = enumerate(stream.loader.reader.index.shards)
    return {n: s.entry.tar_bytes for n, s in shards if isinstance(s.tar, RemoteFile) and s.entry.num_samples}


def _windows(
    stream: Stream, lanes: Lanes, bucket: int, plan: Plan, position: int, share: float, first_lane: int
) -> Iterator[tuple[float, list[int]]]:
    """The windows of some lanes of a part of the stream, in samples of the whole stream."""
    if lanes[bucket].isdisjoint(range(first_lane, first_lane + plan.num_lanes)):
        return
    for samples, lane, groups in plan.windows(position):
        if first_lane + lane in lanes[bucket]:
            yield samples / share, [stream.loader.shard(int(group), bucket) for group in groups]


class Download(NamedTuple):
    """What came of one."""

    shard: int
    is_again: bool
    """It had been downloaded before, and evicted."""
    error: str


class Prefetcher:
    """Runs the process from the training process; start one on each node."""

    def __init__(self, stream: Stream, positions: Int64[ndarray, "buckets"], lanes: Lanes, copies: LocalCopies) -> None:
        self.num_downloaded = self.num_again = 0
        self._positions = positions
        copies.prepare()
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_run, args=(theirs, stream, positions, lanes, copies), daemon=True)
        self._process.start()
        theirs.close()

    def advance(self, positions: Int64[ndarray, "buckets"]) -> None:
        """Say what has been consumed, and note what has been downloaded meanwhile."""
        try:
            if not np.array_equal(positions, self._positions):
                self._connection.send(positions)
                self._positions = positions
            while self._connection.poll():
                download: Download = self._connection.recv()
                self.num_downloaded += not download.error
                self.num_again += download.is_again
                if download.error:
                    _log.warning("prefetch: %s; it will be tried again", download.error)
        except (OSError, EOFError):
            if not self._connection.closed:
                _log.warning("prefetch: the process has ended; shards are downloaded when they are needed")
                self._connection.close()

    def stop(self) -> None:
        """End the process; what it has half done it leaves to the next one to begin anew."""
        _log.info("prefetch: %d shards downloaded, %d of them again", self.num_downloaded, self.num_again)
        self._connection.close()
        self._process.terminate()
        self._process.join()


def _run(
    connection: Connection, stream: Stream, positions: Int64[ndarray, "buckets"], lanes: Lanes, copies: LocalCopies
) -> None:
    """Download until the training process is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the training process's to answer
    shards = stream.loader.reader.index.shards
    downloads, sizes = Downloads(shards), remote_sizes(stream)
    paths = {number: shards[number].path for number in sizes}
    wanted = shards_ahead(stream, positions, lanes, sizes, max_bytes=copies.max_bytes)
    try:
        while True:
            present = copies.keep_only({paths[number] for number in wanted})
            downloads.want([number for number in wanted if paths[number] not in present])
            for download in downloads.finished():
                connection.send(download)
            time.sleep(_TICK_SECONDS)
            if connection.poll():
                while connection.poll():
                    positions = connection.recv()
                wanted = shards_ahead(stream, positions, lanes, sizes, max_bytes=copies.max_bytes)
    except (EOFError, ConnectionError):
        os._exit(0)  # an ordinary exit would wait for the downloads


class Downloads:
    """A few downloads at a time; what fails is tried again after a pause, for as long as it is wanted."""

    def __init__(self, shards: Sequence[Shard], *, pause_seconds: float = 30.0) -> None:
        self.shards, self.pause_seconds = shards, pause_seconds
        self.pool = ThreadPoolExecutor(NUM_CONNECTIONS)
        self.running: dict[int, Future[None]] = {}
        self.seen: set[int] = set()
        self.paused: dict[int, float] = {}
        """When each of those that have failed may be tried again."""

    def want(self, wanted: Sequence[int]) -> None:
        """Queue what is ``wanted``, in its order, and forget what is not wanted any more."""
        for number in self.running.keys() - wanted:
            if self.running[number].cancel():
                del self.running[number]
        for number in wanted:
            if number not in self.running and self.paused.get(number, 0.0) < time.monotonic():
                self.running[number] = self.pool.submit(self._download, self.shards[number])

    def finished(self) -> Iterator[Download]:
        """What has come to its end since the last call."""
        for number in [number for number, future in self.running.items() if future.done()]:
            error = self.running.pop(number).exception()
            if error is None:
                yield Download(number, number in self.seen, "")
                self.seen.add(number)
            else:
                if number not in self.paused:
                    yield Download(number, False, str(error))
                self.paused[number] = time.monotonic() + self.pause_seconds

    @staticmethod
    def _download(shard: Shard) -> None:
        assert isinstance(shard.tar, RemoteFile)
        if not shard.path.exists():
            shard.tar.download(insist=True)
