"""Which bucket a picture falls into, and which is next."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ipa_train.data.buckets import BucketSchedule, count_buckets, make_buckets, nearest_bucket
from ipa_train.data.index import build_index
from ipa_train.data.stream import choose_buckets
from tests.data.conftest import write_shards


@pytest.mark.parametrize(
    ("resolution", "step", "ratio"), [(512, 64, 2.0), (1024, 64, 4.0), (1024, 128, 2.0), (64, 8, 1)]
)
def test_buckets_are_of_one_area(resolution, step, ratio):
    buckets = make_buckets(resolution, step=step, max_aspect_ratio=ratio)
    assert (resolution, resolution) in buckets
    assert len(set(buckets)) == len(buckets)
    for height, width in buckets:
        assert height % step == width % step == 0
        assert height * width <= resolution**2
        assert min(height + step, width + step) * max(height, width) > resolution**2 * 0.8
        assert max(height, width) <= ratio * min(height, width)
        assert (width, height) in buckets
    assert make_buckets(resolution) == [(resolution, resolution)]


def test_a_picture_goes_to_the_nearest_shape():
    buckets = make_buckets(512, step=64, max_aspect_ratio=2.0)
    for number, (height, width) in enumerate(buckets):
        assert nearest_bucket(np.array([height * 3]), np.array([width * 3]), buckets).tolist() == [number]
    unknown, panorama, tower = nearest_bucket(np.array([0, 10, 9000]), np.array([0, 9000, 10]), buckets)
    assert buckets[unknown] == (512, 512)
    assert buckets[panorama] == max(buckets, key=lambda b: b[1] / b[0])
    assert buckets[tower] == max(buckets, key=lambda b: b[0] / b[1])


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(1, 5000), min_size=1, max_size=12),
    sizes=st.lists(st.sampled_from([8, 64, 96, 256]), min_size=1, max_size=4),
)
def test_buckets_come_in_their_proportion(counts, sizes):
    """Greedy like this, no share lags by more than the harmonic bound of cup games, and none is a batch ahead."""
    shares = np.array(counts) / sum(counts)
    schedule = BucketSchedule(shares, np.zeros(len(counts), np.int64))
    for step in range(200):
        size = sizes[step % len(sizes)]
        before = schedule.positions.copy()
        bucket, start, position = schedule.step(size)
        assert (start, position) == (before[bucket], before.sum())
        ahead = schedule.positions - shares * schedule.position
        assert ahead.max() < max(sizes)
        assert -ahead.min() <= max(sizes) * (1 + np.log(len(counts)))
    again = BucketSchedule(shares, before)
    assert again.step(size)[0] == bucket


def test_counts_are_kept_and_belong_to_their_index(tmp_path):
    sizes = [(64, 64), (64, 128), (128, 64), (60, 61)]
    shards = write_shards(tmp_path / "shards", (8, 3), sizes=sizes)
    index, buckets = build_index(str(shards)), make_buckets(64, step=8, max_aspect_ratio=4)
    counts, is_exact = count_buckets(index, buckets)
    assert counts.shape == (len(buckets), 2)
    assert counts.sum(axis=0).tolist() == [8, 3]
    assert counts[buckets.index((64, 64))].tolist() == [4, 1]
    assert not is_exact
    (kept,) = shards.glob("buckets-*.npy")
    changed = kept.stat().st_mtime_ns
    assert (count_buckets(index, buckets)[0] == counts).all()
    assert kept.stat().st_mtime_ns == changed
    kept.write_bytes(kept.read_bytes()[:60])
    assert (count_buckets(index, buckets)[0] == counts).all(), "a damaged file is counted again"
    count_buckets(index, buckets[1:])
    assert len(list(shards.glob("buckets-*.npy"))) == 2


def test_pictures_stored_at_the_size_of_their_bucket_are_noticed(tmp_path):
    buckets = make_buckets(64, step=16, max_aspect_ratio=4)
    shards = write_shards(tmp_path / "shards", (len(buckets),), sizes=buckets)
    assert count_buckets(build_index(str(shards)), buckets)[1]


def test_rare_buckets_are_joined_to_their_neighbours(tmp_path):
    sizes = [(64, 64)] * 40 + [(64, 80)] * 20 + [(32, 128)]
    index = build_index(str(write_shards(tmp_path / "shards", (61,), sizes=sizes)))
    options = {"resolution": 64, "step": 8, "max_aspect_ratio": 4.0}
    buckets, counts, _ = choose_buckets(index, min_rate=0.05, **options)
    assert buckets == [(56, 72), (64, 64)]
    assert counts.sum(axis=1).tolist() == [21, 40]
    assert len(choose_buckets(index, min_rate=0.0, **options)[0]) == 3
