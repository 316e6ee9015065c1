"""The feature cache holds what training would have computed, whole, and says what it lacks."""

import hashlib
import json
import multiprocessing
import os
import signal
import time
from dataclasses import replace

import pytest
import torch

from data_tools.encode import CacheWriter
from ipa_train.data.augmentation import ReferenceAugmentation
from ipa_train.data.batch import Features
from ipa_train.data.cache import encoders_identity
from ipa_train.data.datamodule import StreamingDataModule
from ipa_train.errors import ConfigError, DataError
from tests.data.conftest import write_paired_shards, write_shards

SIZES = [(48, 40), (40, 64), (64, 40), (24, 72)]
BUCKETS = {"bucket_step": 8, "max_aspect_ratio": 4.0, "min_bucket_rate": 0.0}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("pictures"), (13, 8, 11), sizes=SIZES)


@pytest.fixture
def identity(base, image_encoder):
    return encoders_identity(base.vae.identity(), image_encoder.identity(), "pooled")


@pytest.fixture
def make_data(image_encoder, identity):
    def make(shards, **options):
        defaults = {"global_batch_size": 4, "resolution": 32, "encoders": identity, "num_workers": 0}
        options = defaults | {"image_prompt_size": image_encoder.image_size} | options
        return StreamingDataModule(shards=shards if isinstance(shards, dict) else str(shards), **options)

    return make


@pytest.fixture
def make_writer(base, image_encoder, make_data):
    def make(shards, out, *, writer_options=None, **options):
        def encode(pictures):
            return base.vae.encode(pictures.pixels), (image_encoder.encode(pictures.image_prompts, "pooled"),)

        precision = {"vae": "float32", "image_encoder": "float32"}
        options = {"out": out, "precision": precision, "batch_size": 3} | (writer_options or {})
        return CacheWriter(make_data(shards, **data_options(options)), encode, **options)

    def data_options(options):
        return {
            name: options.pop(name) for name in list(options) if name in {*BUCKETS, "num_workers", "reference_augment"}
        }

    return lambda shards, out, **options: make(shards, out, writer_options=options)


def batches(data, steps):
    loader = iter(data.loader())
    return [next(loader).batch for _ in range(steps)]


@pytest.mark.parametrize("options", [{}, BUCKETS])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_cache_gives_what_the_encoders_give(
    pictures, tmp_path, make_writer, make_data, base, image_encoder, options, workers
):
    """The same samples in the same order, mirrored alike, equal to the rounding of fp16."""
    writer = make_writer(pictures, tmp_path / "cache", flip=True, num_workers=workers, **options)
    results = list(writer.run(range(3)))
    assert [result.num_samples for result in results] == [13, 8, 11]
    assert not any(result.bad for result in results)
    online = batches(make_data(pictures, flip_rate=0.5, **options), 12)
    cached = batches(make_data(tmp_path / "cache", flip_rate=0.5, **options), 12)
    assert len({batch.content.pixels.shape for batch in online}) == (4 if options else 1)
    for on, off in zip(online, cached, strict=True):
        assert (on.captions, on.positions.tolist()) == (off.captions, off.positions.tolist())
        for name in ("original_sizes", "crop_top_lefts", "target_sizes"):
            assert torch.equal(getattr(on, name), getattr(off, name))
        posterior = base.vae.encode(on.content.pixels)
        assert isinstance(off.content, Features)
        tolerance = {"rtol": 2e-3, "atol": 2e-3}
        torch.testing.assert_close(off.content.latents_mean.float(), posterior.mean, **tolerance)
        torch.testing.assert_close(off.content.latents_std.float(), posterior.std, **tolerance)
        features = image_encoder.encode(on.content.image_prompts, "pooled")
        torch.testing.assert_close(off.content.image_features[0].float(), features, **tolerance)


@pytest.fixture
def paired(tmp_path):
    return write_paired_shards(tmp_path / "paired", (6, 6))


PROMPTS = {"image_prompt": "reference", "reference_mask": "crop", "embedding_shape": [4]}


