"""Every sample once per epoch, whoever loads it."""

import itertools
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ipa_train.data.plan import Mixture, Plan, rank_share
from ipa_train.errors import ConfigError

plans = st.builds(
    lambda counts, seed, lanes, window: Plan(np.array(counts), seed=seed, num_lanes=lanes, window_size=window),
    st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any),
    st.integers(0, 2**40),
    st.integers(1, 20),
    st.integers(1, 60),
)


def sample_ids(plan, positions):
    _, shards, rows = plan.locate(np.asarray(positions))
    return (np.cumsum(plan.counts) - plan.counts)[shards] + rows


@settings(max_examples=150, deadline=None)
@given(plan=plans)
def test_each_epoch_holds_every_sample_once(plan):
    n = plan.num_samples
    ids = sample_ids(plan, np.arange(3 * n)).reshape(3, n)
    assert (np.sort(ids, axis=1) == np.arange(n)).all()
    if n > 20 and plan.window_size > 5:
        assert not (ids[0] == ids[1]).all()


@settings(max_examples=100, deadline=None)
@given(plan=plans, layout=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 5), st.integers(1, 4)), max_size=6))
def test_no_sample_is_lost_when_ranks_and_batch_size_change(plan, layout):
    """A chain of runs, each resumed at the position where the last stopped, on other ranks with another batch size."""
    position, seen = 0, []
    for world_size, per_rank, steps in layout:
        for _ in range(steps):
            size = world_size * per_rank
            batch = [position + rank_share(plan, position, size, r, world_size) for r in range(world_size)]
            position += size
            seen += np.concatenate(batch).tolist()
    assert sorted(seen) == list(range(position))


def test_order_depends_on_the_seed():
    orders = [sample_ids(Plan(np.array([50, 50]), seed=seed), np.arange(100)) for seed in (0, 0, 1)]
    assert (orders[0] == orders[1]).all()
    assert not (orders[0] == orders[2]).all()


def test_batches_mix_shards():
    plan = Plan(np.full(64, 1000), seed=0, num_lanes=8, window_size=8000)
    distinct = [len(set(plan.locate(np.arange(s, s + 256))[1])) for s in range(0, 64_000, 2560)]
    assert np.mean(distinct) > 55, "of 64; an ideal shuffle has 62.9"


def test_sizes_that_do_not_divide_are_refused():
    with pytest.raises(ConfigError, match="global_batch_size=10 cannot be shared equally by 4 processes"):
        rank_share(Plan(np.array([100])), 0, 10, 0, 4)


def test_a_plan_survives_the_way_to_a_spawned_worker():
    plan = Plan(np.array([30, 40]), seed=5, num_lanes=3, window_size=7)
    before = sample_ids(plan, np.arange(140))
    assert (sample_ids(pickle.loads(pickle.dumps(plan)), np.arange(140)) == before).all()


def test_a_negative_seed_is_refused():
    with pytest.raises(ConfigError, match=r"data\.seed must be at least 0, got -1"):
        Plan(np.array([3]), seed=-1)


@settings(max_examples=100, deadline=None)
@given(
    sources=st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=5), min_size=1, max_size=4),
    weights=st.lists(st.floats(0.01, 1.0), min_size=4, max_size=4),
    start=st.integers(0, 10**9),
)
def test_a_mixture_goes_through_each_source_in_its_own_order(sources, weights, start):
    """Over any range each source gives the next samples of its own plan, and as many as its weight says."""
    plans = []
    for number, counts in enumerate(sources):
        padded = [counts if k == number else [0] * len(other) for k, other in enumerate(sources)]
        plans.append(Plan(np.concatenate(padded), seed=3, num_lanes=2, window_size=7))
    weights = weights[: len(plans)]
    mixture = Mixture(plans, weights)
    positions = np.arange(start, start + 500)
    number, inner = mixture.split(positions)
    before = mixture.consumed(start)
    for source, plan in enumerate(plans):
        mine = inner[number == source]
        assert mine.tolist() == list(range(before[source], before[source] + len(mine)))
        assert (np.stack(mixture.locate(positions))[:, number == source] == np.stack(plan.locate(mine))).all()
        assert abs(len(mine) / 500 - weights[source] / sum(weights)) < 0.01
    assert (mixture.consumed(start + 500) == before + np.bincount(number, minlength=len(plans))).all()
    assert mixture.counts.sum() == Mixture.CYCLE


def test_the_rarest_source_is_not_forgotten():
    plans = [Plan(np.array([9, 0])), Plan(np.array([0, 9]))]
    assert Mixture(plans, [1.0, 1e-9]).counts.tolist() == [Mixture.CYCLE - 1, 1]


@settings(max_examples=200, deadline=None)
@given(
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any),
    num_lanes=st.integers(1, 5),
    window_size=st.integers(1, 30),
    position=st.integers(0, 10**6),
)
def test_windows_foretell_every_shard(counts, num_lanes, window_size, position):
    """What comes within some number of samples lies in windows that are open by then; substitutes in those open now."""
    plan = Plan(np.array(counts), seed=7, num_lanes=num_lanes, window_size=window_size)
    ahead = 2 * plan.num_samples
    windows = list(itertools.takewhile(lambda window: window[0] <= ahead, plan.windows(position)))
    opens = [samples for samples, _, _ in windows]
    assert opens == sorted(opens)
    first = {}
    for samples, lane, shards in windows:
        assert plan.counts[shards].all()
        for shard in shards.tolist():
            first.setdefault((lane, shard), samples)
    positions = np.arange(position, position + ahead)
    _, shards, _ = plan.locate(positions)
    places = zip(plan.lanes(positions).tolist(), shards.tolist(), strict=True)
    assert all(first[place] <= distance for distance, place in enumerate(places))
    shard, row = plan.locate_again(position, 1)
    assert 0 <= row < counts[shard]
    if plan.num_samples % plan.round_size == 0:
        assert shard in {shard for samples, _, shards in windows if samples < plan.num_lanes for shard in shards}
