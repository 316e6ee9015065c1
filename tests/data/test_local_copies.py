"""Copies of files on a server that cuts, stalls and fails: whole or not at all, with few requests, within their cap."""

import os
import signal
import subprocess
import sys
import time

import pytest

from ipa_train.data.index import build_index
from ipa_train.data.local_copies import GIB, LocalCopies
from ipa_train.data.remote import ask_version
from ipa_train.data.sources import RemoteFile
from ipa_train.errors import DataError
from tests.data.conftest import PATIENCE_SECONDS


def remote(server, copies, name="00000.tar"):
    url = f"{server.url}/{name}"
    return RemoteFile(url, ask_version(url, patience_seconds=PATIENCE_SECONDS), copies)


def fetch(file):
    os.close(file.open())
    return file.path.read_bytes()


def leftovers(copies):
    return [path.name for path in copies.folder.glob("*/*") if path.suffix != ".tar"]


FAULTS = {
    "cut in a member": [("cut", 3000)],
    "cut at a member": [("cut", 1024)],
    "cut at the very start": [("cut", 0)],
    "short without a word": [("short", 1024)],
    "stalls": [("stall", 2.0)],
    "errors twice": [("status", 500), ("status", 503)],
    "asks for patience": [("status", 429)],
    "everything at once": [("status", 503), ("cut", 512), ("short", 0), ("stall", 2.0)],
}


@pytest.mark.parametrize("faults", FAULTS.values(), ids=FAULTS.keys())
def test_a_server_that_fails_now_and_then_is_asked_again(server, copies, shards, faults):
    server.faults["00000.tar"] = list(faults)
    file = remote(server, copies)
    assert fetch(file) == (shards / "00000.tar").read_bytes()
    assert server.count("GET") == len(faults) + 1
    assert server.count("HEAD") == 3
    assert not leftovers(copies)
    fetch(file)
    assert server.count("GET") == len(faults) + 1, "what is there is not downloaded again"


@pytest.mark.parametrize(
    ("faults", "message", "num_gets"),
    [
        ([("status", 503)] * 9, r"503.*\(5 attempts\)", 5),
        ([("short", 1024)] * 9, r"the server sent 1024 of \d+ bytes from byte 0 on \(5 attempts\)", 5),
        ([("status", 403)], "403", 1),
        ([("replace", '"new"')], r"replaced since it was indexed \(\d+ bytes, .*; now \d+ bytes, \"new\"\)", 1),
    ],
)
def test_what_fails_to_the_end_is_named_and_not_asked_for_again(server, copies, faults, message, num_gets):
    server.faults["00000.tar"] = list(faults)
    file = remote(server, copies)
    for _ in range(3):
        with pytest.raises(DataError, match=rf"^{server.url}/00000\.tar: .*{message}") as error:
            file.open()
        assert "\n" not in str(error.value)
    assert server.count("GET") == num_gets
    assert leftovers(copies) == [f"{file.path.name}.failed"]
    server.faults.clear()
    server.etags.clear()
    file.download(insist=True)
    assert fetch(file), "who insists is given it"
    assert not leftovers(copies)


def test_a_new_run_gives_the_server_another_chance(server, copies):
    server.faults["00000.tar"] = [("status", 403)]
    file = remote(server, copies)
    with pytest.raises(DataError, match="403"):
        file.open()
    copies.prepare()
    assert fetch(file)


def test_a_stalled_server_does_not_hang_the_run(server, copies):
    server.faults["00000.tar"] = [("stall", 3.0)] * 9
    with pytest.raises(DataError, match=r"no answer within 0\.5 s \(5 attempts\)"):
        remote(server, copies).open()


