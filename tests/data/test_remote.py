"""Shards on web servers and in an S3 store: indexed, read and refused as those on a disk are."""

import fsspec
import numpy as np
import pytest
from safetensors.numpy import save

from ipa_train.data.cache import CacheDescription, shard_name
from ipa_train.data.index import build_index
from ipa_train.data.local_copies import LocalCopies
from ipa_train.data.remote import ask_version
from ipa_train.data.sources import RemoteFile
from ipa_train.errors import ConfigError, DataError
from tests.data.conftest import PATIENCE_SECONDS, write_shard, write_shards
from tests.data.http_server import http_server
from tests.data.s3_server import s3_server
from tests.data.test_local_copies import fetch
from tests.data.test_pipeline import datamodule, stream


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
            assert len(s3.requests) <= 5 * 3 + 3, "a few questions and one piece for each shard"
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


def remote_data(server, tmp_path, shards=None, **options):
    places = {"index_dir": str(tmp_path / "index"), "cache_dir": str(tmp_path / "cache")}
    return datamodule(
        shards or f"{server.url}/{{00000..{len(list(server.folder.glob('*.tar'))) - 1:05d}}}.tar",
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
