"""From an index to the endless stream: which buckets there are, the order within each, and what loads a sample."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64
from numpy import ndarray

from ipa_train.data.buckets import Bucket, count_buckets, make_buckets
from ipa_train.data.index import Index
from ipa_train.data.pipeline import BatchLoader
from ipa_train.data.plan import Mixture, Plan
from ipa_train.errors import ConfigError, DataError


@dataclass(frozen=True)
class Stream:
    """The order of all samples: a schedule over buckets, and a plan for each of them."""

    buckets: list[Bucket]
    plans: list[Plan | Mixture]
    shares: Float64[ndarray, "buckets"]
    """Of the samples of an epoch that fall into each bucket."""
    loader: BatchLoader
    sources: dict[str, int]
    """Samples in each source; without weights all are one."""

    def parts(self, positions: Int64[ndarray, "buckets"]) -> Iterator[tuple[int, Plan, int, float, int]]:
        """Of each part of the stream: bucket, plan, where it is, share of the samples, first lane in the bucket."""
        for bucket, (plan, position, share) in enumerate(zip(self.plans, positions.tolist(), self.shares, strict=True)):
            if share > 0:
                own = plan.parts(position) if isinstance(plan, Mixture) else [(plan, position, 1.0, 0)]
                yield from ((bucket, part, inner, share * of_bucket, lane) for part, inner, of_bucket, lane in own)

    def consumed(self, positions: Int64[ndarray, "buckets"]) -> dict[str, int]:
        """Samples of each source among the first ``positions`` of each bucket."""
        totals = dict.fromkeys(self.sources, 0)
        for plan, position in zip(self.plans, positions.tolist(), strict=True):
            counts = plan.consumed(position) if isinstance(plan, Mixture) else [position]
            for name, count in zip(self.sources, counts, strict=True):
                totals[name] += int(count)
        return totals


def choose_buckets(
    index: Index, *, resolution: int, step: int | None, max_aspect_ratio: float, min_rate: float
) -> tuple[list[Bucket], Int64[ndarray, "buckets shards"], bool]:
    """The buckets of a set of pictures, their samples per shard, and whether all pictures are stored at their size.

    Buckets with less than ``min_rate`` of the samples are left out, and their pictures go to the nearest of the others:
    a batch of them would show the same few pictures again and again.

    Raises:
        ConfigError: see :func:`make_buckets`; or a rate that leaves no bucket.
    """
    if not 0.0 <= min_rate <= 0.1:
        raise ConfigError(f"data.min_bucket_rate must be between 0 and 0.1, got {min_rate}.")
    buckets = make_buckets(resolution, step=step, max_aspect_ratio=max_aspect_ratio)
    counts, is_exact = count_buckets(index, buckets)
    while len(buckets) > 1:
        totals = counts.sum(axis=1)
        kept = [bucket for bucket, total in zip(buckets, totals, strict=True) if total > min_rate * totals.sum()]
        if kept == buckets or not kept:
            break
        buckets = kept
        counts, is_exact = count_buckets(index, buckets)
    return buckets, counts, is_exact


def make_stream(
    loader: BatchLoader,
    buckets: Sequence[Bucket],
    counts: Int64[ndarray, "buckets groups"],
    sources: Mapping[str, ndarray],
    *,
    weights: Mapping[str, float] | None,
    seed: int,
    num_lanes: int,
    window_size: int,
) -> Stream:
    """Order the samples counted in ``counts``.

    ``sources`` names the groups (shards, as a rule) of each source. With ``weights`` each source is seen as often as
    its weight says; without, all samples are seen equally often.

    Raises:
        ConfigError: weights that do not fit the sources.
        DataError: a source without a single sample.
    """
    if weights is None:
        sources = {"": np.arange(counts.shape[1])}
    totals = {name: int(counts[:, groups].sum()) for name, groups in sources.items()}
    for name, total in totals.items():
        if not total:
            raise DataError(f"data.shards{f' ({name})' if name else ''}: there is no complete sample.")
    parts = {"": 1.0} if weights is None else check_weights(weights, totals)
    plans: list[Plan | Mixture] = []
    shares = []
    for of_bucket in counts:
        own = []
        for name, groups in sources.items():
            of_source = np.zeros_like(of_bucket)
            of_source[groups] = of_bucket[groups]
            # A window spans as many shards in a rare bucket as in a common one: all read the same ones at a time.
            window = max(1, -(-window_size * int(of_source.sum()) // totals[name]))
            own.append(Plan(of_source, seed=seed, num_lanes=num_lanes, window_size=window))
        rates = [parts[name] * plan.num_samples / totals[name] for name, plan in zip(sources, own, strict=True)]
        shares.append(sum(rates))
        plans.append(own[0] if weights is None else Mixture(own, rates if any(rates) else [1.0] * len(rates)))
    return Stream(list(buckets), plans, np.array(shares), loader, totals)


def check_weights(weights: Mapping[str, float], sources: Mapping[str, int]) -> dict[str, float]:
    """Weights in the order of the sources, adding up to 1.

    Raises:
        ConfigError: a name that is missing or unknown, or a weight that is too small to be kept to.
    """
    if set(weights) != set(sources):
        raise ConfigError(
            f"data.weights names {', '.join(sorted(weights))}, data.shards {', '.join(sorted(sources))}: "
            "give every source its weight."
        )
    total = sum(weights.values())
    smallest = 1 / Mixture.CYCLE
    for name, weight in weights.items():
        if not weight > 0 or weight / total < smallest:
            raise ConfigError(f"data.weights.{name}={weight}: give at least {smallest} of the sum, or leave it out.")
    return {name: weights[name] / total for name in sources}