def test_a_cut_costs_one_piece_and_a_server_without_ranges_sends_all_at_once(server, copies, shards, monkeypatch):
    monkeypatch.setattr("ipa_train.data.sources._PIECE_BYTES", 4096)
    whole = (shards / "00000.tar").read_bytes()
    num_pieces = -(-len(whole) // 4096)
    server.faults["00000.tar"] = [("", 0), ("cut", 100), ("", 0), ("status", 500)]
    assert fetch(remote(server, copies)) == whole
    assert server.count("GET") == num_pieces + 2
    server.knows_ranges = False
    assert fetch(remote(server, copies, "00002.tar")) == (shards / "00002.tar").read_bytes()
    assert server.count("GET", "00002.tar") == 1


def test_a_signature_is_used_but_not_shown(server, copies):
    url = f"{server.url}/00000.tar?signature=secret"
    file = RemoteFile(url, ask_version(url, patience_seconds=1), copies)
    server.faults["00000.tar"] = [("status", 403)]
    with pytest.raises(DataError, match="403") as error:
        file.open()
    assert "secret" not in str(error.value)


FETCH = """
import os, sys
from pathlib import Path
from ipa_train.data.local_copies import LocalCopies
from ipa_train.data.remote import ask_version
from ipa_train.data.sources import RemoteFile
for url in sys.argv[2:]:
    copies = LocalCopies(Path(sys.argv[1]), patience_seconds=8)
    os.close(RemoteFile(url, ask_version(url, patience_seconds=8), copies).open())
"""


def fetching(server, copies, *names):
    urls = [f"{server.url}/{name}" for name in names]
    return subprocess.Popen([sys.executable, "-c", FETCH, str(copies.folder), *urls])


def test_processes_share_what_each_shard_is_downloaded_once_for(server, copies, shards):
    names = [f"0000{i}.tar" for i in range(3)]
    server.faults |= {name: [("stall", 0.5)] for name in names}
    processes = [fetching(server, copies, *order) for order in (names, names[::-1])]
    assert [process.wait(30) for process in processes] == [0, 0]
    assert server.count("GET") == 6, "each once and, as its server broke off, once again"
    assert [fetch(remote(server, copies, n)) for n in names] == [(shards / n).read_bytes() for n in names]


def test_what_a_killed_process_left_is_begun_anew(server, copies, shards):
    server.faults["00000.tar"] = [("stall", 30.0)]
    process = fetching(server, copies, "00000.tar")
    file = remote(server, copies)
    part = file.path.with_name(f"{file.path.name}.part")
    while not part.exists() or not part.stat().st_size:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert part.stat().st_size == file.version.num_bytes, "of full length, and empty"
    copies.max_bytes = file.version.num_bytes
    assert fetch(file) == (shards / "00000.tar").read_bytes(), "though there is no room for it beside the leftovers"
    assert not leftovers(copies)


def test_leftovers_of_a_killed_process_are_evicted(server, copies):
    file = remote(server, copies, "00001.tar")
    file.path.parent.mkdir(parents=True)
    file.path.with_name(f"{file.path.name}.part").write_bytes(b"half")
    kept = remote(server, copies)
    fetch(kept)
    assert copies.keep_only({kept.path}) == {kept.path}
    assert list(copies.folder.glob("*/*")) == [kept.path]


def test_the_cap_is_kept_and_open_copies_outlive_it(server, shards, tmp_path):
    sizes = [(shards / f"0000{i}.tar").stat().st_size for i in range(3)]
    copies = LocalCopies(tmp_path / "cache", max_gib=(sizes[1] + sizes[2]) / GIB)
    descriptor = remote(server, copies, "00001.tar").open()
    for number in (2, 0):
        fetch(remote(server, copies, f"0000{number}.tar"))
        assert copies.num_bytes() <= copies.max_bytes
    assert remote(server, copies, "00001.tar").path.exists(), "in use"
    os.close(descriptor)
    opened = build_shard(server, copies, tmp_path, "00000.tar").open()
    fetch(remote(server, copies, "00002.tar"))
    assert copies.num_bytes() <= copies.max_bytes
    assert os.pread(opened, sizes[0], 0) == (shards / "00000.tar").read_bytes()
    os.close(opened)
    with pytest.raises(DataError, match=r"GiB do not fit into data\.cache_gib="):
        remote(server, LocalCopies(tmp_path / "small", max_gib=1000 / GIB)).open()


def build_shard(server, copies, tmp_path, name):
    (shard,) = build_index(f"{server.url}/{name}", index_dir=tmp_path / "index", copies=copies).shards
    return shard
