"""Every lost byte is noticed, and nothing dangerous is accepted."""

import io
import json
import os
import tarfile

import numpy as np
import pytest
from PIL import Image

from ipa_train.data.find import find_shards
from ipa_train.data.index import build_index
from ipa_train.data.reader import ShardReader
from ipa_train.data.tar import walk
from ipa_train.errors import ConfigError, DataError
from tests.data.conftest import encode, picture, write_shard, write_shards


def one_tar(tmp_path, members, **options):
    """A shard written by tarfile, for what webdataset's writer would not write."""
    path = tmp_path / "00000.tar"
    with tarfile.open(path, "w", **options) as tar:
        for info, data in members:
            info = tarfile.TarInfo(info) if isinstance(info, str) else info
            if data is not None:
                info.size = len(data)
            tar.addfile(info, io.BytesIO(data or b""))
    return path


def index(tmp_path):
    return build_index(str(tmp_path), allow_missing_stats=True)


def test_finds_and_reads_every_sample(shards):
    built = build_index(str(shards))
    assert built.counts.tolist() == [7, 5, 9]
    reader = ShardReader(built)
    for shard in range(3):
        with tarfile.open(built.shards[shard].path) as tar:
            for row in range(int(built.counts[shard])):
                image, caption, key, _ = reader.read(shard, row)
                assert image == tar.extractfile(f"{key}.jpg").read()
                assert caption == tar.extractfile(f"{key}.txt").read().decode()


def test_an_up_to_date_index_is_reused_and_a_changed_shard_is_not(shards):
    first = build_index(str(shards))
    times = {s.rows_path: s.rows_path.stat().st_mtime_ns for s in first.shards}
    assert build_index(str(shards)).index_id == first.index_id
    assert {p: p.stat().st_mtime_ns for p in times} == times
    write_shard(shards, 1, {"a": {"jpg": encode(picture(0)), "txt": "new"}})
    changed = build_index(str(shards))
    assert changed.counts.tolist() == [7, 1, 9]
    assert changed.index_id != first.index_id


@pytest.mark.parametrize("format_", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_in_any_tar_format(tmp_path, format_):
    name = ("n" if format_ == tarfile.USTAR_FORMAT else "n" * 120) + "é"
    one_tar(tmp_path, [(f"{name}.jpg", encode(picture(0))), (f"{name}.txt", b"a")], format=format_)
    assert index(tmp_path).counts.tolist() == [1]


def test_truncation_anywhere_is_noticed(tmp_path):
    path = one_tar(tmp_path, [(f"{i}.{suffix}", b"x" * 300) for i in range(4) for suffix in ("jpg", "txt")])
    whole = path.read_bytes()
    end = 8 * 1024  # header and data of each member; the rest is end-of-archive zeros
    for cut in [*range(512, end + 1, 512), *range(700, end, 1021)]:
        path.write_bytes(whole[:cut])
        with pytest.raises(DataError, match=r"00000\.tar: truncated"):
            index(tmp_path)


def test_no_flipped_bit_of_a_header_loses_anything_unnoticed(tmp_path):
    """Every bit of an inner header: refused, or (where it means nothing) the very same members are found."""
    path = one_tar(tmp_path, [(f"{i}.{suffix}", b"x" * 300) for i in range(2) for suffix in ("jpg", "txt")])
    whole, members = path.read_bytes(), list(walk(path, max_member_bytes=1000))
    refused = 0
    for bit in range(8 * 1024, 8 * 1536):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            found = list(walk(path, max_member_bytes=1000))
        except DataError as error:
            found = str(error)
        assert found == members or "damaged tar header at byte 1024" in found
        refused += found != members
    assert refused > 4000


def test_no_sample_hides_behind_a_false_end(tmp_path):
    """A header wiped to zeros, two tars in one file, and a file of full length whose end was never downloaded."""
    path = one_tar(tmp_path, [(f"{i}.{suffix}", b"x" * 300) for i in range(4) for suffix in ("jpg", "txt")])
    whole = path.read_bytes()
    for member in range(8):
        path.write_bytes(whole[: member * 1024] + bytes(512) + whole[member * 1024 + 512 :])
        with pytest.raises(DataError, match=f"damaged: its members end at byte {member * 1024}, but"):
            index(tmp_path)
    path.write_bytes(whole + whole)
    with pytest.raises(DataError, match="damaged: its members end at byte 8192"):
        index(tmp_path)
    path.write_bytes(whole[:4096] + bytes(2**20 + 512))
    with pytest.raises(DataError, match="damaged: its members end at byte 4096"):
        index(tmp_path)
    for padding in (512, 1024, 2**16):
        path.write_bytes(whole[:8192] + bytes(padding))
        assert index(tmp_path).counts.tolist() == [4]


def header(name, kind, size):
    """A header with a right checksum around whatever size is written in it."""
    info = tarfile.TarInfo(name)
    info.type = kind
    block = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    block[124:136] = size.ljust(12, b"\0")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.XGLTYPE])