def test_a_cache_holds_features_of_each_kind(paired, tmp_path, make_data, base, image_encoder):
    """Of masked references and of stored embeddings; the target's flip is not theirs."""

    def features(pictures):
        return pictures.embeddings, image_encoder.encode(pictures.image_prompts, "penultimate")

    def encode(pictures):
        return base.vae.encode(pictures.pixels), features(pictures)

    data = make_data(paired, **PROMPTS)
    list(CacheWriter(data, encode, out=tmp_path / "cache", precision={}, flip=True).run(range(2)))
    options = PROMPTS | {"flip_rate": 0.5}
    on_off = batches(make_data(paired, **options), 6), batches(make_data(tmp_path / "cache", **options), 6)
    for on, off in zip(*on_off, strict=True):
        assert on.captions == off.captions
        for online, cached in zip(features(on.content), off.content.image_features, strict=True):
            torch.testing.assert_close(cached.float(), online, rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(
            off.content.latents_mean.float(), base.vae.encode(on.content.pixels).mean, rtol=2e-3, atol=2e-3
        )
    for name, value, was in (
        ("image_prompt", "picture", "reference"),
        ("reference_mask", "background", "crop"),
        ("reference_mask_margin", 0.5, 0.1),
        ("embedding_shape", None, r"\[4\]"),
    ):
        with pytest.raises(ConfigError, match=rf"data\.{name}={value}, but .* was encoded with {name}={was}"):
            _ = make_data(tmp_path / "cache", **PROMPTS | {name: value}).stream
    data = make_data(paired, **PROMPTS | {"reference_mask": "background"})
    other = CacheWriter(data, encode, out=tmp_path / "cache", precision={}, flip=True)
    with pytest.raises(ConfigError, match="holds a cache of another kind: reference_mask was crop, now background"):
        list(other.run([0]))


def test_prompts_that_change_with_each_look_are_not_cached(pictures, tmp_path, make_writer, make_data):
    augment = ReferenceAugmentation(flip_rate=0.5)
    with pytest.raises(ConfigError, match=r"data\.reference_augment: .* cannot be cached"):
        make_writer(pictures, tmp_path / "cache", reference_augment=augment)
    list(make_writer(pictures, tmp_path / "cache").run(range(3)))
    with pytest.raises(ConfigError, match=r"data\.reference_augment: .* cannot be cached"):
        _ = make_data(tmp_path / "cache", reference_augment=augment).stream


def test_caches_from_before_there_were_references_are_still_read(pictures, tmp_path, make_writer, make_data):
    list(make_writer(pictures, tmp_path / "cache").run(range(3)))
    path = tmp_path / "cache" / "cache.json"
    new = ("image_prompt", "reference_mask", "reference_mask_margin", "embedding_shape")
    description = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in description.items() if name not in new}))
    assert len(batches(make_data(tmp_path / "cache"), 1)[0].content.image_features) == 1


def test_an_unfinished_or_foreign_cache_is_refused_by_name(pictures, tmp_path, make_writer, make_data, identity):
    cache = tmp_path / "cache"
    writer = make_writer(pictures, cache)
    list(writer.run([0, 2]))
    with pytest.raises(DataError, match="shard 00001 is not encoded yet; run ipa data encode again"):
        _ = make_data(cache).stream
    list(writer.run([1]))
    assert len(batches(make_data(cache), 2)) == 2
    other = identity | {"image_encoder_sha256": "of another encoder"}
    with pytest.raises(ConfigError, match=r"other encoders.*image_encoder_sha256 was .*, now of another"):
        _ = make_data(cache, encoders=other).stream
    with pytest.raises(ConfigError, match=r"other encoders.*feature_kind was pooled, now penultimate"):
        _ = make_data(cache, encoders=identity | {"feature_kind": "penultimate"}).stream
    with pytest.raises(ConfigError, match=r"data\.resolution=64, but .* was encoded with resolution=32"):
        _ = make_data(cache, resolution=64).stream
    with pytest.raises(ConfigError, match="holds no flipped features: encode with --flip"):
        _ = make_data(cache, flip_rate=0.5).stream
    with pytest.raises(ConfigError, match="cached features are of centre crops"):
        _ = make_data(cache, crop="random").stream
    with pytest.raises(ConfigError, match="holds a cache of another kind: latents_std was True, now False"):
        list(make_writer(pictures, cache, latents_std=False).run([0]))
    with pytest.raises(ConfigError, match=r"of another kind: image_encoder_sha256 was .*, now of another encoder;"):
        replace(make_writer(pictures, cache).description, encoders=other).write(cache)
    with pytest.raises(ConfigError, match="holds features already"):
        make_writer(cache, tmp_path / "again")
    description = json.loads((cache / "cache.json").read_text())
    (cache / "cache.json").write_text(json.dumps(description | {"resolution": 64}))
    with pytest.raises(ConfigError, match="its fingerprint is not that of its content"):
        _ = make_data(cache).stream


def test_a_cache_from_before_there_were_other_image_prompts_is_still_good(
    pictures, tmp_path, make_writer, make_data, base, image_encoder
):
    cache = tmp_path / "cache"
    list(make_writer(pictures, cache).run(range(3)))
    facts = json.loads((cache / "cache.json").read_text())
    for name in (
        "image_prompt",
        "reference_mask",
        "reference_mask_margin",
        "embedding_shape",
        "version",
        "fingerprint",
    ):
        del facts[name]
    clip = image_encoder.identity()
    facts["encoders"] = {
        **base.vae.identity(),
        "image_encoder_sha256": clip["weights_sha256"],
        "image_preprocessing": clip["preprocessing"],
        "feature_kind": "pooled",
    }
    fingerprint = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    (cache / "cache.json").write_text(json.dumps({"version": 1, "fingerprint": fingerprint, **facts}))
    assert len(batches(make_data(cache), 2)) == 2
    assert len(list(make_writer(pictures, cache).run([0]))) == 1
    others = encoders_identity({}, clip | {"layer": -3}, "pooled"), encoders_identity({}, clip, "pooled")
    assert others[0] != others[1]


