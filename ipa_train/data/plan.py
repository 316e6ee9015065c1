"""The order of samples: a pure function of (seed, position), so its whole state is one integer.

The stream of positions is infinite and epochs join without a seam. A global batch is a range of positions; ranks and
workers only decide who loads a position, never which one comes next:

    position = offset * num_lanes + lane          a lane is a fixed section of the epoch's shuffled list of shards
    offset in lane -> window of window_size samples -> permutation of that window -> sample

Every epoch shuffles the shards, and every window within it, by Philox counters keyed with (seed, epoch, lane, window).
"""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial

import numpy as np
from jaxtyping import Int64
from numpy import ndarray

from ipa_train.errors import ConfigError


def keyed_generator(*key: int) -> np.random.Generator:
    """A generator that depends on ``key`` alone."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


class Plan:
    """Where each position of the stream lies. Memory O(shards + num_lanes * window_size), whatever the data set's size.

    ``num_lanes`` and ``window_size`` set how far apart the samples of a batch come from: a batch reads from that many
    places at once, each mixing a window as long as a few shards. There are no more lanes than windows: a small data set
    is shuffled as a whole.
    """

    def __init__(
        self, counts: Int64[ndarray, "shards"], *, seed: int = 0, num_lanes: int = 64, window_size: int = 20_000
    ) -> None:
        for name, value in (("num_lanes", num_lanes), ("window_size", window_size)):
            if value < 1:
                raise ConfigError(f"data.{name} must be at least 1, got {value}.")
        if seed < 0:
            raise ConfigError(f"data.seed must be at least 0, got {seed}.")
        self.counts = np.asarray(counts, np.int64)
        self.num_samples = int(self.counts.sum())
        num_lanes = max(1, min(num_lanes, -(-self.num_samples // window_size)))
        self.seed, self.num_lanes, self.window_size = seed, num_lanes, window_size
        longest, extra = divmod(self.num_samples, num_lanes)
        lengths = longest + (np.arange(num_lanes) < extra)
        self._lane_starts = np.concatenate([[0], np.cumsum(lengths)])
        self._shard_order = lru_cache(2)(self._draw_shard_order)
        self._window = lru_cache(2 * num_lanes)(self._draw_window)

    def __reduce__(self) -> tuple[Callable[..., "Plan"], tuple[ndarray]]:
        # The caches stay here: workers that are spawned rather than forked get the plan pickled.
        rebuild = partial(Plan, seed=self.seed, num_lanes=self.num_lanes, window_size=self.window_size)
        return rebuild, (self.counts,)

    def locate(self, positions: Int64[ndarray, "b"]) -> tuple[ndarray, ndarray, ndarray]:
        """Return (epoch, shard, row in the shard's index) of each position."""
        epochs, in_epoch = np.divmod(np.asarray(positions, np.int64), self.num_samples)
        offsets, lanes = np.divmod(in_epoch, self.num_lanes)
        windows, places = np.divmod(offsets, self.window_size)
        samples = self._lane_starts[lanes] + windows * self.window_size
        keys = (epochs * (self.num_samples // self.window_size + 1) + windows) * self.num_lanes + lanes
        for one in _examples(keys):
            here = keys == keys[one]
            window = self._window(int(epochs[one]), int(lanes[one]), int(windows[one]))
            samples[here] += window[places[here]]
        shards, rows = np.empty_like(samples), np.empty_like(samples)
        for one in _examples(epochs):
            here = epochs == epochs[one]
            order, ends = self._shard_order(int(epochs[one]))
            place = np.searchsorted(ends, samples[here], side="right")
            shards[here] = order[place]
            rows[here] = samples[here] - ends[place] + self.counts[shards[here]]
        return epochs, shards, rows

    def locate_again(self, position: int, attempt: int) -> tuple[int, int]:
        """Return (shard, row) of the substitute for a bad sample, the same one on every replay.

        It comes from the windows that are open just then: their shards are at hand, and need not be downloaded for it.
        """
        epoch, in_epoch = divmod(position, self.num_samples)
        start = min(in_epoch - in_epoch % self.round_size, self.num_samples - self.round_size)
        drawn = int(keyed_generator(self.seed, 1, position, attempt).integers(self.round_size))
        _, shards, rows = self.locate(np.array([epoch * self.num_samples + start + drawn]))
        return int(shards[0]), int(rows[0])

    @property
    def round_size(self) -> int:
        """Samples from the opening of one window of each lane to that of the next ones; an epoch, if it is shorter."""
        return min(self.num_lanes * self.window_size, self.num_samples)

    def windows(self, position: int) -> Iterator[tuple[int, int, Int64[ndarray, "shards"]]]:
        """Yield (samples until it opens, lane, shards) of the windows that are open at ``position`` and all later ones.

        For ever, and in the order in which they open.
        """
        epoch, in_epoch = divmod(position, self.num_samples)
        first = in_epoch // (self.num_lanes * self.window_size)
        while True:
            order, ends = self._shard_order(epoch)
            for window in range(first, -(-self.num_samples // (self.num_lanes * self.window_size))):
                opens = epoch * self.num_samples + window * self.num_lanes * self.window_size
                starts = self._lane_starts[:-1] + window * self.window_size
                stops = np.minimum(starts + self.window_size, self._lane_starts[1:])
                for lane in np.flatnonzero(starts < stops).tolist():
                    i, j = np.searchsorted(ends, [starts[lane], stops[lane] - 1], side="right")
                    shards = order[i : j + 1]
                    yield max(0, opens + lane - position), lane, shards[self.counts[shards] > 0]
            epoch, first = epoch + 1, 0

    def lanes(self, positions: Int64[ndarray, "b"]) -> Int64[ndarray, "b"]:
        """The lane of each position: samples of one lane come from the same few shards."""
        return np.asarray(positions, np.int64) % self.num_samples % self.num_lanes

    def _draw_shard_order(self, epoch: int) -> tuple[ndarray, ndarray]:
        order = keyed_generator(self.seed, 2, epoch).permutation(len(self.counts))
        return order, np.cumsum(self.counts[order])

    def _draw_window(self, epoch: int, lane: int, window: int) -> ndarray:
        length = int(self._lane_starts[lane + 1] - self._lane_starts[lane]) - window * self.window_size
        order = keyed_generator(self.seed, 3, epoch, lane, window).permutation(min(self.window_size, length))
        return order.astype(np.int32)  # one is kept for each lane


class Mixture:
    """Several plans in fixed proportions, each going through its own samples in its own epochs.

    A cycle of ``CYCLE`` positions holds each source as often as its weight says, spread evenly, so where a position of
    the mixture lies in its source is a pure function too, and needs no state of its own.
    """

    CYCLE = 10_000

    def __init__(self, plans: Sequence[Plan], weights: Sequence[float]) -> None:
        if len(plans) != len(weights):
            raise ValueError(f"{len(plans)} plans, but {len(weights)} weights")
        self.plans = list(plans)
        self._num_lanes = np.array([plan.num_lanes for plan in self.plans])
        self._num_samples = np.array([plan.num_samples for plan in self.plans])
        self._first_lanes = np.cumsum(self._num_lanes) - self._num_lanes
        shares = np.asarray(weights, np.float64) / np.sum(weights)
        self._counts = _round_to_sum(shares * self.CYCLE, self.CYCLE)
        # Sources take their turns as evenly as points on a line: the k-th of n at (k + 1/2) / n of the cycle.
        turns = np.concatenate([(np.arange(count) + 0.5) / count for count in self._counts if count])
        sources = np.repeat(np.arange(len(plans)), self._counts)
        self._source = sources[np.argsort(turns, kind="stable")]
        self._rank = np.empty(self.CYCLE, np.int64)
        for number, count in enumerate(self._counts):
            self._rank[self._source == number] = np.arange(count)

    @property
    def counts(self) -> Int64[ndarray, "sources"]:
        """How often each source comes in a cycle."""
        return self._counts

    def split(self, positions: Int64[ndarray, "b"]) -> tuple[Int64[ndarray, "b"], Int64[ndarray, "b"]]:
        """Return (source, position in that source) of each position."""
        cycles, places = np.divmod(np.asarray(positions, np.int64), self.CYCLE)
        sources = self._source[places]
        return sources, cycles * self._counts[sources] + self._rank[places]

    def consumed(self, position: int) -> Int64[ndarray, "sources"]:
        """How many of the first ``position`` samples come from each source."""
        cycles, rest = divmod(position, self.CYCLE)
        return cycles * self._counts + np.bincount(self._source[:rest], minlength=len(self._counts))

    def parts(self, position: int) -> list[tuple[Plan, int, float, int]]:
        """Of each source that comes at all: plan, where it is at ``position``, share of the samples, first lane."""
        shares = self._counts / self.CYCLE
        places = zip(self.plans, self.consumed(position).tolist(), shares, self._first_lanes.tolist(), strict=True)
        return [part for part in places if part[2] > 0]

    def locate(self, positions: Int64[ndarray, "b"]) -> tuple[ndarray, ndarray, ndarray]:
        """Return (epoch of its source, shard, row in the shard's index) of each position."""
        sources, inner = self.split(positions)
        located = np.empty((3, len(sources)), np.int64)
        for number in np.unique(sources):
            here = sources == number
            located[:, here] = self.plans[number].locate(inner[here])
        epochs, shards, rows = located
        return epochs, shards, rows

    def locate_again(self, position: int, attempt: int) -> tuple[int, int]:
        """Return (shard, row) of the substitute for a bad sample, from the same source."""
        sources, inner = self.split(np.array([position]))
        return self.plans[sources[0]].locate_again(int(inner[0]), attempt)

    def lanes(self, positions: Int64[ndarray, "b"]) -> Int64[ndarray, "b"]:
        """The lane of each position, of its source."""
        sources, inner = self.split(positions)
        return self._first_lanes[sources] + inner % self._num_samples[sources] % self._num_lanes[sources]


def _examples(values: Int64[ndarray, "n"]) -> list[int]:
    """One place for each different value; of a batch's few hundred faster than ``np.unique``."""
    return list({value: place for place, value in enumerate(values.tolist())}.values())


def _round_to_sum(values: ndarray, total: int) -> Int64[ndarray, "n"]:
    """Round to integers that add up to ``total``; the largest fractions are rounded up, and nothing to nothing."""
    rounded = np.maximum(np.floor(values).astype(np.int64), values > 0)
    lacking = total - int(rounded.sum())
    rounded[np.argsort(rounded - values, kind="stable")[: max(0, lacking)]] += 1
    rounded[np.argmax(rounded)] += min(0, lacking)
    return rounded


def rank_share(plan: Plan | Mixture, start: int, global_batch_size: int, rank: int, world_size: int) -> ndarray:
    """Offsets from ``start`` of a rank's share of a global batch; lane by lane, so that a rank reads few shards.

    Raises:
        ConfigError: the ranks cannot share equally.
    """
    if global_batch_size % world_size:
        raise ConfigError(
            f"data.global_batch_size={global_batch_size} cannot be shared equally by {world_size} processes "
            f"(trainer.devices x trainer.num_nodes): choose a multiple of {world_size}."
        )
    order = np.argsort(plan.lanes(np.arange(start, start + global_batch_size)), kind="stable")
    share = global_batch_size // world_size
    return order[rank * share : (rank + 1) * share]
