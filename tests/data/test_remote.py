"""Shards on real servers that cut, stall and fail: whole copies or none, few requests, and the same stream."""

import os
import signal
import subprocess
import sys
import time

import fsspec
import numpy as np
import pytest
from safetensors.numpy import save

from ipa_train.data.cache import CacheDescription, shard_name
from ipa_train.data.index import build_index
from ipa_train.data.local_copies import GIB, LocalCopies
from ipa_train.data.prefetch import NUM_CONNECTIONS, Prefetcher, remote_sizes, shards_ahead
from ipa_train.data.remote import ask_version
from ipa_train.data.sources import RemoteFile
from ipa_train.errors import ConfigError, DataError
from tests.data.conftest import write_shard, write_shards
from tests.data.servers import http_server, s3_server
from tests.data.test_pipeline import datamodule, stream

PATIENCE_SECONDS = 0.5


@pytest.fixture
def server(shards):
    with http_server(shards) as server:
        yield server


def make_copies(tmp_path, **options):
    copies = LocalCopies(tmp_path / "cache", **{"patience_seconds": PATIENCE_SECONDS} | options)
    copies.prepare()
    return copies


@pytest.fixture
def copies(tmp_path):
    return make_copies(tmp_path)


def remote(server, copies, name="00000.tar"):
    url = f"{server.url}/{name}"
    return RemoteFile(url, ask_version(url, patience_seconds=PATIENCE_SECONDS), copies)


def fetch(file):
    os.close(file.open())
    return file.path.read_bytes()


def leftovers(copies):
    return [path.name for path in copies.folder.glob("*/*") if path.suffix != ".tar"]


FAULTS = {
    "cut in a member": [("cut", 3000)],
    "cut at a member": [("cut", 1024)],
    "cut at the very start": [("cut", 0)],
    "short without a word": [("short", 1024)],
    "stalls": [("stall", 2.0)],
    "errors twice": [("status", 500), ("status", 503)],
    "asks for patience": [("status", 429)],
    "everything at once": [("status", 503), ("cut", 512), ("short", 0), ("stall", 2.0)],
}


@pytest.mark.parametrize("faults", FAULTS.values(), ids=FAULTS.keys())
def test_a_server_that_fails_now_and_then_is_asked_again(server, copies, shards, faults):
    server.faults["00000.tar"] = list(faults)
    file = remote(server, copies)
    assert fetch(file) == (shards / "00000.tar").read_bytes()
    assert server.count("GET") == len(faults) + 1
    assert server.count("HEAD") == 3
    assert not leftovers(copies)
    fetch(file)
    assert server.count("GET") == len(faults) + 1, "what is there is not downloaded again"


@pytest.mark.parametrize(
    ("faults", "message", "num_gets"),
    [
        ([("status", 503)] * 9, r"503.*\(5 attempts\)", 5),
        ([("short", 1024)] * 9, r"the server sent 1024 of \d+ bytes from byte 0 on \(5 attempts\)", 5),
        ([("status", 403)], "403", 1),
        ([("replace", '"new"')], r"replaced since it was indexed \(\d+ bytes, .*; now \d+ bytes, \"new\"\)", 1),
    ],
)
def test_what_fails_to_the_end_is_named_and_not_asked_for_again(server, copies, faults, message, num_gets):
    server.faults["00000.tar"] = list(faults)
    file = remote(server, copies)
    for _ in range(3):
        with pytest.raises(DataError, match=rf"^{server.url}/00000\.tar: .*{message}") as error:
            file.open()
        assert "\n" not in str(error.value)
    assert server.count("GET") == num_gets
    assert leftovers(copies) == [f"{file.path.name}.failed"]
    server.faults.clear()
    server.etags.clear()
    copies.prepare()
    assert fetch(file), "a new run gives the server another chance"
    assert not leftovers(copies)


def test_a_stalled_server_does_not_hang_the_run(server, copies):
    server.faults["00000.tar"] = [("stall", 3.0)] * 9
    with pytest.raises(DataError, match=r"no answer within 0\.5 s \(5 attempts\)"):
        remote(server, copies).open()