def test_without_std_latents_are_the_means(pictures, tmp_path, make_writer, make_data):
    list(make_writer(pictures, tmp_path / "cache", latents_std=False).run(range(3)))
    assert batches(make_data(tmp_path / "cache"), 1)[0].content.latents_std is None


def test_caches_are_mixed_by_weight_like_pictures(pictures, tmp_path, make_writer, make_data):
    other = write_shards(tmp_path / "other", (9, 9), sizes=SIZES)
    for name, source in (("a", pictures), ("b", other)):
        list(make_writer(source, tmp_path / name).run(range(len(list(source.glob("*.tar"))))))
    weights = {"a": 0.25, "b": 0.75}
    caches = make_data({"a": str(tmp_path / "a"), "b": str(tmp_path / "b")}, weights=weights)
    online = make_data({"a": str(pictures), "b": str(other)}, weights=weights)
    for on, off in zip(batches(online, 12), batches(caches, 12), strict=True):
        assert (on.captions, on.positions.tolist()) == (off.captions, off.positions.tolist())
    assert caches.stream.consumed(torch.tensor([48]).numpy()) == {"a": 12, "b": 36}
    list(make_writer(other, tmp_path / "c", latents_std=False).run(range(2)))
    with pytest.raises(ConfigError, match="c: its latents_std are not those of the other caches; encode them alike"):
        _ = make_data({"a": str(tmp_path / "a"), "c": str(tmp_path / "c")}).stream


def test_buckets_and_shards_of_a_cache_may_be_excluded_whole(tmp_path, make_writer, make_data):
    """The others go on, also in a mixture."""
    for name in ("a", "b"):
        pictures = write_shards(tmp_path / name, (6,), sizes=[(48, 40), (48, 40), (40, 64)])
        list(make_writer(pictures, tmp_path / f"{name}-cache", **BUCKETS).run([0]))
        (gone,) = (tmp_path / f"{name}-cache").glob("*24x40.tar")
        keys = "".join(f"{gone.name}/00000000{i}\n" for i in (2, 5))
        (tmp_path / f"{name}-cache" / "exclude-all.txt").write_text(keys)
    caches = {name: str(tmp_path / f"{name}-cache") for name in ("a", "b")}
    for options in ({}, {"weights": {"a": 1, "b": 1}}):
        data = make_data(caches, **options, **BUCKETS)
        assert {tuple(batch.target_sizes[0].tolist()) for batch in batches(data, 6)} == {(32, 32)}


def test_what_cannot_be_encoded_is_named_and_left_out(tmp_path, make_writer, make_data):
    writer = make_writer(write_shards(tmp_path / "pictures", (6, 5, 4)), tmp_path / "cache", flip=True)
    for shard, damaged in ((0, [2]), (2, range(4))):
        rows = writer.shards[shard].rows()
        with writer.shards[shard].path.open("r+b") as file:
            for row in damaged:
                file.seek(int(rows[row]["offset"]) + int(rows[row]["content_start"]))
                file.write(bytes(64))
    first, nothing, second = writer.run([0, 2, 1])
    assert (first.num_samples, second.num_samples) == (5, 5)
    assert "00002.tar: none of its samples can be encoded; first 00002.tar/000020000: cannot decode" in str(nothing)
    assert writer.done(2) is None
    assert [text.split(":")[0] for text in first.bad] == ["00000.tar/000000002"]
    assert writer.done(0) == first
    with pytest.raises(DataError, match="shard 00002 is not encoded yet"):
        _ = make_data(tmp_path / "cache").stream


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("options", [{}, BUCKETS])
def test_a_shard_that_is_gone_costs_no_other_a_sample(tmp_path, make_writer, workers, options):
    pictures = write_shards(tmp_path / "pictures", (6,) * 5, sizes=SIZES)
    writer = make_writer(pictures, tmp_path / "cache", num_workers=workers, **options)
    (pictures / "00002.tar").unlink()
    results = list(writer.run(range(5)))
    assert str(results.pop(2)) == f"{pictures / '00002.tar'}: cannot open: No such file or directory"
    assert [result.num_samples for result in results] == [6, 6, 6, 6]
    assert [writer.done(shard) is not None for shard in range(5)] == [True, True, False, True, True]


def test_features_that_fp16_cannot_hold_are_left_out(tmp_path, make_writer, base):
    writer = make_writer(write_shards(tmp_path / "pictures", (3,)), tmp_path / "cache")
    base.vae.model.register_to_config(scaling_factor=1e9)
    (result,) = writer.run([0])
    assert isinstance(result, DataError)
    assert "its features are not finite in fp16" in str(result)


def test_killed_at_any_moment_the_same_command_ends_with_the_same_cache(pictures, tmp_path, make_writer):
    def encode(out):
        writer = make_writer(pictures, out)
        list(writer.run([shard for shard in range(3) if writer.done(shard) is None]))

    encode(tmp_path / "whole")
    for delay in (0.0, 0.02, 0.05, 0.1):
        process = multiprocessing.get_context("fork").Process(target=encode, args=(tmp_path / "killed",))
        process.start()
        time.sleep(delay)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    encode(tmp_path / "killed")
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "killed" / path.name).read_bytes() == path.read_bytes(), path.name
