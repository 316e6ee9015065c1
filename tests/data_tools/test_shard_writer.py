"""Shards are complete and indexable, or not there."""

import pytest

from data_tools.shard_writer import open_shard, read_stats
from ipa_train.data.index import build_index
from ipa_train.data.reader import ShardReader
from ipa_train.errors import DataError
from tests.data.conftest import encode, picture

SAMPLES = {f"sample{i}": {"jpg": encode(picture(i)), "txt": f"picture {i}".encode()} for i in range(5)}


def write(path):
    with open_shard(path) as writer:
        for key, members in SAMPLES.items():
            writer.write(key, members)


def write_badly(path):
    with open_shard(path) as writer:
        writer.write("a", SAMPLES["sample0"])
        writer.write("b", None)


def test_written_shards_are_indexed_and_read(tmp_path):
    write(tmp_path / "00000.tar")
    index = build_index(str(tmp_path))
    reader = ShardReader(index)
    found = {key: (data, text) for data, text, key, _ in (reader.read(0, row) for row in range(index.counts[0]))}
    assert found == {key: (members["jpg"], members["txt"].decode()) for key, members in SAMPLES.items()}


def test_the_same_samples_make_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        write(tmp_path / f"{name}.tar")
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()


def test_a_failure_leaves_nothing(tmp_path):
    with pytest.raises(TypeError):
        write_badly(tmp_path / "00000.tar")
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_mark_is_one_line_with_its_cure(tmp_path):
    write(tmp_path / "00000.tar")
    assert read_stats(tmp_path / "00000.tar") == (5, {})
    (tmp_path / "00000_stats.json").write_text("{")
    with pytest.raises(DataError, match=r"00000_stats\.json: damaged; delete it, and its shard is written anew"):
        read_stats(tmp_path / "00000.tar")
