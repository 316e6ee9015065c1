"""Pictures and captions become shards, byte for byte; what cannot is named."""

import csv
import json
import subprocess
import sys
import tarfile
import time
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_tools.pack_list import read_list, write_list
from data_tools.pack_sources import find_entries
from ipa_train.cli.main import main
from ipa_train.data.index import build_index
from tests.data.conftest import encode, mask, npy, picture


@pytest.fixture
def photos(tmp_path):
    """Seven pictures with captions beside them, two of them in a folder below."""
    folder = tmp_path / "photos"
    (folder / "below").mkdir(parents=True)
    for i in range(7):
        path = folder / ("below" if i > 4 else "") / f"{i}.{'PNG' if i == 3 else 'jpg'}"
        path.write_bytes(encode(picture(i), "PNG" if i == 3 else "JPEG"))
        path.with_suffix(".txt").write_text(f"picture {i}\n")
    return folder


def pack(*sources, out, **options):
    flags = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    return main(["data", "pack", *map(str, sources), "--out", str(out), "--workers", "1", *flags])


def packed(out):
    """All samples by key, from an independent reader."""
    samples = {}
    for path in sorted(out.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, suffix = member.name.partition(".")
                samples.setdefault(key, {})[suffix] = tar.extractfile(member).read()
    return samples


def report(out):
    return json.loads((out / "pack-report.json").read_text())


def test_a_folder_byte_for_byte(photos, tmp_path):
    out = tmp_path / "out"
    assert pack(photos, out=out, shard_size=3) == 0
    assert build_index(str(out)).counts.tolist() == [3, 3, 1]
    samples = packed(out)
    assert sorted(samples) == [f"{i:09d}" for i in range(7)]
    for members in samples.values():
        facts = json.loads(members["json"])
        source = photos / facts["source"]
        assert members[source.suffix[1:].lower()] == source.read_bytes()
        assert members["txt"].decode() == facts["caption"] == source.with_suffix(".txt").read_text().strip()


def add_extras(folder, stem, *, size=(60, 44)):
    """A reference with its mask, and an embedding; none has anything to do with the picture's own size."""
    width, height = size
    (folder / f"{stem}.ref.PNG").write_bytes(encode(picture(90, width=width, height=height), "PNG"))
    (folder / f"{stem}.mask.png").write_bytes(mask(44, 60))
    (folder / f"{stem}.npy").write_bytes(npy(np.ones(3, np.float16)))


def test_references_masks_and_embeddings_lie_beside_their_picture(photos, tmp_path):
    add_extras(photos, "0")
    add_extras(photos / "below", "5")
    add_extras(photos, "2", size=(60, 40))
    (photos / "lonely.npy").write_bytes(b"")
    assert pack(photos, out=tmp_path / "out", max_bad_rate=0.5) == 0
    samples = packed(tmp_path / "out")
    with_extras = [key for key, members in samples.items() if "npy" in members]
    assert [json.loads(samples[key]["json"])["source"] for key in with_extras] == ["0.jpg", "below/5.jpg"]
    for key in with_extras:
        assert samples[key].keys() == {"jpg", "txt", "json", "ref.png", "mask.png", "npy"}
        assert samples[key]["ref.png"] == (photos / "0.ref.PNG").read_bytes()
    (bad,) = report(tmp_path / "out")["bad"]
    assert bad.endswith("2.jpg: its mask has 60 x 44 pixels, the picture it is for 60 x 40")
    assert report(tmp_path / "out")["counts"][".npy files ignored"] == 1
    index = build_index(str(tmp_path / "out"), extras=["reference", "mask", "embedding"])
    assert index.counts.tolist() == [2]


def test_what_lies_beside_a_reference_is_not_lost_without_a_word(photos, tmp_path):
    add_extras(photos, "0")
    (photos / "0.ref.mask.png").write_bytes(mask(44, 60))
    (photos / "0.ref.npy").write_bytes(npy(np.ones(3, np.float16)))
    assert pack(photos, out=tmp_path / "out", max_bad_rate=0.5) == 0
    assert report(tmp_path / "out")["counts"][".npy files ignored"] == 1
    (bad,) = report(tmp_path / "out")["bad"]
    assert bad.endswith("without a caption: " + str(photos / "0.ref.mask.png"))


def test_two_references_of_one_picture_are_refused(photos, tmp_path, capfd):
    add_extras(photos, "0")
    (photos / "0.ref.jpg").write_bytes(encode(picture(9)))
    assert pack(photos, out=tmp_path / "out") == 2
    assert "0.ref.jpg: another reference of 0 lies beside it; keep one." in capfd.readouterr().err


@pytest.mark.parametrize("suffix", [".json", ".csv", ".parquet"])
def test_columns_of_a_table_name_them_too(photos, tmp_path, suffix):
    """The same picture and caption with another reference is another sample."""
    add_extras(photos, "0")
    rows = [
        {"image_file": "1.jpg", "text": "one", "other": "0.ref.PNG", "face": "0.npy"},
        {"image_file": "1.jpg", "text": "one", "other": "2.jpg", "face": "0.npy"},
        {"image_file": "1.jpg", "text": "one", "other": "gone.jpg", "face": "0.npy"},
        {"image_file": "1.jpg", "text": "one", "other": "2.jpg", "face": "2.txt"},
    ]
    listed = table(photos / f"list{suffix}", rows)
    options = {"reference_column": "other", "embedding_column": "face", "max_bad_rate": 0.5}
    assert pack(listed, out=tmp_path / "out", **options) == 0
    first, second = packed(tmp_path / "out").values()
    assert first["ref.png"] == (photos / "0.ref.PNG").read_bytes()
    assert second["ref.jpg"] == (photos / "2.jpg").read_bytes()
    assert first["npy"] == second["npy"] == (photos / "0.npy").read_bytes()
    gone, wrong = report(tmp_path / "out")["bad"]
    assert "missing or unreadable references: gone.jpg: No such file" in gone.replace(f"{photos}/", "")
    assert wrong.endswith("its embedding is no array of numpy.save")


@pytest.mark.parametrize("suffix", [".json", ".csv", ".parquet"])
def test_a_column_is_for_one_thing(photos, tmp_path, capfd, suffix):
    listed = table(photos / f"list{suffix}", [{"image_file": "1.jpg", "text": "one"}])
    assert pack(listed, out=tmp_path / "out", reference_column="image_file") == 2
    assert "column 'image_file' is named by two options; give each a column of its own" in capfd.readouterr().err


def table(path, rows):
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    return path


@pytest.mark.parametrize("suffix", [".json", ".csv", ".parquet"])
def test_lists_and_tables_keep_their_other_columns(photos, tmp_path, suffix):
    rows = [{"image_file": f"{i}.jpg", "text": f'a "quoted",\nbroken {i}', "score": i / 2} for i in (0, 1, 2, 4)]
    out = tmp_path / "out"
    assert pack(table(tmp_path / f"list{suffix}", rows), out=out, image_root=photos) == 0
    for row, members in zip(rows, packed(out).values(), strict=True):
        assert members["jpg"] == (photos / row["image_file"]).read_bytes()
        assert members["txt"].decode() == row["text"]
        assert float(json.loads(members["json"])["score"]) == row["score"]
    beside = pq.read_table(out / "00000.parquet").to_pylist()
    assert [(row["key"], row["caption"], float(row["score"])) for row in beside] == [
        (key, members["txt"].decode(), float(json.loads(members["json"])["score"]))
        for key, members in packed(out).items()
    ]


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_what_cannot_be_packed_is_left_out_by_name(photos, tmp_path, suffix):
    (photos / "cut.jpg").write_bytes((photos / "0.jpg").read_bytes()[:-200])
    names = ["0.jpg", "none.jpg", "cut.jpg", "a.gif", "", "1.jpg", "2.jpg", "0.jpg", "0.jpg"]
    captions = ["one", "a", "a", "a", "a", "", "bad", "one", "another of the same picture"]
    path = table(
        tmp_path / f"list{suffix}", [{"image_file": n, "text": c} for n, c in zip(names, captions, strict=True)]
    )
    if suffix == ".csv":
        path.write_bytes(path.read_bytes().replace(b"bad", b"b\xff") + b"one,two,three\n")
    else:
        captions = pa.array([c.replace("bad", "b\udcff").encode(errors="surrogateescape") for c in captions])
        pq.write_table(pa.table({"image_file": names, "text": captions}), path)
    out = tmp_path / "out"
    assert pack(path, out=out, image_root=photos) == 1
    assert sorted(packed(out)) == ["000000000", "000000008"]
    assert [line.replace(f"{photos}/", "") for line in report(out)["bad"]] == [
        "00000.tar/000000001: missing or unreadable pictures: none.jpg: No such file or directory",
        "00000.tar/000000002: damaged pictures: cut.jpg: cannot decode: Premature end of JPEG file",
        "00000.tar/000000003: pictures of other kinds than jpg/jpeg/png/webp: a.gif",
        f"00000.tar/000000004: without a picture's name: {photos}: {{}}",
        "00000.tar/000000005: without a caption: 1.jpg",
        "00000.tar/000000006: captions not in UTF-8: 2.jpg",
    ]
    counts = report(out)["counts"]
    assert counts | {"samples": 2, "damaged pictures": 1, "entries that came before": 1} == counts
    malformed = "left out: 1 table rows with too few or too many columns"
    assert (malformed in report(out)["problems"]) == (suffix == ".csv")


def test_a_folder_says_what_it_did_not_take(photos, tmp_path):
    (photos / "0.txt").unlink()
    (photos / "old.gif").write_bytes(b"GIF89a")
    (photos / "lonely.txt").write_text("no picture")
    (photos / "link").symlink_to(photos / "below", target_is_directory=True)
    assert pack(photos, photos / "below", out=tmp_path / "out") == 1
    counts = report(tmp_path / "out")["counts"]
    assert counts["samples"] == 6
    for kind in (
        ".gif files ignored",
        "captions without a picture",
        "linked folders not followed",
        "without a caption",
    ):
        assert counts[kind] == 1
    assert counts["entries that came before"] == 2


def test_a_rerun_packs_only_what_is_missing_and_notices_a_changed_list(photos, tmp_path, capfd):
    out = tmp_path / "out"
    pack(photos, out=out, shard_size=3)
    whole = {path.name: path.read_bytes() for path in out.iterdir()}
    untouched = (out / "00000.tar").stat().st_mtime_ns
    (out / "00001_stats.json").unlink()  # killed before the mark was written
    (out / "00002.tar").unlink()
    assert pack(photos, out=out, shard_size=3) == 0
    assert (out / "00000.tar").stat().st_mtime_ns == untouched
    assert (
        report(out)["counts"] | {"samples": 7, "shards written": 2, "shards already there": 1} == report(out)["counts"]
    )
    assert {path.name for path in out.iterdir()} == set(whole)
    assert all((out / name).read_bytes() == data for name, data in whole.items() if name != "pack-report.json")
    (photos / "below" / "6.jpg").unlink()
    assert pack(photos, out=out, shard_size=3) == 2
    shown = capfd.readouterr().err
    assert "entries was 7, now 6" in shown
    assert "give another folder, or delete this one" in shown


def test_a_shard_without_one_good_sample_is_not_written(photos, tmp_path):
    (photos / "below" / "6.jpg").write_bytes(b"")
    out = tmp_path / "out"
    assert pack(photos, out=out, shard_size=6) == 1
    assert [path.name for path in out.glob("*.tar")] == ["00000.tar"]
    assert "none of its 1 samples can be packed, first damaged pictures" in report(out)["problems"][0]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "[1]", "must be a list like"),
        ("a.json", "{", "not JSON"),
        ("a.csv", "", "cannot be read"),
        ("a.csv", "image_fil,text\na.jpg,b\n", "no column 'image_file'. Did you mean 'image_fil'?"),
        ("a.csv", "image_file,text,text\na.jpg,b,c\n", "'text' comes more than once"),
        ("a.csv", "image_file,text\n", "there is no picture"),
        ("a.parquet", "no parquet", "cannot be read"),
        ("a.xlsx", "", "cannot pack a .xlsx"),
        ("missing.csv", None, "no such file or folder"),
    ],
)
def test_a_source_that_cannot_be_read_is_one_line(tmp_path, capfd, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    assert pack(tmp_path / name, out=tmp_path / "out") == 2
    shown = capfd.readouterr().err
    assert message in shown
    assert shown.count("\n") == 1
    assert list((tmp_path / "out").iterdir()) == []


def test_other_peoples_shards_are_not_mixed_with(photos, tmp_path, capfd):
    (tmp_path / "00000.tar").touch()
    assert pack(photos, out=tmp_path) == 2
    assert "holds shards, and no pack.json says what they are" in capfd.readouterr().err


def test_a_worker_reads_its_row_group_alone(photos, tmp_path):
    options = {"image_root": None, "image_column": "", "caption_column": "", "caption_suffix": ".txt"}
    entries = list(find_entries(photos, ignored=Counter(), extra_columns={}, **options))
    listed = write_list(tmp_path / "list", iter(entries), shard_size=4)
    assert pq.ParquetFile(listed.path).num_row_groups == 2
    assert read_list(listed.path, 0) + read_list(listed.path, 1) == entries


def test_a_killed_run_goes_on_to_the_same_shards(photos, tmp_path):
    command = [sys.executable, "-m", "ipa_train.cli.main", "data", "pack", str(photos), "--shard-size", "1"]
    command += ["--workers", "1", "--out"]
    assert main([*command[3:], str(tmp_path / "whole")]) == 0
    out = tmp_path / "killed"
    process = subprocess.Popen([*command, str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (out / "00001.tar").exists():
        time.sleep(0.001)
    process.kill()
    process.wait()
    assert main([*command[3:], str(out)]) == 0
    shards = sorted((tmp_path / "whole").glob("0*"))
    assert [path.read_bytes() for path in shards] == [(out / path.name).read_bytes() for path in shards]
