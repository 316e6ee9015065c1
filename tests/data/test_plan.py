"""Every sample once per epoch, whoever loads it."""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ipa_train.data.plan import Plan
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
            batch = [plan.rank_positions(position, world_size * per_rank, r, world_size) for r in range(world_size)]
            position += world_size * per_rank
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
        Plan(np.array([100])).rank_positions(0, 10, 0, 4)


def test_a_plan_survives_the_way_to_a_spawned_worker():
    plan = Plan(np.array([30, 40]), seed=5, num_lanes=3, window_size=7)
    before = sample_ids(plan, np.arange(140))
    assert (sample_ids(pickle.loads(pickle.dumps(plan)), np.arange(140)) == before).all()


def test_a_negative_seed_is_refused():
    with pytest.raises(ConfigError, match=r"data\.seed must be at least 0, got -1"):
        Plan(np.array([3]), seed=-1)
