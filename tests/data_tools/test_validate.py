"""Everything that training would stumble over is found beforehand, and bytes that rot afterwards."""

import json
import os

import numpy as np
import pytest
import torch
from safetensors.torch import save

from data_tools.checksums import CHECKSUM, hash_key, repeated_hashes, write_checksums
from ipa_train.cli.main import main
from ipa_train.data.cache import CacheDescription
from ipa_train.data.index import build_index
from tests.data.conftest import encode, mask, npy, paired_sample, picture, write_shard, write_shards

JPG = encode(picture(0), quality=95)
GOOD = {"jpg": JPG, "txt": "a picture", "json": b"{}"}


def validate(*arguments):
    return main(["data", "validate", *map(str, arguments), "--workers", "1"])


def report(folder):
    return json.loads((folder / "validate-report.json").read_text())


def rot(path, *, at):
    """Change one byte behind the back of the file system's clock."""
    stat = path.stat()
    with path.open("r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_sound_shards_pass_and_are_not_read_again(shards):
    assert validate(shards) == 0
    counts = report(shards)["counts"]
    assert (counts["samples"], counts["shards"], counts["shards validated before"]) == (21, 3, 0)
    write_shard(shards, 1, {"new": GOOD})
    assert validate(shards) == 0
    counts = report(shards)["counts"]
    assert (counts["samples"], counts["shards validated before"]) == (17, 2)


BAD = {
    "cut": GOOD | {"jpg": JPG[:-100]},
    "none": GOOD | {"jpg": b"no picture"},
    "latin": GOOD | {"txt": "café".encode("latin-1")},
}


def test_bad_samples_are_named_and_can_be_left_out_of_training(tmp_path, shards):
    write_shard(shards, 0, {"good": GOOD, **BAD, "empty": GOOD | {"txt": " "}, "half": {"jpg": JPG}})
    (shards / "exclude-validate.txt").write_text("00000.tar/old # of another time\n00007.tar/kept # not read today\n")
    assert validate(shards) == 1
    found = report(shards)
    assert {sample["key"]: sample["excluded"] for sample in found["bad_samples"]} == dict.fromkeys(BAD, False)
    assert found["counts"] | {"empty captions": 1, "incomplete samples": 1, "bad samples": 3} == found["counts"]
    assert "3 bad samples (--write-exclude leaves them out), first cut: cannot decode" in found["problems"][0]
    assert validate(shards, "--write-exclude") == 0
    lines = (shards / "exclude-validate.txt").read_text().splitlines()
    assert {line.split(" # ")[0] for line in lines} == {f"00000.tar/{key}" for key in BAD} | {"00007.tar/kept"}
    assert build_index(str(shards)).counts.tolist() == [2, 5, 9]


def test_references_masks_and_embeddings_are_read_where_they_are_needed(tmp_path):
    extras = {"ref.jpg": JPG, "mask.png": mask(40, 48), "npy": npy(np.ones(4, np.float16))}
    whole = GOOD | extras
    samples = {
        "good": whole,
        "torn": whole | {"ref.jpg": JPG[:-100]},
        "small": whole | {"mask.png": mask(40, 9, columns=slice(0, 9))},
        "odd": whole | {"npy": b"no array"},
        "lacks": GOOD,
    }
    write_shard(tmp_path, 0, samples)
    assert validate(tmp_path) == 0
    assert validate(tmp_path, "--needs", "embedding", "mask", "reference") == 1
    found = report(tmp_path)
    assert {sample["key"]: sample["why"].partition(":")[0] for sample in found["bad_samples"]} == {
        "torn": "its reference",
        "small": "its mask has 9 x 40 pixels, the picture it is for 48 x 40",
        "odd": "its embedding is no array of numpy.save",
    }
    assert found["counts"] | {"samples": 4, "incomplete samples": 1, "shards validated before": 0} == found["counts"]
    assert validate(tmp_path) == 0


def test_the_mask_of_a_reference_is_held_to_its_size(tmp_path):
    write_shard(tmp_path, 0, {str(n): paired_sample(n) for n in range(3)})
    assert validate(tmp_path, "--needs", "mask") == 0


def test_a_shard_that_training_refuses_is_a_problem_and_the_others_are_validated(shards):
    path = shards / "00001.tar"
    path.write_bytes(path.read_bytes()[:5000])
    (shards / "00002_stats.json").write_text('{"successes": 10}')
    (shards / "00000_stats.json").unlink()
    assert validate(shards) == 1
    first, second, third = report(shards)["problems"]
    assert "no 00000_stats.json beside it" in first
    assert "00001.tar: truncated" in second
    assert "00002.tar: holds 9 samples, but 00002_stats.json says 10" in third
    assert report(shards)["counts"]["samples"] == 16


def test_bytes_that_change_on_disk_are_noticed_by_sample(shards):
    assert validate(shards) == 0
    path = shards / "00002.tar"
    rot(path, at=path.read_bytes().index(b"picture 4"))
    assert validate(shards) == 0, "nothing is read, as size and time are the same"
    for _ in range(2):  # what is found once is found again
        assert validate(shards, "--reread") == 1
        (bad,) = report(shards)["bad_samples"]
        assert (bad["shard"], bad["key"]) == (str(path), "000020004")
        assert "its bytes changed since they were validated" in bad["why"]
    rot(path, at=path.read_bytes().index(b"qicture 4"))
    assert validate(shards, "--reread") == 0, "mended"


def test_a_shard_that_is_written_anew_may_hold_other_bytes(shards):
    assert validate(shards) == 0
    old = (shards / "00001.tar").stat().st_mtime_ns
    path = write_shard(shards, 1, {"000010000": GOOD, "000010001": GOOD})
    os.utime(path, ns=(old + 10**9, old + 10**9))
    assert validate(shards) == 0
    assert report(shards)["counts"]["samples whose bytes changed"] == 2
    assert validate(shards, "--reread") == 0


def test_keys_that_come_in_several_shards_are_named(shards):
    write_shard(shards, 1, {"000020003": GOOD, "other": GOOD})
    assert validate(shards) == 1
    (problem,) = report(shards)["problems"]
    assert problem == f"the key '000020003' is in {shards}/00001.tar, {shards}/00002.tar"


@pytest.mark.parametrize("keys_per_pass", [3, 10**6])
def test_repeated_keys_are_found_whatever_the_number_of_passes(tmp_path, keys_per_pass):
    rng = np.random.default_rng(0)
    tables = []
    for number in range(6):
        tables.append(tmp_path / f"{number}.crc.npy")
        write_checksums(tables[-1], {f"{key}": 0 for key in rng.choice(60, 8, replace=False)})
    everything = np.concatenate([np.load(path) for path in tables])
    assert everything.dtype == CHECKSUM
    hashes, counts = np.unique(everything["key"], return_counts=True)
    assert repeated_hashes(tables, keys_per_pass=keys_per_pass).tolist() == hashes[counts > 1].tolist()
    assert set(hashes) <= {hash_key(str(key)) for key in range(60)}


def write_cache(folder, features):
    CacheDescription(
        encoders={}, precision={}, resolution=16, buckets=[[16, 16]], bucket_step=None, max_aspect_ratio=2.0,
        flipped=False, latents_std=False, source="", groups=["00000"],
    ).write(folder)  # fmt: skip
    write_shard(folder, 0, {key: {"safetensors": data, "txt": "a"} for key, data in features.items()})


def features(value=0.0, size=4):
    tensors = {"latents_mean": torch.full((4, 2, size), value), "image_features": torch.zeros(8)}
    return save({name: tensor.half() for name, tensor in tensors.items()})


def test_cached_features_must_be_finite_and_laid_out_alike(tmp_path):
    good = {str(i): features(float(i)) for i in range(3)}
    write_cache(tmp_path / "good", good)
    assert validate(tmp_path / "good") == 0
    bad = {"nan": features(float("nan")), "large": features(size=6), "cut": features()[:-2]}
    write_cache(tmp_path / "bad", good | bad)
    assert validate(tmp_path / "bad") == 1
    reasons = {sample["key"]: sample["why"] for sample in report(tmp_path / "bad")["bad_samples"]}
    assert reasons.pop("nan") == "its latents_mean are not finite"
    assert reasons.pop("large") == "its features are laid out unlike those of its neighbours"
    assert list(reasons) == ["cut"]


def test_features_that_nothing_describes_are_refused(tmp_path):
    write_cache(tmp_path, {"a": features()})
    (tmp_path / "cache.json").unlink()
    assert validate(tmp_path) == 1
    assert "cache.json is missing" in report(tmp_path)["problems"][0]


def test_an_exclude_list_that_cannot_be_read_is_said_at_once(shards, capfd):
    (shards / "exclude-mine.txt").write_text("no slash\n")
    assert validate(shards) == 2
    assert "exclude-mine.txt: line 1 is 'no slash'" in capfd.readouterr().err
    assert not list(shards.glob("*.crc.npy"))


def test_everything_may_lie_in_a_folder_of_its_own(shards, tmp_path, capfd):
    there = set(shards.iterdir())
    assert validate(shards, "--index-dir", tmp_path / "index") == 0
    assert set(shards.iterdir()) == there
    twin = write_shards(tmp_path / "twin")
    assert validate(shards, twin, "--index-dir", tmp_path / "index", "--write-exclude") == 2
    assert "--write-exclude: shards of several folders have one name" in capfd.readouterr().err
