"""The order of samples: a pure function of (seed, position), so its whole state is one integer.

The stream of positions is infinite and epochs join without a seam. A global batch is a range of positions; ranks and
workers only decide who loads a position, never which one comes next:

    position = offset * num_lanes + lane          a lane is a fixed section of the epoch's shuffled list of shards
    offset in lane -> window of window_size samples -> permutation of that window -> sample

Every epoch shuffles the shards, and every window within it, by Philox counters keyed with (seed, epoch, lane, window).
"""

from collections.abc import Callable
from functools import lru_cache, partial

import numpy as np
from jaxtyping import Int64
from numpy import ndarray

from ipa_train.errors import ConfigError, DataError


def keyed_generator(*key: int) -> np.random.Generator:
    """A generator that depends on ``key`` alone."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


class Plan:
    """Where each position of the stream lies. Memory O(shards + num_lanes * window_size), whatever the data set's size.

    ``num_lanes`` and ``window_size`` set how far apart the samples of a batch come from: a batch reads from that many
    places at once, each mixing a window as long as a few shards.
    """

    def __init__(
        self, counts: Int64[ndarray, "shards"], *, seed: int = 0, num_lanes: int = 8, window_size: int = 20_000
    ) -> None:
        for name, value in (("num_lanes", num_lanes), ("window_size", window_size)):
            if value < 1:
                raise ConfigError(f"data.{name} must be at least 1, got {value}.")
        if seed < 0:
            raise ConfigError(f"data.seed must be at least 0, got {seed}.")
        self.counts = np.asarray(counts, np.int64)
        self.num_samples = int(self.counts.sum())
        if self.num_samples == 0:
            raise DataError("The shards hold no complete sample.")
        self.seed, self.num_lanes, self.window_size = seed, num_lanes, window_size
        longest, extra = divmod(self.num_samples, num_lanes)
        lengths = longest + (np.arange(num_lanes) < extra)
        self._lane_starts = np.concatenate([[0], np.cumsum(lengths)])
        self._shard_order = lru_cache(2)(self._draw_shard_order)
        self._window = lru_cache(4 * num_lanes)(self._draw_window)

    def __reduce__(self) -> tuple[Callable[..., "Plan"], tuple[ndarray]]:
        # The caches stay here: workers that are spawned rather than forked get the plan pickled.
        rebuild = partial(Plan, seed=self.seed, num_lanes=self.num_lanes, window_size=self.window_size)
        return rebuild, (self.counts,)

    def locate(self, positions: Int64[ndarray, "b"]) -> tuple[ndarray, ndarray, ndarray]:
        """Return (epoch, shard, row in the shard's index) of each position."""
        epochs, in_epoch = np.divmod(np.asarray(positions, np.int64), self.num_samples)
        offsets, lanes = np.divmod(in_epoch, self.num_lanes)
        windows = offsets // self.window_size
        shards, rows = np.empty_like(epochs), np.empty_like(epochs)
        for key in np.unique(np.stack([epochs, lanes, windows], axis=1), axis=0):
            epoch, lane, window = (int(k) for k in key)
            here = (epochs == epoch) & (lanes == lane) & (windows == window)
            start = int(self._lane_starts[lane]) + window * self.window_size
            sample = start + self._window(epoch, lane, window)[offsets[here] - window * self.window_size]
            order, ends = self._shard_order(epoch)
            place = np.searchsorted(ends, sample, side="right")
            shards[here], rows[here] = order[place], sample - (ends[place] - self.counts[order[place]])
        return epochs, shards, rows

    def locate_again(self, position: int, attempt: int) -> tuple[int, int]:
        """Return (shard, row) of the substitute for a bad sample: any sample, the same one on every replay."""
        sample = int(keyed_generator(self.seed, 1, position, attempt).integers(self.num_samples))
        ends = np.cumsum(self.counts)
        shard = int(np.searchsorted(ends, sample, side="right"))
        return shard, sample - int(ends[shard] - self.counts[shard])

    def rank_positions(self, start: int, global_batch_size: int, rank: int, world_size: int) -> Int64[ndarray, "b"]:
        """This rank's share of the global batch that begins at ``start``; lane by lane, so a rank reads few shards."""
        if global_batch_size % world_size:
            raise ConfigError(
                f"data.global_batch_size={global_batch_size} cannot be shared equally by {world_size} processes "
                f"(trainer.devices x trainer.num_nodes): choose a multiple of {world_size}."
            )
        positions = np.arange(start, start + global_batch_size, dtype=np.int64)
        positions = positions[np.lexsort((positions // self.num_lanes, positions % self.num_lanes))]
        share = global_batch_size // world_size
        return positions[rank * share : (rank + 1) * share]

    def _draw_shard_order(self, epoch: int) -> tuple[ndarray, ndarray]:
        order = keyed_generator(self.seed, 2, epoch).permutation(len(self.counts))
        return order, np.cumsum(self.counts[order])

    def _draw_window(self, epoch: int, lane: int, window: int) -> ndarray:
        length = int(self._lane_starts[lane + 1] - self._lane_starts[lane]) - window * self.window_size
        return keyed_generator(self.seed, 3, epoch, lane, window).permutation(min(self.window_size, length))
