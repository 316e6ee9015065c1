"""The same pixels for the same positions, whoever loads them; bad samples replaced, counted, limited."""

import hashlib
import json
import re

import numpy as np
import pytest
import torch

from ipa_train.data import tar
from ipa_train.data.buckets import BucketSchedule
from ipa_train.data.datamodule import StreamingDataModule
from ipa_train.data.index import build_index
from ipa_train.data.tolerance import BadSample, ErrorBudget
from ipa_train.errors import ConfigError, DataError
from ipa_train.runtime.distributed import gather_objects
from tests.data.conftest import write_shards


def datamodule(shards, **options):
    defaults = {"global_batch_size": 8, "resolution": 32, "image_prompt_size": 32, "num_lanes": 3, "window_size": 5}
    shards = shards if isinstance(shards, dict) else str(shards)
    return StreamingDataModule(shards=shards, **defaults | options)


def stream(data, start, steps, *, world_size=1, workers=0):
    """{position: hash of everything} over all ranks."""
    seen = {}
    start = np.atleast_1d(start) if np.any(start) else None
    micro_batches = data.accumulate_grad_batches(world_size) * steps
    for rank in range(world_size):
        loader = iter(data.loader(start, rank=rank, world_size=world_size, workers=workers))
        for _ in range(micro_batches):
            batch = next(loader).batch
            for i, position in enumerate(batch.positions.tolist()):
                tensors = (batch.content.pixels[i], batch.content.image_prompts[i], batch.target_sizes[i])
                digest = hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors))
                assert position not in seen
                seen[position] = (digest.hexdigest(), batch.captions[i], batch.keys[i])
    return seen


def test_pixel_identical_for_any_ranks_workers_and_batch_sizes(shards):
    options = {"crop": "random", "flip_rate": 0.5}
    whole = stream(datamodule(shards, **options), 0, 6)
    assert sorted(whole) == list(range(48))
    assert stream(datamodule(shards, **options), 0, 6, world_size=2, workers=2) == whole
    assert stream(datamodule(shards, batch_size=1, **options), 0, 6, world_size=4) == whole
    first = stream(datamodule(shards, **options), 0, 3, world_size=4)
    rest = stream(datamodule(shards, global_batch_size=12, batch_size=3, **options), 24, 2, world_size=2, workers=1)
    assert first | rest == whole


SIZES = [(48, 40), (40, 64), (64, 40), (24, 72)]
BUCKETS = {"bucket_step": 8, "max_aspect_ratio": 4.0, "min_bucket_rate": 0.0}


def test_buckets_pixel_identical_for_any_ranks_workers_and_batch_sizes(tmp_path):
    shards = write_shards(tmp_path / "shards", (17, 11, 20), sizes=SIZES)
    options = BUCKETS | {"crop": "random", "flip_rate": 0.5}
    whole = stream(datamodule(shards, **options), 0, 18)
    assert sorted(whole) == list(range(18 * 8))
    assert stream(datamodule(shards, **options), 0, 18, world_size=2, workers=1) == whole
    assert stream(datamodule(shards, batch_size=1, **options), 0, 18, world_size=4) == whole


def test_every_sample_comes_once_per_epoch_of_its_bucket(tmp_path):
    shards = write_shards(tmp_path / "shards", (16, 16), sizes=SIZES)
    data = datamodule(shards, **BUCKETS)
    assert len(data.stream.buckets) == 4
    loader = iter(data.loader())
    batches = [next(loader).batch for _ in range(8)]
    shapes = [tuple(batch.content.pixels.shape) for batch in batches]
    assert sorted(shapes[:4]) == sorted(shapes[4:]) == sorted(set(shapes)), "equal shares take turns"
    for start in (0, 4):
        keys = [key for batch in batches[start : start + 4] for key in batch.keys]
        assert len(set(keys)) == len(keys) == 32
    for batch, shape in zip(batches, shapes, strict=True):
        assert batch.target_sizes.tolist() == [list(shape[2:])] * 8


def test_an_elastic_chain_over_buckets_and_sources_loses_nothing(tmp_path):
    """4 -> 8 -> 1 -> 3 -> 2 ranks in mid-epoch, other batch sizes: the positions of each bucket go on without a gap."""
    sources = {
        "a": str(write_shards(tmp_path / "a", (13, 9), sizes=SIZES)),
        "b": str(write_shards(tmp_path / "b", (10,), sizes=SIZES[:2])),
    }
    positions, seen = None, {}
    for world_size, size, steps in ((4, 8, 3), (8, 16, 2), (1, 8, 4), (3, 12, 2), (2, 8, 3)):
        data = datamodule(sources, weights={"a": 3, "b": 1}, global_batch_size=size, **BUCKETS)
        positions = np.zeros(len(data.stream.buckets), np.int64) if positions is None else positions
        schedule = BucketSchedule(data.stream.shares, positions)
        for rank in range(world_size):
            sampler = iter(data.loader(positions, rank=rank, world_size=world_size).sampler)
            for _ in range(steps):
                bucket, stream_positions, bucket_positions = next(sampler)
                for place in zip(stream_positions.tolist(), bucket_positions.tolist(), strict=True):
                    assert seen.setdefault((bucket, place[1]), place[0]) == place[0]
        for _ in range(steps):
            schedule.step(size)
        positions = schedule.positions
    total = int(positions.sum())
    assert sorted(seen.values()) == list(range(total))
    for bucket, count in enumerate(positions.tolist()):
        assert sorted(p for b, p in seen if b == bucket) == list(range(count))


