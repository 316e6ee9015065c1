import contextlib
import logging
import os
import subprocess
from pathlib import Path

import pytest

from ipa_train.errors import CheckpointError, DataError
from ipa_train.runtime import rank_log
from ipa_train.runtime.rank_log import RankLog

_log = logging.getLogger("ipa_train.x")


@pytest.fixture
def open_log(console, tmp_path):
    """A function that opens a log in a run's folder, as a rank that has said something already."""
    logs = []

    def open_one(*, rank=1, folder=tmp_path / "logs", early="early"):
        console(rank=rank)
        _log.info(early)
        logs.append(RankLog(folder, rank=rank, world_size=2, patience_seconds=0))
        return logs[-1], folder / f"rank-{rank}.log"

    yield open_one
    for log in logs:
        log.leave()


def test_a_rank_writes_what_it_says_before_and_after_the_file_is_there(open_log, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "123")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    _, file = open_log()
    _log.info("late")
    _log.debug("detail")
    logging.getLogger("lightning.pytorch").info("GPU available: False")
    first, *rest = file.read_text().splitlines()
    assert "start of rank 1 of 2: Slurm job 123, restart 2, " in first
    assert f"process {os.getpid()} on {os.uname().nodename}" in first
    assert [line.split()[1:] for line in rest] == [["INFO", "early"], ["INFO", "late"]]


def test_every_start_adds_to_the_file(open_log):
    log, file = open_log(early="one")
    log.leave()
    _log.info("between two starts")
    open_log(early="two")
    assert [line.split()[-1] for line in file.read_text().splitlines() if "start" not in line] == ["one", "two"]
    assert file.read_text().count("start of rank 1") == 2


def test_a_mistake_ends_it_in_one_line_and_anything_else_with_where_it_happened(open_log):
    log, file = open_log()
    log.note_end(DataError("no such shard"))
    assert file.read_text().splitlines()[-1].endswith("ERROR   ended: no such shard")
    try:
        Path("/nowhere").read_text()
    except FileNotFoundError as error:
        log.note_end(error)
    assert "Traceback" in file.read_text()
    assert "test_rank_log.py" in file.read_text()


def test_it_does_not_grow_for_ever(open_log, monkeypatch):
    monkeypatch.setattr(rank_log, "MAX_BYTES", 1000)
    _, file = open_log()
    for i in range(100):
        _log.info("message %d", i)
    assert sorted(p.name for p in file.parent.iterdir()) == ["rank-1.log", "rank-1.log.1"]
    assert sum(p.stat().st_size for p in file.parent.iterdir()) <= 2000
    assert "message 99" in file.read_text()


def test_a_folder_that_cannot_be_written_or_is_not_shared_is_one_line(open_log, tmp_path):
    (tmp_path / "logs").write_text("no folder")
    with pytest.raises(CheckpointError, match=r"rank 1 on \S+ cannot write its log in .*logs: File exists"):
        open_log()
    with pytest.raises(CheckpointError, match=r"missing is not there on \S+ \(rank 1\), though .* set run\.path"):
        open_log(folder=tmp_path / "missing" / "logs")
    assert not (tmp_path / "missing").exists()


def test_a_disk_that_fills_up_ends_the_log_and_nothing_else(open_log, tmp_path, capsys):
    if os.getuid():
        pytest.skip("mounting a small disk needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", disk], check=True)
    try:
        log, _ = open_log(folder=disk / "logs")
        with contextlib.suppress(OSError):
            (disk / "rest").write_bytes(b"x" * 16_000)
        for _ in range(3):
            _log.warning("x" * 5000)
        said = capsys.readouterr().err
        assert said.count("any more ([Errno 28] No space left on device): this log ends here") == 1
        assert len([line for line in said.splitlines() if line.endswith("x" * 5000)]) == 3
        log.leave()
    finally:
        subprocess.run(["umount", disk], check=True)
