"""From positions to batches: read by index, decode, replace what is bad, stack. Runs in the loader's workers."""

import os
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from ipa_train.data.batch import Batch
from ipa_train.data.decode import Decoded, Decoder
from ipa_train.data.index import Index
from ipa_train.data.plan import Plan
from ipa_train.data.tar import BLOCK
from ipa_train.data.tolerance import MAX_ATTEMPTS, BadSample
from ipa_train.errors import ConfigError, DataError

ENDLESS = 2**40
"""Length that the loader claims: without a length Lightning resumes one batch too far."""
_MAX_OPEN_SHARDS = 128


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


class ShardReader:
    """Reads single samples of indexed shards; keeps the last used shards open."""

    def __init__(self, index: Index) -> None:
        self.index = index
        self._open: OrderedDict[int, tuple[int, np.ndarray]] = OrderedDict()

    def read(self, shard: int, row: int) -> tuple[bytes, str, str]:
        """Return (image bytes, caption, key).

        Raises:
            DataError: the shard cannot be read or is shorter than its index says, or the caption is no UTF-8.
        """
        descriptor, rows = self._shard(shard)
        where = rows[row]
        try:
            data = os.pread(descriptor, int(where["length"]), int(where["offset"]))
        except OSError as error:
            raise DataError(f"cannot read: {error.strerror}") from error
        if len(data) < where["length"]:
            raise DataError(f"truncated since it was indexed: {len(data)} of {where['length']} bytes")
        image = data[where["image_start"] :][: where["image_length"]]
        text = data[where["text_start"] :][: where["text_length"]]
        try:
            return image, text.decode("utf-8").strip(), self._key(data[where["image_start"] - BLOCK :])
        except UnicodeDecodeError as error:
            raise DataError("the caption is not UTF-8") from error

    def key(self, shard: int, row: int) -> str:
        """Name of a sample in its shard, as far as it can still be read."""
        try:
            descriptor, rows = self._shard(shard)
            where = rows[row]
            return self._key(os.pread(descriptor, BLOCK, int(where["offset"]) + int(where["image_start"]) - BLOCK))
        except (OSError, DataError):
            return f"row {row}"

    def _shard(self, shard: int) -> tuple[int, np.ndarray]:
        if shard not in self._open:
            source = self.index.shards[shard]
            try:
                rows = source.rows()
                self._open[shard] = os.open(source.path, os.O_RDONLY), rows
            except OSError as error:
                raise DataError(f"cannot open: {error.strerror}") from error
            if len(self._open) > _MAX_OPEN_SHARDS:
                os.close(self._open.popitem(last=False)[1][0])
        self._open.move_to_end(shard)
        return self._open[shard]

    @staticmethod
    def _key(header: bytes) -> str:
        return header[:100].split(b"\0", 1)[0].decode(errors="replace").partition(".")[0]

    def __getstate__(self) -> dict[str, object]:
        return {"index": self.index, "_open": OrderedDict()}  # descriptors do not cross to another process

    def __del__(self) -> None:
        for descriptor, _ in self._open.values():
            os.close(descriptor)


class StreamDataset(Dataset[LoadedBatch]):
    """The stream as a map from a list of positions to a batch."""

    def __init__(self, index: Index, plan: Plan, decoder: Decoder) -> None:
        self.plan, self.decoder = plan, decoder
        self.reader = ShardReader(index)

    def __getitem__(self, positions: np.ndarray) -> LoadedBatch:
        bad: list[BadSample] = []
        result: Batch | DataError
        try:
            result = self._batch(positions, bad)
        except DataError as error:
            result = error
        return LoadedBatch(result, bad, len(positions))

    def _batch(self, positions: np.ndarray, bad: list[BadSample]) -> Batch:
        _, shards, rows = self.plan.locate(positions)
        samples = [
            self._sample(int(position), int(shard), int(row), bad)
            for position, shard, row in zip(positions, shards, rows, strict=True)
        ]
        decoded, captions, keys = zip(*samples, strict=True)
        return Batch(
            pixels=torch.stack([d.pixels for d in decoded]),
            image_prompts=torch.stack([d.image_prompt for d in decoded]),
            captions=list(captions),
            positions=torch.from_numpy(np.asarray(positions, np.int64)),
            original_sizes=torch.tensor([d.original_size for d in decoded]),
            crop_top_lefts=torch.tensor([d.crop_top_left for d in decoded]),
            keys=list(keys),
        )

    def _sample(self, position: int, shard: int, row: int, bad: list[BadSample]) -> tuple[Decoded, str, str]:
        """Read and decode the sample of a position, or a substitute for it."""
        for attempt in range(MAX_ATTEMPTS):
            if attempt:
                shard, row = self.plan.locate_again(position, attempt)
            source = self.reader.index.shards[shard]
            try:
                image, caption, key = self.reader.read(shard, row)
                return self.decoder(image, position), caption, f"{source.name}/{key}"
            except DataError as error:
                key = self.reader.key(shard, row)
                bad.append(BadSample(position, str(source.path), source.entry.num_samples, row, key, str(error)))
        worst = "; ".join(f"{b.shard}/{b.key}: {b.error}" for b in bad[-MAX_ATTEMPTS:])
        raise DataError(f"{MAX_ATTEMPTS} samples in a row are bad, the shards are damaged: {worst}")


class StreamSampler(Sampler[np.ndarray]):
    """Positions of one rank's micro-batches from ``start`` on, for ever."""

    def __init__(
        self, plan: Plan, *, start: int, global_batch_size: int, batch_size: int, rank: int, world_size: int
    ) -> None:
        self.plan, self.start = plan, start
        self.global_batch_size, self.batch_size = global_batch_size, batch_size
        self.rank, self.world_size = rank, world_size

    def __iter__(self) -> Iterator[np.ndarray]:
        start = self.start
        while True:
            positions = self.plan.rank_positions(start, self.global_batch_size, self.rank, self.world_size)
            yield from positions.reshape(-1, self.batch_size)
            start += self.global_batch_size

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
