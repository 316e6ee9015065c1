"""The index tool reports every shard it refuses, and indexes the rest."""

import json

import pytest

from ipa_train.cli.main import main
from ipa_train.data.index import build_index
from tests.data.conftest import encode, paired_sample, picture, write_shard


def run(*arguments):
    return main(["data", "index", *map(str, arguments)])


def report(folder):
    return json.loads((folder / "index-report.json").read_text())


def test_refused_shards_are_problems_and_the_rest_is_indexed(shards):
    (shards / "00000_stats.json").unlink()
    whole = (shards / "00001.tar").read_bytes()
    (shards / "00001.tar").write_bytes(whole[:3000])
    assert run(shards) == 1
    first, second = report(shards)["problems"]
    assert "00000.tar: no 00000_stats.json" in first
    assert "00001.tar: truncated" in second
    assert report(shards)["counts"]["shards refused"] == 2
    assert (shards / "00002.idx.npy").exists()
    (shards / "00001.tar").write_bytes(whole)
    assert run(shards, "--allow-missing-stats") == 0
    assert report(shards)["counts"]["samples"] == 21


def test_what_is_left_out_is_counted_and_no_problem(shards):
    write_shard(shards, 1, {"a": {"jpg": encode(picture(0)), "txt": "a"}, "b": {"jpg": encode(picture(1))}})
    (shards / "exclude-a.txt").write_text("00000.tar/000000000\n")
    assert run(shards) == 0
    counts = report(shards)["counts"]
    assert counts["samples"] == 6 + 1 + 9
    assert (counts["incomplete samples left out"], counts["samples left out by exclude lists"]) == (1, 1)


def test_the_report_lies_with_the_index(shards, tmp_path):
    assert run(shards, "--index-dir", tmp_path / "index") == 0
    assert report(tmp_path / "index")["ok"]
    assert not list(shards.glob("*-report.json"))


def test_training_finds_the_index_of_what_it_needs(tmp_path):
    samples = {f"{n:05d}": paired_sample(n) for n in range(5)}
    del samples["00000"]["npy"], samples["00001"]["mask.png"]
    write_shard(tmp_path, 0, samples)
    assert run(tmp_path, "--needs", "embedding", "reference") == 0
    counts = report(tmp_path)["counts"]
    assert (counts["samples"], counts["incomplete samples left out"]) == (4, 1)
    rows = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.idx.npy")}
    index = build_index(str(tmp_path), extras=["reference", "embedding"])
    assert index.index_id == json.loads((tmp_path / "index-report.json").read_text())["index_id"]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.idx.npy")} == rows


@pytest.mark.parametrize("workers", ["0", "-1"])
def test_no_workers_are_refused(shards, capfd, workers):
    assert run(shards, "--workers", workers) == 2
    assert f"--workers must be at least 1, got {workers}" in capfd.readouterr().err