def test_sources_are_mixed_by_weight_and_counted(tmp_path):
    sources = {"a": str(write_shards(tmp_path / "a", (30,))), "b": str(write_shards(tmp_path / "b", (3, 3)))}
    data = datamodule(sources, weights={"a": 0.25, "b": 0.75})
    loader = iter(data.loader())
    keys = [key for _ in range(10) for key in next(loader).batch.keys]
    folders = {"00000.tar/0000000" + f"{i:02d}" for i in range(30)}
    assert len([key for key in keys if key not in folders]) >= 20, "b's second shard alone gives a third of 60"
    assert data.stream.consumed(np.array([80])) == {"a": 20, "b": 60}
    assert data.stream.sources == {"a": 30, "b": 6}
    whole = stream(data, 0, 10)
    assert stream(datamodule(sources, weights={"a": 0.25, "b": 0.75}), 0, 10, world_size=2, workers=1) == whole


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": {"a": 1, "c": 1}}, "data.weights names a, c, data.shards a, b: give every source its weight"),
        ({"weights": {"a": 1, "b": 0}}, r"data\.weights\.b=0: give at least 0\.0001 of the sum"),
        ({"crop": "centre"}, "Did you mean 'center'"),
        ({"resolution": 500}, r"data\.resolution=500 must be a multiple of 8 .*try 496"),
        ({"image_prompt_size": 0}, r"data\.image_prompt_size must be at least 1, got 0"),
        ({"flip_rate": 1.5}, r"data\.flip_rate must be between 0 and 1, got 1\.5"),
        ({"bucket_step": 12}, r"data\.bucket_step=12 must be a multiple of 8 that divides data\.resolution=32"),
        ({"bucket_step": 8, "max_aspect_ratio": 0.5}, r"data\.max_aspect_ratio must be at least 1, got 0\.5"),
        ({"bucket_step": 8, "min_bucket_rate": 0.5}, r"data\.min_bucket_rate must be between 0 and 0\.1, got 0\.5"),
    ],
)
def test_options_that_cannot_be_are_one_line(shards, tmp_path, options, message):
    sources = {"a": str(shards), "b": str(write_shards(tmp_path / "b", (3,)))}
    with pytest.raises(ConfigError, match=message):
        _ = datamodule(sources, **options).stream


def test_weights_need_names(shards):
    with pytest.raises(ConfigError, match=r"data\.weights needs sources with names"):
        datamodule(shards, weights={"a": 1})


@pytest.mark.parametrize(("size", "options", "on_device"), [((32, 48), {}, True), ((40, 48), {}, False)])
def test_prompts_of_pictures_stored_at_their_size_are_left_to_the_device(tmp_path, size, options, on_device):
    shards = write_shards(tmp_path / "shards", (4,), sizes=[size])
    content = datamodule(shards, image_prompt_size=16, **options).first_batch(2).content
    assert (content.separate_prompts is None) == on_device
    assert datamodule(shards, crop="random").first_batch(2).content.separate_prompts is not None


def damage(shards, names):
    """Zero the start of these samples' pictures."""
    for shard in build_index(str(shards)).shards:
        rows = shard.rows()
        with shard.path.open("r+b") as file:
            for row, at in enumerate(rows):
                if f"{shard.name}/{row}" in names:
                    file.seek(int(at["offset"]) + int(at["content_start"]))
                    file.write(bytes(64))
        # a changed time would index the shard anew, as it should; here the same index must meet the damage
    return names


def test_bad_samples_are_replaced_alike_everywhere(shards):
    clean = stream(datamodule(shards), 0, 6)
    index = build_index(str(shards))
    bad = damage(shards, {"00000.tar/2", "00002.tar/0"})
    damaged = stream(datamodule(shards), 0, 6)
    assert stream(datamodule(shards), 0, 6, world_size=4, workers=1) == damaged
    changed = [p for p in clean if clean[p] != damaged[p]]
    assert len(changed) == sum(clean[p][2] in {"00000.tar/000000002", "00002.tar/000020000"} for p in clean)
    assert {damaged[p][2] for p in changed}.isdisjoint({"00000.tar/000000002", "00002.tar/000020000"})
    assert index.counts.sum() == 21
    assert len(bad) == 2


