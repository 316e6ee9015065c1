"""A few samples that are always the same, to validate on."""

import copy
import logging
from collections.abc import Sequence

import numpy as np

from ipa_train.data.batch import Batch
from ipa_train.data.datamodule import StreamingDataModule
from ipa_train.data.pipeline import Places, StreamDataset
from ipa_train.data.plan import Mixture
from ipa_train.errors import ConfigError

_log = logging.getLogger(__name__)


class FixedSamples:
    """Up to ``num_samples`` samples of one size, read as a data module reads its own.

    They come from ``shards`` of their own, which training must not have (``option`` is where the user gave them).
    Without such they are samples of the training shards that the first epoch comes to last: it ends with the lanes of
    the plan, and these are at the end of the first lane, so that they lie in a few shards. Until then,
    :attr:`held_out_steps`, they are as good as held out.

    All are of the commonest bucket and, in a mixture, of the source that is seen most.

    Raises:
        ConfigError: training has these shards too.
        DataError: shards that cannot be used.
    """

    def __init__(
        self,
        data: StreamingDataModule,
        *,
        num_samples: int,
        shards: str | Sequence[str] | None = None,
        option: str,
    ) -> None:
        source = data if shards is None else _of_other_shards(data, shards, option)
        stream = source.stream
        self._bucket = int(np.argmax(stream.shares))
        plan, share = stream.plans[self._bucket], float(stream.shares[self._bucket])
        if isinstance(plan, Mixture):
            number = int(np.argmax(plan.counts))
            plan, share = plan.plans[number], share * float(plan.counts[number] / plan.counts.sum())
        lane_length = -(-plan.num_samples // plan.num_lanes)
        offsets = np.arange(max(0, lane_length - num_samples), lane_length)
        self._positions = offsets * plan.num_lanes
        self._dataset = StreamDataset([plan] * len(stream.plans), stream.loader)
        self.held_out_steps: int | None = None
        """How many steps training does without them; None: it never sees them."""
        if shards is None:
            self.held_out_steps = int(self._positions[0] / share / data.global_batch_size)

    def __len__(self) -> int:
        return len(self._positions)

    def batch(self, start: int, stop: int) -> Batch:
        """Samples ``start`` to ``stop``; a bad one is replaced by another, always the same, and named in a warning."""
        positions = self._positions[start:stop]
        loaded = self._dataset[Places(self._bucket, positions, positions)]
        for bad in loaded.bad:
            _log.warning("validation sample %s of %s is replaced: %s", bad.key, bad.shard, bad.error)
        return loaded.batch


def _of_other_shards(data: StreamingDataModule, shards: str | Sequence[str], option: str) -> StreamingDataModule:
    other = copy.copy(data)
    for name in ("_indices", "index", "stream"):  # what was made of its own shards
        other.__dict__.pop(name, None)
    other.sources, other.weights = {"": shards}, None
    trained_on = {shard.tar.location for shard in data.index.shards}
    for shard in other.index.shards:
        if shard.tar.location in trained_on:
            raise ConfigError(
                f"{option}: {shard.tar.location} is one of data.shards too: give others, which are "
                "not trained on, or null."
            )
    return other