@pytest.mark.parametrize("size", [b"-0000001000", b"no number"])
def test_a_size_that_leads_backwards_or_nowhere_is_refused(tmp_path, kind, size):
    (tmp_path / "00000.tar").write_bytes(header("a", kind, size) + bytes(1024))
    with pytest.raises(DataError, match="the member at byte 0 claims -"):
        index(tmp_path)


@pytest.mark.parametrize("records", [b"12 size=abc\n", b"13 size=-512\n", b"garbage", b"99 path=a\n", b"9 pathab\n"])
def test_damaged_extended_headers_are_refused(tmp_path, records):
    path = one_tar(tmp_path, [("a.jpg", b"x"), ("a.txt", b"x")])
    extended = header("x", tarfile.XHDTYPE, b"%011o" % len(records)) + records.ljust(512, b"\0")
    path.write_bytes(extended + path.read_bytes())
    with pytest.raises(DataError, match=r"damaged extended header|claims -1 bytes"):
        index(tmp_path)


def test_what_an_extended_header_says_of_a_folder_is_not_said_of_the_next_file(tmp_path):
    folder = tarfile.TarInfo("é" * 60)
    folder.type = tarfile.DIRTYPE
    one_tar(tmp_path, [(folder, None), ("a.jpg", b"x"), ("a.txt", b"x")], format=tarfile.PAX_FORMAT)
    assert index(tmp_path).counts.tolist() == [1]


LINK = tarfile.TarInfo("a.jpg")
LINK.type, LINK.linkname = tarfile.SYMTYPE, "/etc/passwd"
DEVICE = tarfile.TarInfo("a.jpg")
DEVICE.type = tarfile.CHRTYPE
LONG = "../" * 50 + "etc/a.jpg"  # needs an extended header, which replaces the name in the plain one


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("../a.jpg", b"x")], "not a plain file name"),
        ([("/etc/a.jpg", b"x")], "not a plain file name"),
        ([("..", b"x")], "not a plain file name"),
        ([(LONG, b"x")], "not a plain file name"),
        ([(LINK, None)], "link or special file"),
        ([(DEVICE, None)], "link or special file"),
        ([("a.jpg", b"x"), ("a.txt", b"x"), ("b.jpg", b"x"), ("a.jpg", b"x")], "the key 'a' appears twice"),
    ],
)
@pytest.mark.parametrize("format_", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_dangerous_members_are_refused(tmp_path, members, message, format_):
    one_tar(tmp_path, members, format=format_)
    with pytest.raises(DataError, match=message):
        index(tmp_path)


def test_sparse_members_are_refused(tmp_path):
    sparse = tarfile.TarInfo("a.jpg")
    sparse.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}
    one_tar(tmp_path, [(sparse, b"x")], format=tarfile.PAX_FORMAT)
    with pytest.raises(DataError, match="not a plain file name"):
        index(tmp_path)