def test_bad_samples_are_reported_by_name(shards):
    damage(shards, {"00001.tar/3"})
    loader = iter(datamodule(shards).loader())
    bad = [b for _ in range(3) for b in next(loader).bad]
    assert {(b.shard, b.shard_size, b.row, b.key) for b in bad} == {(str(shards / "00001.tar"), 5, 3, "000010003")}
    assert all(b.error.startswith("cannot decode") for b in bad)


def test_every_sample_lost_to_a_cut_after_indexing_is_reported(shards):
    """Cut at every member boundary: what lies behind is reported, and nothing else."""
    data = datamodule(shards)
    shard = data.index.shards[1]
    rows, whole = shard.rows(), shard.path.read_bytes()
    boundaries = [member.start for member in tar.walk(shard.path, max_member_bytes=10**6)]
    assert len(boundaries) == 3 * len(rows)
    for cut in [*boundaries, boundaries[-1] + 512]:
        shard.path.write_bytes(whole[:cut])
        loader = iter(data.loader())
        bad = [sample for _ in range(3) for sample in next(loader).bad]
        ends = rows["offset"] + rows["length"]
        assert {sample.row for sample in bad} == set(np.flatnonzero(ends > cut))
        assert {sample.shard for sample in bad} == {str(shard.path)}
        assert all(sample.key and "truncated since it was indexed" in sample.error for sample in bad)


@pytest.mark.parametrize("workers", [0, 1])
def test_when_everything_is_bad_it_stops_with_one_line(shards, workers, tmp_path):
    damage(shards, {f"{s:05d}.tar/{i}" for s in range(3) for i in range(9)})
    data = datamodule(shards)
    data.budget = ErrorBudget(max_bad_rate=1.0, window=10, log_path=tmp_path / "bad.jsonl")
    loaded = next(iter(data.loader(workers=workers)))
    with pytest.raises(DataError, match=r"8 samples in a row are bad.*00000") as error:
        data.on_before_batch_transfer(loaded, 0)
    assert "\n" not in str(error.value)
    assert len((tmp_path / "bad.jsonl").read_text().splitlines()) == 8, "what stopped the run is in its log"


def test_a_shard_that_cannot_be_read_is_a_bad_sample(shards):
    data = datamodule(shards)
    _ = data.index
    (shards / "00001.tar").unlink()
    (shards / "00001.tar").mkdir()
    loader = iter(data.loader())
    bad = [b for _ in range(3) for b in next(loader).bad]
    assert {b.error for b in bad} == {"cannot read: Is a directory"}


def test_shards_of_one_name_in_two_folders_are_told_apart(shards, tmp_path):
    """Half of the small shard would not be half of the large one of the same name."""
    other = write_shards(tmp_path / "other", (2,))
    damage(other, {"00000.tar/0"})
    data = StreamingDataModule(
        shards=[str(other), str(shards)], global_batch_size=8, resolution=32, image_prompt_size=32, max_bad_rate=1.0
    )
    loader = iter(data.loader())
    for _ in range(3):
        data.on_before_batch_transfer(next(loader), 0)
    data.budget.settle(gather_objects)
    assert set(data.budget.by_shard) == {str(other / "00000.tar")}


def failure(i, shard="a.tar", shard_size=10_000):
    return BadSample(position=i, shard=shard, shard_size=shard_size, row=i, key=str(i), error="cannot decode: x")


def note(budgets, *batches):
    """Let each budget note its batch, and all of them exchange what they know; return what each says."""
    news = []
    for budget, (num_samples, bad) in zip(budgets, batches, strict=True):
        budget.record(num_samples, bad)
        news.append((num_samples, bad))
    verdicts = []
    for budget in budgets:
        try:
            verdicts.append(budget.settle(lambda _: news))
        except DataError as error:
            verdicts.append(str(error))
    return verdicts


def test_the_budget_stops_the_run_and_names_the_worst_shards(tmp_path):
    log = tmp_path / "bad.jsonl"
    budget = ErrorBudget(max_bad_rate=0.01, window=1000, log_path=log)
    assert note([budget], (500, [failure(i) for i in range(9)])) == [None]
    assert note([budget], (300, [failure(99, "b.tar")])) == [None]
    (verdict,) = note([budget], (200, [failure(100)]))
    assert re.search(r"11 of the last 1000 samples are bad.*a\.tar \(10\), b\.tar \(1\)", verdict)
    assert [json.loads(line)["position"] for line in log.read_text().splitlines()] == [*range(9), 99, 100]


