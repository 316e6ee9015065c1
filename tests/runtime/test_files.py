import os

import pytest

from ipa_train.runtime.files import atomic_write


def fail_half_way(path):
    with atomic_write(path) as temporary:
        temporary.write_text("half")
        raise KeyError


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("old")
    with pytest.raises(KeyError):
        fail_half_way(path)
    assert [p.name for p in tmp_path.iterdir()] == ["config.yaml"]
    assert path.read_text() == "old"


def test_a_finished_write_replaces_the_file_under_the_umask(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("old")
    before = os.umask(0o022)
    try:
        with atomic_write(path) as temporary:
            temporary.touch(mode=0o600)
            temporary.write_text("new")
    finally:
        os.umask(before)
    assert path.read_text() == "new"
    assert path.stat().st_mode & 0o777 == 0o644