@pytest.mark.parametrize("format_", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_a_member_that_claims_a_tebibyte_is_refused(tmp_path, format_):
    """In GNU's binary form, and in an extended header, where the plain one says 0."""
    huge = tarfile.TarInfo("a.jpg")
    huge.size = 2**40
    (tmp_path / "00000.tar").write_bytes(huge.tobuf(format_) + bytes(1024))
    with pytest.raises(DataError, match="claims 1099511627776 bytes"):
        index(tmp_path)


def test_other_members_are_never_touched(tmp_path):
    """webdataset would unpickle `.pyd`; here only the image and the caption are read."""
    pickle = b"cos\nsystem\n(S'touch " + str(tmp_path / "owned").encode() + b"'\ntR."
    one_tar(tmp_path, [("a.jpg", encode(picture(0))), ("a.pyd", pickle), ("a.pth", pickle), ("a.txt", b"caption")])
    image, caption, key, _ = ShardReader(index(tmp_path)).read(0, 0)
    assert (image, caption, key) == (encode(picture(0)), "caption", "a")
    assert not (tmp_path / "owned").exists()


def test_incomplete_samples_are_counted(tmp_path):
    one_tar(tmp_path, [("a.jpg", b"x"), ("a.txt", b"x"), ("b.jpg", b"x"), ("c.txt", b"x")])
    built = index(tmp_path)
    assert built.counts.tolist() == [1]
    assert built.shards[0].entry.num_incomplete == 2


def test_missing_empty_and_unfinished_shards(tmp_path, shards):
    for spec, message in (
        (str(tmp_path / "nothing"), "1 of 1 files missing, first .*nothing"),
        (str(tmp_path / "*.tar"), r"no \.tar file matches"),
        (str(shards / "{00000..00004}.tar"), r"2 of 5 files missing, first .*00003\.tar"),
        ([str(shards / "00000.tar"), str(shards)], "more than once"),
        ("pipe:cat x.tar", "local files only"),
    ):
        with pytest.raises(ConfigError, match=message):
            find_shards(spec)
    (shards / "00001_stats.json").unlink()
    with pytest.raises(DataError, match=r"00001\.tar: no 00001_stats\.json beside it"):
        build_index(str(shards))
    one_tar(tmp_path, [("a.json", b"{}")])
    with pytest.raises(DataError, match="no sample with both an image"):
        index(tmp_path)


def test_one_look_finds_all_bad_shards_and_keeps_what_is_done(tmp_path):
    folder = write_shards(tmp_path / "many", (2,) * 12)
    for number in (3, 8):
        path = folder / f"{number:05d}.tar"
        path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(DataError, match=r"00003\.tar: truncated .* \| .*00008\.tar: truncated"):
        build_index(str(folder), num_workers=1)
    done = {path: path.stat().st_mtime_ns for path in folder.glob("*.idx.npy")}
    assert len(done) == 10
    write_shards(folder, (2,) * 9)
    assert build_index(str(folder), num_workers=1).counts.tolist() == [2] * 12
    later = {path: path.stat().st_mtime_ns for path in done}
    assert all(later[folder / f"{n:05d}.idx.npy"] == done[folder / f"{n:05d}.idx.npy"] for n in (9, 10, 11))


def test_many_shards_are_indexed_by_several_processes(tmp_path):
    folder = write_shards(tmp_path / "many", (1, 2, 3, 4, 5, 6, 7, 8, 9))
    assert build_index(str(folder), num_workers=2).counts.tolist() == list(range(1, 10))


def pickled_array(path):
    """An .npy file that runs a command when it is unpickled."""
    buffer = io.BytesIO()
    np.save(buffer, np.array([Touch(path)], dtype=object), allow_pickle=True)
    return buffer.getvalue()


class Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mknod, (str(self.path),)


def test_rows_are_never_unpickled(shards, tmp_path):
    first = build_index(str(shards)).shards[0]
    first.rows_path.write_bytes(pickled_array(tmp_path / "owned"))
    with pytest.raises(DataError, match=r"00000\.idx\.npy: damaged index"):
        build_index(str(shards)).shards[0].rows()
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"not an array"])
def test_damaged_rows_are_named(shards, content):
    first = build_index(str(shards)).shards[0]
    whole = first.rows_path.read_bytes()
    for damaged in (content, whole[:-28], whole[:40]):
        first.rows_path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"00000\.idx\.npy: damaged index; delete it"):
            build_index(str(shards)).shards[0].rows()
    first.rows_path.unlink()
    assert len(build_index(str(shards)).shards[0].rows()) == 7


def test_member_sizes_that_no_row_can_hold_are_refused(shards):
    with pytest.raises(ConfigError, match=r"data\.max_member_bytes must be from 1 to 1073741824, got 0"):
        build_index(str(shards), max_member_bytes=0)


def test_the_index_can_live_elsewhere(shards, tmp_path):
    other = write_shards(tmp_path / "other", (2, 3))
    spec = [str(shards / "*.tar"), str(other / "*.tar")]
    built = build_index(spec, index_dir=tmp_path / "index")
    assert built.counts.tolist() == [7, 5, 9, 2, 3]
    assert not list(shards.glob("*.npy"))
    assert len(json.loads((tmp_path / "index" / "index.json").read_text())["shards"]) == 5
    assert all(isinstance(s.rows(), np.memmap) for s in built.shards)


