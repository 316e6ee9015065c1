"""Features are read straight into their places, wherever in the tar a caption lies, and never half."""

import io
import tarfile

import numpy as np
import pytest

from ipa_train.data.index import build_index
from ipa_train.data.reader import ShardReader
from ipa_train.errors import DataError

NUM_SAMPLES, NUM_BYTES = 3, 3000
FEATURES = {
    (name, i): np.random.default_rng([len(name), i]).bytes(NUM_BYTES)
    for name in ("safetensors", "flipped.safetensors")
    for i in range(NUM_SAMPLES)
}


def write_features(folder, suffixes):
    """A shard whose samples hold their members in the order of ``suffixes``."""
    folder.mkdir()
    with tarfile.open(folder / "00000.tar", "w") as tar:
        for i in range(NUM_SAMPLES):
            for suffix in suffixes:
                data = FEATURES.get((suffix, i), bytes(100_000) if suffix == "json" else f" caption {i} ".encode())
                member = tarfile.TarInfo(f"key{i}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return ShardReader(build_index(str(folder), allow_missing_stats=True))


def read(reader, row, *, flipped=False):
    first, second = bytearray(1000), bytearray(2000)
    found = reader.read_into(0, row, (first, memoryview(second)), num_bytes=NUM_BYTES, flipped=flipped)
    return found, bytes(first + second)


ORDERS = [
    ("safetensors", "txt"),
    ("flipped.safetensors", "safetensors", "txt"),
    ("txt", "safetensors", "flipped.safetensors"),
    ("safetensors", "json", "txt"),
]


@pytest.mark.parametrize("suffixes", ORDERS)
def test_features_and_captions_are_found_in_any_order(tmp_path, suffixes):
    reader = write_features(tmp_path / "shards", suffixes)
    for i in (2, 0, 1):
        assert read(reader, i) == ((f"caption {i}", f"key{i}"), FEATURES["safetensors", i])
        if "flipped.safetensors" in suffixes:
            flipped = read(reader, i, flipped=True)
            assert flipped == ((f"caption {i}", f"key{i}"), FEATURES["flipped.safetensors", i])
        else:
            with pytest.raises(DataError, match="has no flipped features: encode with --flip"):
                read(reader, i, flipped=True)


@pytest.mark.parametrize("suffixes", ORDERS)
def test_a_sample_that_is_cut_anywhere_is_an_error(tmp_path, suffixes):
    reader = write_features(tmp_path / "shards", suffixes)
    (path,) = (tmp_path / "shards").glob("*.tar")
    whole, last = path.read_bytes(), reader.index.shards[0].rows()[-1]
    end = int(last["offset"]) + int(last["length"])
    for cut in (end - 1, end - int(last["text_length"]), end - 700, end - NUM_BYTES - 600, int(last["offset"])):
        path.write_bytes(whole[:cut])
        with pytest.raises(DataError, match=r"truncated since it was indexed: \d+ of \d+ bytes"):
            read(reader, NUM_SAMPLES - 1, flipped=suffixes[-1] == "flipped.safetensors")
    path.write_bytes(whole[:end])
    assert read(reader, NUM_SAMPLES - 1)[0] == ("caption 2", "key2")


def test_features_of_another_length_are_an_error(tmp_path):
    reader = write_features(tmp_path / "shards", ORDERS[0])
    with pytest.raises(DataError, match="its features are 3000 bytes long, unlike those of its neighbours"):
        reader.read_into(0, 0, (bytearray(10),), num_bytes=10, flipped=False)
