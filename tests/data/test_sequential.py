"""The fallback without random access: endless and alike for all ranks, what is bad counted, no shell unasked."""

import tarfile

import numpy as np
import pytest

from ipa_train.data.sequential import SequentialDataModule
from ipa_train.errors import ConfigError, DataError
from tests.data.conftest import encode, picture, write_shard
from tests.data.http_server import http_server


def sequential(shards, **options):
    defaults = {"global_batch_size": 8, "resolution": 32, "image_prompt_size": 32, "shuffle_size": 4}
    return SequentialDataModule(shards=shards, **defaults | options)


def load(data, steps, **options):
    loader = iter(data.loader(**options))
    return [next(loader) for _ in range(steps)]


def pipe(folder):
    return f"pipe:cat {folder}/{{00000..00002}}.tar"


def test_commands_are_refused_unless_they_are_allowed(shards, tmp_path):
    command = f"pipe:touch {tmp_path}/ran; cat {shards}/00000.tar"
    with pytest.raises(ConfigError, match=r"pipe:touch .*if you trust it, set data\.allow_shell=true"):
        sequential(command).prepare_data()
    assert not (tmp_path / "ran").exists()
    assert load(sequential(command, allow_shell=True), 1)[0].batch.keys[0].startswith("00000.tar/")
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("source", ["pipe", "http", "http without ranges", "local"])
def test_every_source_gives_the_samples_of_its_shards_for_ever(shards, source):
    whole = {}
    for path in shards.glob("*.tar"):
        with tarfile.open(path) as tar:
            names = [name for name in tar.getnames() if name.endswith(".txt")]
            whole |= {f"{path.name}/{name[:-4]}": tar.extractfile(name).read().decode() for name in names}
    with http_server(shards) as server:
        server.knows_ranges = source == "http"
        spec = {"pipe": pipe(shards), "local": str(shards)}.get(source, f"{server.url}/{{00000..00002}}.tar")
        batches = load(sequential(spec, allow_shell=True), 40)
    assert not any(batch.bad for batch in batches)
    found = {k: c for loaded in batches for k, c in zip(loaded.batch.keys, loaded.batch.captions, strict=True)}
    assert found == whole
    assert batches[0].batch.content.pixels.shape == (8, 3, 32, 32)


def test_positions_are_never_used_twice(shards):
    data = sequential(str(shards), batch_size=2)
    taken = [
        (loaded.batch.positions.tolist(), tuple(loaded.batch.keys))
        for rank in range(2)
        for loaded in load(data, 6, rank=rank, world_size=2, workers=2)
    ]
    assert sorted(position for positions, _ in taken for position in positions) == list(range(24))
    assert len({keys for _, keys in taken}) == len(taken), "ranks and workers read for themselves"
    later = load(data, 1, start=np.array([24]))[0].batch
    assert later.positions.tolist() == [24, 25]
    assert later.keys != load(data, 1)[0].batch.keys


def test_random_crops_are_keyed_by_position(shards):
    """With one sample alone, what differs is the draws."""
    write_shard(shards, 0, {"a": {"jpg": encode(picture(0, width=64, height=40)), "txt": "a"}})
    data = sequential(str(shards / "00000.tar"), crop="random", flip_rate=0.5)
    first, again = (load(data, 1)[0].batch for _ in range(2))
    assert first.content.pixels.equal(again.content.pixels)
    assert len({tuple(corner) for corner in first.crop_top_lefts.tolist()}) > 4


def test_bad_samples_and_broken_sources_are_counted(tmp_path):
    members = {f"{i}": {"jpg": encode(picture(i)), "txt": f"{i}"} for i in range(4)}
    spoilt = {
        "nojpg": {"txt": "alone"},
        "broken": {"jpg": members["0"]["jpg"][:300], "txt": "cut"},
        "latin": {"jpg": members["0"]["jpg"], "txt": "é".encode("latin-1")},
        "pickle": members["1"] | {"pyd": b"cos\nsystem\n(S'touch owned'\ntR."},
    }
    write_shard(tmp_path, 0, members | spoilt)
    path = write_shard(tmp_path, 1, members)
    with tarfile.open(path) as tar:
        boundary = tar.getmember("2.jpg").offset
    path.write_bytes(path.read_bytes()[:boundary])
    write_shard(tmp_path, 2, members)
    sources = [str(tmp_path / "00000.tar"), str(path), f"pipe:cat {tmp_path}/00002.tar; exit 3"]
    batches = load(sequential(sources, allow_shell=True), 20)
    assert all(len(loaded.batch) == 8 for loaded in batches)
    errors = {(bad.shard, bad.key): bad.error for loaded in batches for bad in loaded.bad}
    first = str(tmp_path / "00000.tar")
    assert errors.pop((first, "nojpg")) == "is without an image or a caption"
    assert errors.pop((first, "broken")).startswith("cannot decode")
    assert "utf-8" in errors.pop((first, "latin"))
    assert errors.pop((str(path), "")) == "ends without the mark of a tar's end: it is cut"
    assert "exit 3" in errors.pop((sources[2], ""))
    assert not errors
    assert any("00000.tar/pickle" in loaded.batch.keys for loaded in batches)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("pipe:cd /proc/self/task && tar cf - --exclude='*' .", "8 samples in a row are bad.*holds no picture"),
        ("pipe:exit 1", "8 samples in a row are bad.*exit 1"),
        ("pipe:yes", "8 samples in a row are bad.*invalid header"),
        ("http", r"8 samples in a row are bad.*00000\.tar: there is no such file"),
    ],
)
def test_when_nothing_can_be_read_it_stops_with_one_line(tmp_path, source, message):
    with http_server(tmp_path) as server:
        spec = f"{server.url}/00000.tar" if source == "http" else source
        (loaded,) = load(sequential(spec, allow_shell=True, patience_seconds=0.1), 1)
    with pytest.raises(DataError, match=message) as error:
        _ = loaded.batch
    assert "\n" not in str(error.value)
    assert len(loaded.bad) == 8


def test_a_member_that_claims_too_much_is_not_read(tmp_path):
    huge = tarfile.TarInfo("a.jpg")
    huge.size = 2**40
    (tmp_path / "00000.tar").write_bytes(huge.tobuf() + b"\0" * 1024)
    (loaded,) = load(sequential(str(tmp_path / "00000.tar")), 1)
    assert {bad.error for bad in loaded.bad} == {"a.jpg claims 1099511627776 bytes, above data.max_member_bytes"}


def test_a_resumed_run_goes_on_with_new_positions(shards):
    data = sequential(str(shards))
    state = {**data._order, "version": 3, "positions": [16], "step": 2}
    data.load_state_dict(state)
    assert data.positions.tolist() == [16]
    with pytest.raises(ConfigError, match=r"data\.shuffle_size must be at least 1, got 0"):
        sequential(str(shards), shuffle_size=0)