def test_the_index_knows_the_size_of_every_picture(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to view
    long_comment = encode(picture(0, width=70, height=50), comment=b"x" * 9000)  # the size lies behind the first 4 kB
    pictures = [encode(picture(0)), encode(picture(0), exif=exif), encode(picture(0, width=60, height=30), "WEBP")]
    members = [
        (f"{i}.{s}", d) for i, p in enumerate([*pictures, long_comment, b"x"]) for s, d in (("jpg", p), ("txt", b""))
    ]
    one_tar(tmp_path, members)
    (shard,) = index(tmp_path).shards
    sizes = [(row["height"].item(), row["width"].item()) for row in shard.rows()]
    assert sizes == [(40, 48), (48, 40), (30, 60), (50, 70), (0, 0)]
    assert (shard.entry.min_short_side, shard.entry.max_short_side) == (30, 50)


def test_excluded_samples_are_left_out_and_counted(shards):
    whole = build_index(str(shards))
    (shards / "exclude-dedup.txt").write_text("# duplicates\n00000.tar/000000001\n\n00002.tar/000020000 # of 00001\n")
    (shards / "exclude-mine.txt").write_text("00000.tar/000000001\n00000.tar/000000002\n00002.tar/nowhere\n")
    first = {s.rows_path: s.rows_path.stat().st_mtime_ns for s in whole.shards}
    built = build_index(str(shards))
    assert built.counts.tolist() == [5, 5, 8]
    assert [s.entry.num_excluded for s in built.shards] == [2, 0, 1]
    assert built.index_id != whole.index_id
    keys = {ShardReader(built).read(0, row)[2] for row in range(5)}
    assert keys.isdisjoint({"000000001", "000000002"})
    untouched = whole.shards[1].rows_path
    assert untouched.stat().st_mtime_ns == first[untouched], "shards that lose nothing are not indexed again"
    for path in shards.glob("exclude-*.txt"):
        path.unlink()
    assert build_index(str(shards)).index_id == whole.index_id
    (shards / "exclude-bad.txt").write_text("000000001\n")
    with pytest.raises(DataError, match=r"exclude-bad\.txt: line 1 is '000000001'; write one 00000\.tar/key"):
        build_index(str(shards))


def test_a_key_may_hold_what_begins_a_comment_elsewhere(tmp_path):
    write_shard(tmp_path, 0, {key: {"jpg": encode(picture(0)), "txt": "a"} for key in ("a", "a#b")})
    (tmp_path / "exclude-a.txt").write_text("00000.tar/a#b # not a\n")
    built = build_index(str(tmp_path))
    assert built.counts.tolist() == [1]
    assert ShardReader(built).key(0, 0) == "a"


def test_a_shard_may_be_excluded_whole(shards):
    (shards / "exclude-all.txt").write_text("".join(f"00001.tar/00001{i:04d}\n" for i in range(5)))
    built = build_index(str(shards))
    assert built.counts.tolist() == [7, 0, 9]
    assert len(built.shards[1].rows()) == 0


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_named(shards):
    shards.chmod(0o555)
    with pytest.raises(ConfigError, match=r"set data\.index_dir"):
        build_index(str(shards))


def test_samples_lost_behind_a_tail_of_zeros_are_missed(shards):
    """What no look at the tar can tell, as zeros may be padding: the mark of the complete shard knows how many came."""
    path = shards / "00002.tar"
    start = int(index(shards).shards[2].rows()[6]["offset"])
    path.write_bytes(path.read_bytes()[:start].ljust(path.stat().st_size, b"\0"))
    with pytest.raises(DataError, match=r"00002\.tar: holds 6 samples, but 00002_stats\.json says that 9 were written"):
        build_index(str(shards))
    (shards / "00002_stats.json").write_text("{")
    with pytest.raises(DataError, match=r"00002_stats\.json is damaged"):
        build_index(str(shards))
    assert build_index(str(shards), allow_missing_stats=True).counts.tolist() == [7, 5, 6]


def test_rows_that_another_start_has_written_are_not_read_as_ones_own(shards):
    """With as many rows as before: another exclude list of the same length."""
    lists = shards / "exclude-x.txt"
    lists.write_text("00000.tar/000000001\n")
    mine = build_index(str(shards))
    lists.write_text("00000.tar/000000002\n")
    assert build_index(str(shards)).counts.tolist() == mine.counts.tolist()
    with pytest.raises(DataError, match="start this run again, if another has indexed these shards meanwhile"):
        mine.shards[0].rows()


def test_names_that_begin_with_a_dot_and_slash_have_keys(tmp_path):
    """As ``tar -cf 0.tar .`` writes them."""
    members = [(f"./{i}.{s}", d) for i in range(3) for s, d in (("jpg", encode(picture(i))), ("txt", b"x"))]
    one_tar(tmp_path, members)
    reader = ShardReader(index(tmp_path))
    assert [reader.read(0, row)[2] for row in range(3)] == ["0", "1", "2"]


def test_exclude_lists_of_other_editors_are_read_or_refused(shards):
    (shards / "exclude-x.txt").write_text("\ufeff00000.tar/000000001\n")
    assert build_index(str(shards)).counts.tolist() == [6, 5, 9]
    (shards / "exclude-x.txt").write_bytes("00000.tar/é".encode("latin-1"))
    with pytest.raises(DataError, match=r"exclude-x\.txt: not UTF-8"):
        build_index(str(shards))
