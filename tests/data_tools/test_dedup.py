"""Duplicates are found among strangers, the largest stays, and no work is done twice."""

import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from data_tools import near_duplicates
from data_tools.near_duplicates import find_leaders
from ipa_train.cli.main import load_verb
from ipa_train.data.index import build_index
from ipa_train.errors import ConfigError
from tests.data.conftest import encode, write_shard


def photo(seed, width=160, height=120):
    """Random, with the spectrum of photographs: amplitude falls as 1/frequency."""
    noise = np.fft.rfft2(np.random.default_rng(seed).standard_normal((height, width, 3)), axes=(0, 1))
    frequency = np.hypot(np.fft.fftfreq(height)[:, None] * height, np.fft.rfftfreq(width)[None] * width)
    frequency[0, 0] = 1
    signal = np.fft.irfft2(noise / frequency[..., None], s=(height, width), axes=(0, 1))
    signal = (signal - signal.mean()) / signal.std() * 50 + 128
    return Image.fromarray(signal.clip(0, 255).astype(np.uint8))


def crop(image, part):
    width, height = image.size
    return image.crop((int(width * part), int(height * part), int(width * (1 - part)), int(height * (1 - part))))


def half(image):
    return image.resize((image.width // 2, image.height // 2))


def write(folder, number, pictures):
    """A shard of {key: picture or bytes}."""
    samples = {
        key: {"jpg": picture if isinstance(picture, bytes) else encode(picture, quality=92), "txt": key}
        for key, picture in pictures.items()
    }
    return write_shard(folder, number, samples)


def run(*args):
    verb, parser = load_verb("data")
    return verb.run(parser.parse_args(["dedup", *map(str, args), "--workers", "1"]))


def left_out(folder):
    lines = (folder / "exclude-dedup.txt").read_text().splitlines()
    assert lines[0].startswith("#")
    return [line.partition("/")[2] for line in lines[1:]]


def report_of(folder):
    return json.loads((folder / "dedup-report.json").read_text())


def test_duplicates_are_found_among_strangers(tmp_path):
    num_photos = 40
    photos = [photo(seed) for seed in range(num_photos)]
    write(tmp_path, 0, {f"original{i}": image for i, image in enumerate(photos)})
    write(tmp_path, 1, {f"q50-{i}": encode(image, quality=50) for i, image in enumerate(photos)})
    write(tmp_path, 2, {f"half-{i}": half(image) for i, image in enumerate(photos)})
    write(tmp_path, 3, {f"png-{i}": encode(image, "PNG") for i, image in enumerate(photos)})
    write(tmp_path, 4, {f"crop-{i}": crop(image, 0.01) for i, image in enumerate(photos)})
    assert run(tmp_path) == 0
    excluded = left_out(tmp_path)
    found = Counter(key.partition("-")[0] for key in excluded)
    assert not any(key.startswith("original") for key in excluded)  # the largest, and first
    assert (found["q50"], found["png"], found["half"]) == (num_photos, num_photos, num_photos)
    assert found["crop"] >= 0.75 * num_photos  # 1 % off each side
    for pair in report_of(tmp_path)["examples"]:
        assert pair["kept"].split("original")[1] == pair["left_out"].split("-")[-1]  # no strangers


def test_the_largest_stays_else_the_first(tmp_path):
    image = photo(0)
    write(tmp_path, 0, {"a": half(image), "b": encode(image, quality=70), "stranger": photo(1)})
    write(tmp_path, 1, {"c": encode(image, quality=92), "d": encode(image, quality=70)})
    assert run(tmp_path) == 0
    assert left_out(tmp_path) == ["a", "c", "d"]
    report = report_of(tmp_path)
    assert report["group_sizes"] == {"4": 1}
    assert (report["counts"]["equal bytes"], report["counts"]["near"], report["counts"]["kept"]) == (1, 2, 2)
    assert list(build_index(str(tmp_path)).counts) == [2, 0]


def test_plain_pictures_are_equal_by_their_bytes_alone(tmp_path):
    x = np.arange(160, dtype=np.uint8)
    gradient = np.broadcast_to(x[None, :, None], (120, 160, 3))
    plain = {colour: Image.new("RGB", (160, 120), colour) for colour in ("white", "black", "red", "#fefefe")}
    plain |= {"gradient": Image.fromarray(gradient), "steeper": Image.fromarray(gradient // 2)}
    write(tmp_path, 0, {**plain, "again": plain["red"], "tiny": Image.new("RGB", (1, 1))})
    assert run(tmp_path, "--max-distance", 8) == 0
    assert left_out(tmp_path) == ["again"]
    assert report_of(tmp_path)["counts"]["too plain to compare"] == 8


def test_every_folder_has_its_list_and_what_is_excluded_takes_no_part(tmp_path):
    write(tmp_path / "a", 0, {"x": half(photo(0)), "y": photo(1)})
    write(tmp_path / "b", 0, {"x": photo(0), "y": half(photo(1)), "z": photo(2)})
    (tmp_path / "a/exclude-filter.txt").write_text("00000.tar/y\n")
    for _ in range(2):  # its own list takes no part either, or a second run would find nothing
        assert run(tmp_path / "a", tmp_path / "b") == 0
        assert (left_out(tmp_path / "a"), left_out(tmp_path / "b")) == (["x"], [])
    assert report_of(tmp_path / "a")["counts"]["excluded before"] == 1


def test_shards_that_cannot_be_written_beside_have_their_list_with_their_index(tmp_path):
    write(tmp_path / "a", 0, {"x": half(photo(0)), "y": photo(1)})
    write(tmp_path / "b", 1, {"x": photo(0), "y": photo(2)})
    folders, lists = (tmp_path / "a", tmp_path / "b"), tmp_path / "lists"
    before = sorted(path for folder in folders for path in folder.iterdir())
    assert run(*folders, "--index-dir", lists) == run(*folders, "--index-dir", lists) == 0
    assert sorted(path for folder in folders for path in folder.iterdir()) == before
    assert left_out(lists) == ["x"]
    assert report_of(lists)["num_hashed_before"] == 2
    assert build_index([str(folder) for folder in folders], index_dir=lists).counts.tolist() == [1, 2]
    write(tmp_path / "c", 0, {"x": photo(3)})
    with pytest.raises(ConfigError, match=r"several folders have one name, and a list in .*lists could not tell"):
        run(*folders, tmp_path / "c", "--index-dir", lists)


def test_keys_that_no_list_can_hold_stay_and_are_a_problem(tmp_path):
    write(tmp_path, 0, {"photo": photo(1), "photo #1": photo(0), "photo #2": photo(0)})
    assert run(tmp_path) == 1
    assert left_out(tmp_path) == []
    assert "'photo #2': no list can hold this key" in str(report_of(tmp_path)["problems"])
    assert build_index(str(tmp_path)).counts.tolist() == [3]


def test_a_folder_named_by_two_paths_is_noticed(tmp_path):
    write(tmp_path / "a", 0, {"x": photo(1)})
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(ConfigError, match="more than once"):
        run(tmp_path / "a", tmp_path / "b")


def test_hashes_are_reused_until_the_shard_changes(tmp_path):
    for number in range(3):
        write(tmp_path, number, {f"{number}": photo(number)})
    assert run(tmp_path) == 0
    (tmp_path / "00000.hash.npz").write_bytes((tmp_path / "00000.hash.npz").read_bytes()[:100])  # a killed disk
    write(tmp_path, 1, {"new": photo(2)})
    assert run(tmp_path) == 0
    assert report_of(tmp_path)["num_hashed_before"] == 1
    assert left_out(tmp_path) == ["2"]


def test_what_cannot_be_read_is_named(tmp_path):
    data = encode(photo(0))
    write(tmp_path, 0, {"good": data, "cut": data[: len(data) // 2], "page": b"<html>"})
    cut = write(tmp_path, 1, {"copy": data, "x": data})
    cut.write_bytes(cut.read_bytes()[:4096])
    write(tmp_path, 2, {"nothing": b""})
    write_shard(tmp_path, 3, {"a": {"safetensors": b"x", "txt": "a"}})
    for _ in range(2):
        assert run(tmp_path) == 1
        report = report_of(tmp_path)
        truncated, features = report["problems"]
        assert str(cut) in truncated
        assert "holds cached features" in features
        assert [name.split("/")[-1].split(":")[0] for name in report["undecodable"]] == ["cut", "page", "nothing"]
        assert (report["counts"]["undecodable"], report["counts"]["pictures"], left_out(tmp_path)) == (3, 1, [])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["ds", "--max-distance", 9], "--max-distance must be from 0 to 8, got 9"),
        (["ds/00001.tar"], r"exclude-dedup.txt excludes samples of 00000.tar too, which was not named"),
        (["nothing"], "1 of 1 files missing"),
    ],
)
def test_mistakes_are_refused(tmp_path, monkeypatch, args, message):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "ds", 0, {"a": photo(0), "b": photo(0)})
    write(tmp_path / "ds", 1, {"a": photo(1)})
    assert run("ds") == 0
    with pytest.raises(ConfigError, match=message):
        run(*args)
    assert left_out(tmp_path / "ds") == ["b"]


@pytest.mark.parametrize("max_distance", [0, 1, 4, 8])
@pytest.mark.parametrize("part_rows", [2**24, 50])
def test_leaders_are_those_of_comparing_all_pairs(monkeypatch, max_distance, part_rows):
    monkeypatch.setattr(near_duplicates, "_PART_ROWS", part_rows)
    rng = np.random.default_rng(max_distance)
    hashes = rng.integers(0, 2**64, 20, dtype=np.uint64)[rng.integers(0, 20, 300)]
    for _ in range(6):
        hashes ^= (np.uint64(1) << rng.integers(0, 64, 300, dtype=np.uint64)) * rng.integers(0, 2, 300, dtype=np.uint64)
    pixels = rng.integers(1, 4, 300).astype(np.uint32)
    expected = np.full(300, -1)
    for i in np.lexsort((np.arange(300), -pixels.astype(int))):
        if expected[i] < 0:
            expected[(np.bitwise_count(hashes ^ hashes[i]) <= max_distance) & (expected < 0)] = i
    assert np.array_equal(find_leaders(hashes, pixels, max_distance), expected)
    assert 20 < len(np.unique(expected)) < 300


def test_chains_of_small_differences_join_no_strangers():
    chain = np.array([(1 << length) - 1 for length in range(0, 64, 3)], np.uint64)  # neighbours 3 bits apart
    leaders = find_leaders(chain, np.ones(len(chain), np.uint32), 4)
    assert np.bitwise_count(chain ^ chain[leaders]).max() <= 4
    assert len(np.unique(leaders)) == len(chain) // 2
