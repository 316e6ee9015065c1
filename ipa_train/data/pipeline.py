"""From positions to batches: read by index, fill a batch, replace what is bad. Runs in the loader's workers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Int64
from numpy import ndarray
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from ipa_train.data.batch import Batch
from ipa_train.data.buckets import BucketSchedule
from ipa_train.data.plan import Mixture, Plan, rank_share
from ipa_train.data.reader import ShardReader
from ipa_train.data.tolerance import MAX_ATTEMPTS, BadSample, all_bad
from ipa_train.errors import ConfigError, DataError

ENDLESS = 2**40
"""Length that the loader claims: without a length Lightning resumes one batch too far."""


class Places(NamedTuple):
    """One rank's micro-batch, as the sampler names it."""

    bucket: int
    positions: Int64[ndarray, "b"]
    """In the stream: the key of every draw."""
    bucket_positions: Int64[ndarray, "b"]
    """In the bucket's own plan."""


@runtime_checkable
class UnfinishedBatch(Protocol):
    """A batch with a place for each sample."""

    def load(self, i: int, shard: int, row: int) -> tuple[str, str]:
        """Fill place ``i``; return (caption, key). Raises DataError if the sample is bad; the place may be refilled."""

    def finish(self, captions: list[str], keys: list[str]) -> Batch:
        """The batch, when every place is filled."""


@runtime_checkable
class BatchLoader(Protocol):
    """What a sample's content becomes."""

    reader: ShardReader

    def begin(self, bucket: int, positions: Tensor) -> UnfinishedBatch:
        """Make room for the samples of these positions."""

    def shard(self, group: int, bucket: int) -> int:
        """The shard that holds the samples of a bucket which a plan counts under ``group``."""


@dataclass(frozen=True)
class LoadedBatch:
    """What a worker hands over: the batch, or why there is none, and the bad samples met on the way.

    An exception raised in a worker would arrive wrapped in a traceback, and without the bad samples that explain it.
    """

    result: Batch | DataError
    bad: list[BadSample]
    num_samples: int

    @property
    def batch(self) -> Batch:
        """The batch.

        Raises:
            DataError: there is none, the shards are too damaged.
        """
        if isinstance(self.result, DataError):
            raise self.result
        return self.result

    def pin_memory(self) -> "LoadedBatch":
        """Called by the DataLoader when ``pin_memory`` is on."""
        return self if isinstance(self.result, DataError) else replace(self, result=self.result.pin_memory())


class StreamDataset(Dataset[LoadedBatch]):
    """The stream as a map from places to a batch; one plan for each bucket."""

    def __init__(self, plans: Sequence[Plan | Mixture], loader: BatchLoader) -> None:
        self.plans, self.loader = list(plans), loader

    def __getitem__(self, places: Places) -> LoadedBatch:
        bad: list[BadSample] = []
        result: Batch | DataError
        try:
            result = self._batch(places, bad)
        except DataError as error:
            result = error
        return LoadedBatch(result, bad, len(places.positions))

    def _batch(self, places: Places, bad: list[BadSample]) -> Batch:
        batch = self.loader.begin(places.bucket, torch.from_numpy(places.positions))
        _, groups, numbers = self.plans[places.bucket].locate(places.bucket_positions)
        captions, keys = [], []
        for i, (group, number) in enumerate(zip(groups.tolist(), numbers.tolist(), strict=True)):
            caption, key = self._load(batch, i, places, group, number, bad)
            captions.append(caption)
            keys.append(key)
        return batch.finish(captions, keys)

    def _load(
        self, batch: UnfinishedBatch, i: int, places: Places, group: int, number: int, bad: list[BadSample]
    ) -> tuple[str, str]:
        """Fill a place with its sample, or with a substitute for it."""
        reader = self.loader.reader
        for attempt in range(MAX_ATTEMPTS):
            if attempt:
                group, number = self.plans[places.bucket].locate_again(int(places.bucket_positions[i]), attempt)
            shard = self.loader.shard(group, places.bucket)
            row = number
            try:
                row = reader.row(shard, places.bucket, number)
                caption, key = batch.load(i, shard, row)
                return caption, f"{reader.index.shards[shard].name}/{key}"
            except DataError as error:
                source, position = reader.index.shards[shard], int(places.positions[i])
                key = reader.key(shard, row)
                bad.append(BadSample(position, source.tar.location, source.entry.num_samples, row, key, str(error)))
        raise all_bad(bad[-MAX_ATTEMPTS:])


class StreamSampler(Sampler[Places]):
    """Places of one rank's micro-batches from the schedule's state on, for ever."""

    def __init__(
        self,
        plans: Sequence[Plan | Mixture],
        schedule: BucketSchedule,
        *,
        global_batch_size: int,
        batch_size: int,
        rank: int,
        world_size: int,
    ) -> None:
        self.plans, self.schedule = list(plans), schedule
        self.global_batch_size, self.batch_size = global_batch_size, batch_size
        self.rank, self.world_size = rank, world_size

    def __iter__(self) -> Iterator[Places]:
        schedule = BucketSchedule(self.schedule.shares, self.schedule.positions)
        while True:
            bucket, start, position = schedule.step(self.global_batch_size)
            share = rank_share(self.plans[bucket], start, self.global_batch_size, self.rank, self.world_size)
            for offsets in share.reshape(-1, self.batch_size):
                yield Places(bucket, position + offsets, start + offsets)

    def __len__(self) -> int:
        return ENDLESS


def count_micro_batches(*, global_batch_size: int, batch_size: int | None, world_size: int) -> int:
    """How many micro-batches of ``batch_size`` a rank takes for one optimizer step.

    Raises:
        ConfigError: the sizes do not divide.
    """
    if global_batch_size < 1 or global_batch_size % world_size:
        raise ConfigError(
            f"data.global_batch_size={global_batch_size} cannot be shared equally by {world_size} processes "
            f"(trainer.devices x trainer.num_nodes): choose a multiple of {world_size}."
        )
    share = global_batch_size // world_size
    if batch_size is None:
        return 1
    if batch_size < 1 or share % batch_size:
        raise ConfigError(
            f"data.batch_size={batch_size} does not divide the {share} samples that each of {world_size} processes "
            f"takes of data.global_batch_size={global_batch_size}."
        )
    return share // batch_size