def test_a_cut_costs_one_piece_and_a_server_without_ranges_sends_all_at_once(server, copies, shards, monkeypatch):
    monkeypatch.setattr("ipa_train.data.sources._PIECE_BYTES", 4096)
    whole = (shards / "00000.tar").read_bytes()
    num_pieces = -(-len(whole) // 4096)
    server.faults["00000.tar"] = [("", 0), ("cut", 100), ("", 0), ("status", 500)]
    assert fetch(remote(server, copies)) == whole
    assert server.count("GET") == num_pieces + 2
    server.knows_ranges = False
    assert fetch(remote(server, copies, "00002.tar")) == (shards / "00002.tar").read_bytes()
    assert server.count("GET", "00002.tar") == 1


def test_a_signature_is_used_but_not_shown(server, copies):
    url = f"{server.url}/00000.tar?signature=secret"
    file = RemoteFile(url, ask_version(url, patience_seconds=1), copies)
    server.faults["00000.tar"] = [("status", 403)]
    with pytest.raises(DataError, match="403") as error:
        file.open()
    assert "secret" not in str(error.value)


FETCH = """
import os, sys
from pathlib import Path
from ipa_train.data.local_copies import LocalCopies
from ipa_train.data.remote import ask_version
from ipa_train.data.sources import RemoteFile
for url in sys.argv[2:]:
    copies = LocalCopies(Path(sys.argv[1]), patience_seconds=8)
    os.close(RemoteFile(url, ask_version(url, patience_seconds=8), copies).open())
"""


def fetching(server, copies, *names):
    urls = [f"{server.url}/{name}" for name in names]
    return subprocess.Popen([sys.executable, "-c", FETCH, str(copies.folder), *urls])


def test_processes_share_what_each_shard_is_downloaded_once_for(server, copies, shards):
    names = [f"0000{i}.tar" for i in range(3)]
    server.faults |= {name: [("stall", 0.5)] for name in names}
    processes = [fetching(server, copies, *order) for order in (names, names[::-1])]
    assert [process.wait(30) for process in processes] == [0, 0]
    assert server.count("GET") == 6, "each once and, as its server broke off, once again"
    assert [fetch(remote(server, copies, n)) for n in names] == [(shards / n).read_bytes() for n in names]


def test_what_a_killed_process_left_is_begun_anew(server, copies, shards):
    server.faults["00000.tar"] = [("stall", 30.0)]
    process = fetching(server, copies, "00000.tar")
    file = remote(server, copies)
    part = file.path.with_name(f"{file.path.name}.part")
    while not part.exists() or not part.stat().st_size:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert part.stat().st_size == file.version.num_bytes, "of full length, and empty"
    assert fetch(file) == (shards / "00000.tar").read_bytes()
    assert not leftovers(copies)


def test_leftovers_of_a_killed_process_are_evicted(server, copies):
    file = remote(server, copies, "00001.tar")
    file.path.parent.mkdir(parents=True)
    file.path.with_name(f"{file.path.name}.part").write_bytes(b"half")
    kept = remote(server, copies)
    fetch(kept)
    assert copies.keep_only({kept.path}) == {kept.path}
    assert list(copies.folder.glob("*/*")) == [kept.path]


def test_the_cap_is_kept_and_open_copies_outlive_it(server, shards, tmp_path):
    sizes = [(shards / f"0000{i}.tar").stat().st_size for i in range(3)]
    copies = make_copies(tmp_path, max_gib=(sizes[1] + sizes[2]) / GIB)
    descriptor = remote(server, copies, "00001.tar").open()
    for number in (2, 0):
        fetch(remote(server, copies, f"0000{number}.tar"))
        assert copies.num_bytes() <= copies.max_bytes
    assert remote(server, copies, "00001.tar").path.exists(), "in use"
    os.close(descriptor)
    opened = build_shard(server, copies, tmp_path, "00000.tar").open()
    fetch(remote(server, copies, "00002.tar"))
    assert copies.num_bytes() <= copies.max_bytes
    assert os.pread(opened, sizes[0], 0) == (shards / "00000.tar").read_bytes()
    os.close(opened)
    with pytest.raises(DataError, match=r"GiB do not fit into data\.cache_gib="):
        remote(server, make_copies(tmp_path / "small", max_gib=1000 / GIB)).open()


def build_shard(server, copies, tmp_path, name):
    (shard,) = build_index(f"{server.url}/{name}", index_dir=tmp_path / "index", copies=copies).shards
    return shard


def test_the_index_is_that_of_local_shards_and_is_reused(server, copies, shards, tmp_path):
    options = {"index_dir": tmp_path / "index", "copies": copies}
    spec = f"{server.url}/{{00000..00002}}.tar"
    index = build_index(spec, **options)
    assert index.index_id == build_index(str(shards)).index_id
    server.requests.clear()
    assert build_index(spec, **options).index_id == index.index_id
    assert (server.count("GET"), server.count("HEAD")) == (0, 3)
    server.requests.clear()
    assert build_index(spec, trust_index=True, **options) == index
    assert not server.requests
    write_shards(shards, (7, 2))
    changed = build_index(spec, **options)
    assert changed.counts.tolist() == [7, 2, 9]
    assert server.names("GET") == ["00000.tar", "00001.tar"], "both were written anew"


def test_what_is_wrong_with_remote_shards_is_named_by_url(server, copies, shards, tmp_path):
    options = {"index_dir": tmp_path / "index", "copies": copies}
    (shards / "00001.tar").write_bytes((shards / "00001.tar").read_bytes()[:1024])
    (shards / "00002_stats.json").unlink()
    with pytest.raises(
        DataError, match=rf"{server.url}/00001\.tar: truncated .* \| {server.url}/00002\.tar: no 00002_"
    ):
        build_index(f"{server.url}/{{00000..00002}}.tar", **options)
    for spec, message in (
        (f"{server.url}/{{00000..00004}}.tar", rf"2 of 5 shards missing, first {server.url}/00003\.tar"),
        (f"{server.url}/*.tar", r"web servers have no list of files; give \{00000\.\.00010\}\.tar"),
        ([f"{server.url}/00000.tar"] * 2, "more than once"),
        ("s4://bucket/00000.tar", "s4:// cannot be read. Allowed: gs, http, https, s3"),
        ("gs://bucket/00000.tar", r"gs:// needs a package that is not installed: pip install 'ipa-train\[gcs\]'"),
    ):
        with pytest.raises(ConfigError, match=message):
            build_index(spec, **options)
    with pytest.raises(ConfigError, match=r"remote shards need data\.cache_dir, .* and data\.index_dir"):
        build_index(f"{server.url}/00000.tar")


@pytest.fixture(scope="module")
def s3():
    with s3_server() as (store, url), pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ENDPOINT_URL": url,
            "AWS_ACCESS_KEY_ID": "me",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            patch.setenv(name, value)
        yield store


def upload(shards, bucket):
    files = fsspec.filesystem("s3")
    files.mkdir(bucket)
    for path in shards.glob("*"):
        files.put_file(str(path), f"{bucket}/{path.name}")
    return f"s3://{bucket}"


@pytest.mark.parametrize("pattern", ["/{00000..00002}.tar", "/*.tar", ""])
def test_the_stream_is_the_same_from_disk_http_and_s3(server, s3, shards, tmp_path, pattern):
    options = {"crop": "random", "flip_rate": 0.5}
    whole = stream(datamodule(shards, **options), 0, 5)
    bucket = upload(shards, f"laion{len(pattern)}")
    for number, url in enumerate((bucket + pattern, f"{server.url}/{{00000..00002}}.tar")):
        s3.requests.clear()
        places = {"index_dir": str(tmp_path / f"index{number}"), "cache_dir": str(tmp_path / f"cache{number}")}
        data = datamodule(url, **places, **options)
        assert stream(data, 0, 5, world_size=2, workers=1) == whole
        if number == 0:
            assert s3.count("GET", ".tar") == 3
            assert len(s3.requests) <= 4 * 3 + 3, "a few questions and one piece for each shard"
    assert server.count("GET") == 3


def test_a_store_that_asks_to_slow_down_is_asked_less(s3, shards, copies):
    url = upload(shards, "slow") + "/00000.tar"
    file = RemoteFile(url, ask_version(url, patience_seconds=1), copies)
    s3.requests.clear()
    s3.num_slow_downs = 3
    assert fetch(file) == (shards / "00000.tar").read_bytes()
    assert s3.count("GET", ".tar") == 4
    s3.num_slow_downs = 100
    other = RemoteFile(url, file.version, LocalCopies(copies.folder / "other", patience_seconds=0.1))
    with pytest.raises(DataError, match=r"s3://slow/00000\.tar: .*\(5 attempts\)"):
        other.open()
    assert s3.count("GET", ".tar") == 4 + 5
    s3.num_slow_downs = 0


def remote_data(server, tmp_path, **options):
    places = {"index_dir": str(tmp_path / "index"), "cache_dir": str(tmp_path / "cache")}
    return datamodule(
        f"{server.url}/{{00000..{len(list(server.folder.glob('*.tar'))) - 1:05d}}}.tar",
        patience_seconds=PATIENCE_SECONDS,
        **places,
        **options,
    )


def test_a_shard_that_is_gone_is_many_bad_samples_and_one_question(server, shards, tmp_path):
    data = remote_data(server, tmp_path)
    _ = data.stream
    data.copies.keep_only(())
    (shards / "00001.tar").unlink()
    server.requests.clear()
    loader = iter(data.loader())
    loaded = [next(loader) for _ in range(6)]
    bad = [sample for batch in loaded for sample in batch.bad]
    location = f"{server.url}/00001.tar"
    assert len(bad) >= 10, "five samples in each of two epochs"
    assert {(b.shard, b.shard_size, b.error) for b in bad} == {
        (location, 5, f"{location}: there is no such file any more.")
    }
    assert all("00001.tar" not in key for batch in loaded for key in batch.batch.keys)
    assert server.count("HEAD", "00001.tar") == 1


def load(data, steps):
    """The keys of a few batches without a bad sample."""
    loader = iter(data.loader())
    batches = [next(loader) for _ in range(steps)]
    assert not any(batch.bad for batch in batches)
    return [key for batch in batches for key in batch.batch.keys]


def wait_for(condition):
    for _ in range(1500):
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError("waited for 30 s")


def test_shards_arrive_in_the_order_of_the_plan_before_they_are_used(tmp_path):
    folder = write_shards(tmp_path / "shards", (6,) * 24)
    size = max(path.stat().st_size for path in folder.glob("*.tar"))
    with http_server(folder) as server:
        data = remote_data(server, tmp_path, num_lanes=2, window_size=6, cache_gib=12 * size / GIB)
        plan, copies, start = data.stream, data.copies, np.zeros(1, np.int64)
        sizes = remote_sizes(plan)
        order = shards_ahead(plan, start, sizes, max_bytes=2**40)
        first = shards_ahead(plan, start, sizes, max_bytes=copies.max_bytes)
        assert order[: len(first)] == first
        assert 12 <= len(first) < 24
        copies.keep_only(())
        server.requests.clear()
        prefetcher = Prefetcher(plan, start, copies)
        paths = [shard.path for shard in data.index.shards]
        wait_for(lambda: all(paths[number].exists() for number in first))
        arrived = [int(name[:5]) for name in server.names("GET")]
        assert all(abs(first.index(n) - i) < NUM_CONNECTIONS for i, n in enumerate(arrived)), (first, arrived)
        server.requests.clear()
        assert len(load(data, 4)) == 32
        assert not server.requests, "all was there before it was used"

        later = np.array([72])
        prefetcher.advance(later)
        second = shards_ahead(plan, later, sizes, max_bytes=copies.max_bytes)
        wait_for(lambda: {n for n, path in enumerate(paths) if path.exists()} == set(second))
        assert copies.num_bytes() <= copies.max_bytes
        assert set(server.names("GET")) == {f"{n:05d}.tar" for n in set(second) - set(first)}
        prefetcher.advance(start)
        wait_for(lambda: {n for n, path in enumerate(paths) if path.exists()} == set(first))
        wait_for(lambda: prefetcher.advance(start) or prefetcher.num_again == len(set(first) - set(second)))
        prefetcher.stop()
        assert prefetcher.num_downloaded == len(first) + len(set(second) - set(first)) + prefetcher.num_again


def test_a_cap_below_what_is_read_at_once_is_refused(server, tmp_path):
    with pytest.raises(ConfigError, match=r"data\.cache_gib=\S+ cannot hold the 3 shards .* at once: give at least"):
        _ = remote_data(server, tmp_path, cache_gib=(server.folder / "00002.tar").stat().st_size * 1.5 / GIB).stream


def test_a_prefetcher_that_cannot_says_so_and_reading_goes_on(server, tmp_path, caplog):
    data = remote_data(server, tmp_path)
    plan = data.stream
    data.copies.keep_only(())
    server.faults["00001.tar"] = [("status", 403)]
    prefetcher = Prefetcher(plan, np.zeros(1, np.int64), data.copies)
    wait_for(lambda: prefetcher.advance(np.zeros(1, np.int64)) or "00001.tar: 403" in caplog.text)
    os.kill(prefetcher._process.pid, signal.SIGKILL)
    prefetcher._process.join()
    prefetcher.advance(np.ones(1, np.int64))
    assert "the prefetcher has ended" in caplog.text
    prefetcher.advance(np.zeros(1, np.int64))
    prefetcher.stop()
    data.copies.prepare()
    assert len(load(data, 3)) == 24


def write_cache(folder):
    """A cache of two source shards, the second of which has no sample."""
    description = CacheDescription(
        encoders={},
        precision={},
        resolution=32,
        buckets=[[32, 32]],
        bucket_step=None,
        max_aspect_ratio=2.0,
        flipped=False,
        latents_std=False,
        source="",
        groups=["00000", "00001"],
    )
    description.write(folder)
    rng = np.random.default_rng(0)
    samples = {}
    for i in range(8):
        features = {
            "latents_mean": rng.random((4, 4, 4), np.float32).astype(np.float16),
            "image_features": rng.random(6, np.float32).astype(np.float16),
            "original_size": np.array([40, 48]),
            "crop_top_left": np.array([0, 4]),
        }
        samples[f"{i}"] = {"safetensors": save(features), "txt": f"picture {i}"}
    write_shard(folder, 0, samples).rename(folder / shard_name("00000", (32, 32)))
    (folder / "00000_stats.json").rename(folder / f"{shard_name('00000', (32, 32))[:-4]}_stats.json")
    for group in description.groups:
        (folder / f"{group}.json").write_text("{}")
    return folder


def test_a_feature_cache_may_be_remote_too(tmp_path):
    folder = write_cache(tmp_path / "features")
    local = datamodule(folder)
    with http_server(folder) as server:
        places = {"index_dir": str(tmp_path / "index"), "cache_dir": str(tmp_path / "cache")}
        url = f"{server.url}/00000-32x32.tar"
        data = datamodule(url, **places)
        mine, theirs = (next(iter(module.loader())).batch for module in (data, local))
        assert mine.content.latents_mean.equal(theirs.content.latents_mean)
        assert (mine.captions, mine.keys) == (theirs.captions, theirs.keys)
        (folder / "00001.json").unlink()
        with pytest.raises(DataError, match=rf"^{server.url}: shard 00001 is not encoded yet"):
            _ = datamodule(url, **places).stream
        (folder / "cache.json").unlink()
        with pytest.raises(ConfigError, match=rf"^{server.url}/cache\.json is missing"):
            _ = datamodule(url, **places).stream
