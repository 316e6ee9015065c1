"""Metadata filtered by rules: what is kept, what is counted, and what is refused."""

import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_tools import filter as tool
from data_tools import rules
from ipa_train.cli.main import load_verb
from ipa_train.data.index import build_index
from ipa_train.errors import ConfigError, DataError
from tests.data.conftest import write_shards

ROWS = {
    "URL": [f"http://a/{i}.jpg" for i in range(6)],
    "TEXT": ["a cat", "a very long caption", "", None, "Zürich", "dog"],
    "WIDTH": [512, 100, 512, 512, None, 1000],
    "HEIGHT": [512, 100, 256, 600, 512, 100],
    "AESTHETIC_SCORE": [6.0, 6.0, 4.0, float("nan"), 7.0, 5.0],
    "punsafe": [0.0, 0.9, 0.1, 0.1, 0.2, 0.3],
}


def write_metadata(path, rows=ROWS, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(rows), path, **options)
    return path


def run(*args):
    verb, parser = load_verb("data")
    return verb.run(parser.parse_args(["filter", *map(str, args), "--workers", "1"]))


def urls(path):
    return [int(url.split("/")[-1][0]) for url in pq.read_table(path)["URL"].to_pylist()]


def report_of(folder):
    return json.loads((folder / "filter-report.json").read_text())


@pytest.mark.parametrize(
    ("rule", "kept"),
    [
        (["--min-size", 256], [0, 2, 3]),
        (["--min-size", 256, "--keep-null"], [0, 2, 3, 4]),
        (["--min-pixels", 100 * 1000], [0, 2, 3, 5]),
        (["--max-aspect-ratio", 2], [0, 1, 2, 3]),
        (["--min-aesthetic", 5], [0, 1, 4, 5]),
        (["--min-aesthetic", 5, "--keep-null"], [0, 1, 3, 4, 5]),
        (["--max-unsafe", 0.2], [0, 2, 3, 4]),
        (["--min-caption-length", 4], [0, 1, 4]),
        (["--max-caption-length", 6], [0, 2, 4, 5]),
        (["--min-size", 256, "--max-unsafe", 0.1, "--min-aesthetic", 5], [0]),
    ],
)
def test_rules_keep_what_they_say(tmp_path, rule, kept):
    write_metadata(tmp_path / "in/0.parquet")
    assert run(tmp_path / "in", "--out", tmp_path / "out", *rule) == 0
    assert urls(tmp_path / "out/0.parquet") == kept
    assert report_of(tmp_path / "out")["counts"] == {"read": 6, "kept": len(kept), "files": 1}


@pytest.mark.parametrize(
    ("column", "rule"),
    [
        ("original_width", ["--min-size", 300]),
        ("Aesthetic", ["--min-aesthetic", 5]),
        ("aesthetic_score_laion_v2", ["--min-aesthetic", 5]),
        ("prediction", ["--min-aesthetic", 5]),
        ("pwatermark", ["--max-watermark", 5]),
        ("SIMILARITY", ["--min-similarity", 5]),
        ("clip_similarity_vitb32", ["--min-similarity", 5]),
    ],
)
def test_columns_have_many_names(tmp_path, column, rule):
    values = {"original_width": [200, 400]}.get(column, [4, 6])
    write_metadata(tmp_path / "0.parquet", {column: values, "width": [299, 299], "HEIGHT": [400, 400]})
    assert run(tmp_path / "0.parquet", "--out", tmp_path / "out", *rule) == 0
    kept = pq.read_table(tmp_path / "out/0.parquet")[column].to_pylist()
    assert kept == ([4] if rule[0] == "--max-watermark" else values[1:])


def test_every_rule_is_counted_alone_and_in_the_chain(tmp_path, monkeypatch):
    monkeypatch.setattr(rules, "_BATCH_ROWS", 2)
    monkeypatch.setattr(tool, "_ROW_GROUP_ROWS", 2)
    write_metadata(tmp_path / "in/0.parquet", row_group_size=3)
    write_metadata(tmp_path / "in/1.parquet")
    assert run(tmp_path / "in", "--out", tmp_path / "out", "--min-aesthetic", 5, "--min-size", 200) == 0
    report = report_of(tmp_path / "out")
    assert report["rules"] == {
        "min_size": {"rejects alone": 6, "kept after": 6, "null": 2},
        "min_aesthetic": {"rejects alone": 4, "kept after": 2, "null": 2},
    }
    assert report["limits"] == {"min_size": 200, "min_aesthetic": 5}
    assert urls(tmp_path / "out/0.parquet") == urls(tmp_path / "out/1.parquet") == [0]


def test_a_rerun_does_what_is_missing_and_counts_all(tmp_path):
    args = (tmp_path / "in", "--out", tmp_path / "out", "--min-size", 256)
    write_metadata(tmp_path / "in/0.parquet")
    assert run(*args) == 0
    before = (tmp_path / "out/0.parquet").stat().st_mtime_ns
    write_metadata(tmp_path / "in/1.parquet")
    assert run(*args) == 0
    assert (tmp_path / "out/0.parquet").stat().st_mtime_ns == before
    report = report_of(tmp_path / "out")
    assert (report["num_done_before"], report["counts"]) == (1, {"read": 12, "kept": 6, "files": 1})
    os.utime(tmp_path / "in/0.parquet", ns=(1, 1))  # the input is another now
    assert run(*args) == 0
    assert report_of(tmp_path / "out")["num_done_before"] == 1


