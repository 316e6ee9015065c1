"""Shards on real servers that cut, stall and fail: whole copies or none, few requests, and the same stream."""

import multiprocessing
import os

import pytest

from ipa_train.data.index import build_index
from ipa_train.data.local_copies import GIB, LocalCopies
from ipa_train.data.remote import ask_version
from ipa_train.data.sources import RemoteFile
from ipa_train.errors import ConfigError, DataError
from tests.data.conftest import write_shard, write_shards, encode, picture
from tests.data.servers import http_server

PATIENCE = {"patience_seconds": 0.5}


@pytest.fixture
def server(shards):
    with http_server(shards) as server:
        yield server


@pytest.fixture
def copies(tmp_path):
    made = LocalCopies(tmp_path / "cache", **PATIENCE)
    made.prepare()
    return made


def remote(server, copies, name="00000.tar"):
    url = f"{server.url}/{name}"
    return RemoteFile(url, ask_version(url, patience_seconds=0.5), copies)


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