def test_ranks_share_one_budget_and_one_verdict():
    ranks = [ErrorBudget(max_bad_rate=0.01, window=1000) for _ in range(4)]
    assert note(ranks, *[(100, [failure(i)]) for i in range(4)]) == [None] * 4
    assert {rank.num_seen for rank in ranks} == {400}
    first, *others = note(ranks, (100, []), (100, []), (100, [failure(i, "b.tar") for i in range(7)]), (100, []))
    assert "11 of the last 800 samples are bad" in first
    assert others == [first] * 3


def test_a_broken_shard_is_noticed_though_no_rank_meets_half_of_it():
    shard = [failure(i, "c.tar", 10) for i in range(6)]
    ranks = [ErrorBudget(max_bad_rate=1.0) for _ in range(2)]
    first, second = note(ranks, (100, shard[:3]), (100, shard[3:]))
    assert first == second
    assert "more than half of c.tar is bad" in first
    tolerant = ErrorBudget(max_bad_rate=1.0, on_missing_shard="redraw")
    assert note([tolerant], (100, shard)) == [None]
    with pytest.raises(ConfigError, match="Did you mean 'redraw'"):
        ErrorBudget(on_missing_shard="redrow")


def test_old_failures_leave_the_window_but_a_broken_shard_does_not_pass():
    budget = ErrorBudget(max_bad_rate=0.02, window=1000)
    for _ in range(30):
        assert note([budget], (1000, [failure(i) for i in range(9)])) == [None]
    assert budget.num_bad == 270
    assert "more than half of c.tar is bad" in note([budget], (1, [failure(i, "c.tar", 5) for i in range(3)]))[0]


def test_sizes_are_checked(shards):
    with pytest.raises(ConfigError, match="batch_size=3 does not divide the 4 samples"):
        datamodule(shards, batch_size=3).accumulate_grad_batches(2)
    with pytest.raises(ConfigError, match="global_batch_size=8 cannot be shared equally by 3 processes"):
        datamodule(shards).accumulate_grad_batches(3)
    assert datamodule(shards, batch_size=2).accumulate_grad_batches(2) == 2


def test_a_batch_is_what_it_says(shards):
    batch = datamodule(shards).first_batch(5)
    assert batch.content.pixels.shape == batch.content.image_prompts.shape == (5, 3, 32, 32)
    assert batch.content.pixels.dtype == torch.uint8
    assert batch.content.pixels.is_contiguous(memory_format=torch.channels_last)
    assert batch.positions.tolist() == np.lexsort((np.arange(5) // 3, np.arange(5) % 3)).tolist()
    assert batch.original_sizes.tolist() == [[40, 48]] * 5
    assert batch.target_sizes.tolist() == [[32, 32]] * 5


def test_other_shards_or_another_seed_are_refused_at_a_resume(shards, tmp_path):
    state = {
        "version": 3,
        "index_id": datamodule(shards).index.index_id,
        "seed": 0,
        "num_lanes": 3,
        "window_size": 5,
        "weights": None,
        "buckets": [[32, 32]],
        "positions": [16],
        "step": 2,
    }
    datamodule(shards).load_state_dict(state)
    with pytest.raises(DataError, match="this run has seed 5, its checkpoint 0"):
        datamodule(shards, seed=5).load_state_dict(state)
    with pytest.raises(DataError, match=r"data\.num_lanes=4, but 3 in the checkpoint"):
        datamodule(shards, num_lanes=4).load_state_dict(state)
    with pytest.raises(DataError, match=r"data\.window_size=6, but 5 in the checkpoint"):
        datamodule(shards, window_size=6).load_state_dict(state)
    with pytest.raises(DataError, match="of version 2, this release reads 3"):
        datamodule(shards).load_state_dict(state | {"version": 2})
    other = write_shards(tmp_path / "other", (4, 4))
    with pytest.raises(DataError, match=r"set data\.allow_index_change=true to go on at sample 16"):
        datamodule(other).load_state_dict(state)
    allowed = datamodule(other, allow_index_change=True)
    allowed.load_state_dict(state)
    assert allowed.positions.tolist() == [16]
    datamodule(shards, resolution=64).load_state_dict(state)
    with pytest.raises(DataError, match=r"data\.weights=\{'a': 1\.0\}, but None in the checkpoint"):
        datamodule({"a": str(shards)}, weights={"a": 1.0}).load_state_dict(state)
    bucketed = {"bucket_step": 8, "min_bucket_rate": 0.0}
    several = write_shards(tmp_path / "several", (9, 9), sizes=[(48, 40), (40, 64), (64, 40)])
    with pytest.raises(DataError, match=r"the aspect buckets are not those of the checkpoint \(3, then 1\)"):
        datamodule(several, **bucketed).load_state_dict(state | {"index_id": build_index(str(several)).index_id})
    allowed = datamodule(several, allow_index_change=True, **bucketed)
    allowed.load_state_dict(state | {"positions": [24]})
    assert allowed.positions.tolist() == [8, 8, 8]
