"""Samples to validate on: always the same, of one size, and not met by training before it is said."""

import pytest

from ipa_train.data.datamodule import StreamingDataModule
from ipa_train.data.fixed_samples import FixedSamples
from tests.data.conftest import encode, picture, write_shard, write_shards

SIZES = [(64, 64), (64, 64), (64, 128)]


def module(shards, **options):
    return StreamingDataModule(shards=shards, global_batch_size=4, resolution=64, num_workers=0, **options)


def samples_of(data, num_samples, **options):
    return FixedSamples(data, num_samples=num_samples, option="shards", **options)


@pytest.mark.parametrize("mixed", [False, True])
def test_training_does_not_meet_them_before_the_end_of_the_first_epoch(tmp_path, mixed):
    counts = {"a": (30, 24), "b": (12,)}
    sources = {name: str(write_shards(tmp_path / name, n, sizes=SIZES)) for name, n in counts.items()}
    for file in (tmp_path / "b").iterdir():  # so that keys tell the sources apart
        file.rename(file.with_name(f"9{file.name[1:]}"))
    options = {"bucket_step": 64, "min_bucket_rate": 0.0, "num_lanes": 3, "window_size": 5}
    data = module(sources, **options, weights={"a": 2.0, "b": 1.0} if mixed else None)
    fixed = samples_of(data, 6)
    batch = fixed.batch(0, 6)
    assert len(set(batch.keys)) == len(fixed) == 6
    assert batch.target_sizes.unique(dim=0).tolist() == [[64, 64]]
    assert batch.keys == samples_of(data, 6).batch(0, 6).keys
    assert batch.keys[4:] == fixed.batch(4, 6).keys
    batches = iter(data.loader())
    seen = [key for _ in range(fixed.held_out_steps - 1) for key in next(batches).batch.keys]
    assert len(seen) > 16
    assert not set(batch.keys) & set(seen)


def test_shards_of_their_own_leave_those_of_training_as_they_were(tmp_path):
    data = module(str(write_shards(tmp_path / "train", (9,))))
    before = data.first_batch(4).keys
    held_out = write_shards(tmp_path / "held_out", (5,))
    fixed = samples_of(data, 8, shards=str(held_out))
    assert len(fixed) == 5
    assert fixed.held_out_steps is None
    assert data.first_batch(4).keys == before


def test_a_bad_one_is_replaced_alike_and_named(tmp_path, caplog):
    good = {"jpg": encode(picture(0)), "txt": "picture"}
    write_shard(tmp_path / "held_out", 0, {"0": good, "1": {**good, "jpg": b"no picture"}, "2": good})
    data = module(str(write_shards(tmp_path / "train", (4,))))
    keys = [samples_of(data, 3, shards=str(tmp_path / "held_out")).batch(0, 3).keys for _ in range(2)]
    assert keys[0] == keys[1]
    assert "validation sample 1 of" in caplog.text