def test_the_output_can_be_filtered_again(tmp_path):
    write_metadata(tmp_path / "in/0.parquet")
    assert run(tmp_path / "in", "--out", tmp_path / "a", "--min-size", 256) == 0
    args = (tmp_path / "a/0.parquet", "--out", tmp_path / "b", "--max-unsafe", 0)
    assert run(*args) == 0
    assert run(*args) == 0
    assert urls(tmp_path / "b/0.parquet") == [0]


def test_a_damaged_file_does_not_end_the_work_on_the_others(tmp_path):
    data = write_metadata(tmp_path / "in/0.parquet").read_bytes()
    (tmp_path / "in/1.parquet").write_bytes(data[:-30])
    (tmp_path / "in/2.parquet").write_bytes(data[:4] + bytes(200) + data[204:])
    write_metadata(tmp_path / "in/3.parquet")
    assert run(tmp_path / "in", "--out", tmp_path / "out", "--min-size", 256) == 1
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "0.parquet",
        "3.parquet",
        "filter-report.json",
    ]
    problems = report_of(tmp_path / "out")["problems"]
    assert [name in text for name, text in zip(("1.parquet", "2.parquet"), problems, strict=True)] == [True, True]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["in", "--out", "out"], "give a rule at least: --min-size, "),
        (["in", "--out", "out", "--max-watermark", 1], "--max-watermark needs a column pwatermark or .*; it has URL, "),
        (["in", "in2", "--out", "out", "--min-size", 1], "2 files are named 0.parquet"),
        (["none", "--out", "out", "--min-size", 1], "METADATA=none: 1 of 1 files missing"),
        (["in", "--out", "in", "--min-size", 1], "0.parquet is there and was not written by this tool"),
        (["in", "--out", "done", "--min-size", 1], "other rules, --min-size 256 and not --min-size 1: give another"),
        (["in", "--out", "done", "--min-size", 256, "--keep-null"], "not --min-size 256 --keep-null"),
        (["in", "--out", "in/0.parquet/x", "--min-size", 1], "--out in/0.parquet/x: cannot be made: Not a directory"),
        (["in", "--out", "new", "--min-size", 1, "--index-dir", "x"], "--index-dir goes with --exclude"),
        (["in", "--exclude", "--min-size", 1], "0.parquet has no 0.tar beside it"),
    ],
)
def test_mistakes_are_refused_in_one_line(tmp_path, monkeypatch, args, message):
    monkeypatch.chdir(tmp_path)
    for folder in ("in", "in2"):
        write_metadata(tmp_path / folder / "0.parquet")
    assert run("in", "--out", "done", "--min-size", 256) == 0
    with pytest.raises(ConfigError, match=message):
        run(*args)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


@pytest.fixture
def downloaded(tmp_path):
    """Two shards of 4 and 3 samples with img2dataset's parquet; one row of each was not downloaded."""
    folder = write_shards(tmp_path / "shards", (4, 3))
    for number, count in enumerate((4, 3)):
        keys = [f"{number:05d}{i:04d}" for i in range(count)]
        rows = {"key": [*keys, "gone"], "status": ["success"] * count + ["failed_to_download"]}
        rows |= {"punsafe": [*np.linspace(0, 0.9, count), 1.0], "original_width": [*range(count), None]}
        write_metadata(folder / f"{number:05d}.parquet", rows)
    return folder


def test_shards_are_filtered_by_an_exclude_list(downloaded):
    assert run(downloaded, "--exclude", "--max-unsafe", 0.5) == 0
    assert (downloaded / "exclude-filter.txt").read_text().splitlines()[1:] == [
        "00000.tar/000000002",
        "00000.tar/000000003",
        "00001.tar/000010002",
    ]
    assert list(build_index(str(downloaded)).counts) == [2, 2]
    assert report_of(downloaded)["counts"] == {"read": 7, "not downloaded": 2, "kept": 4}
    before = (downloaded / "exclude-filter.txt").read_bytes()
    assert run(downloaded, "--exclude", "--max-unsafe", 0.5) == 0
    assert (downloaded / "exclude-filter.txt").read_bytes() == before
    with pytest.raises(ConfigError, match=r"excludes samples of 00000\.tar too, which was not named"):
        run(downloaded / "00001.parquet", "--exclude", "--max-unsafe", 0.5)
    lists = downloaded / "lists"
    assert run(downloaded, "--exclude", "--max-unsafe", 0.5, "--index-dir", lists) == 0
    assert (lists / "exclude-filter.txt").read_bytes() == before


def test_a_list_is_not_mixed_nor_half_written(downloaded):
    (downloaded / "00001.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"00001\.parquet: not a sound parquet"):
        run(downloaded, "--exclude", "--max-unsafe", 0.5)
    assert not list(downloaded.glob("*exclude*"))
    (downloaded / "exclude-filter.txt").write_text("00000.tar/a\n")
    with pytest.raises(ConfigError, match="not written by this tool"):
        run(downloaded, "--exclude", "--max-unsafe", 0.5)
