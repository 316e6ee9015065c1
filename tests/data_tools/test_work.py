"""Work spread over processes, and the report of it."""

import argparse
import fcntl
import json
import multiprocessing
import os
import time
from functools import partial
from pathlib import Path

import pytest

from data_tools.work import Report, add_share_arguments, my_share, run_tasks
from ipa_train.errors import ConfigError, DataError


def size_of(path: Path) -> int:
    if path.name == "refused":
        raise DataError(f"{path}: refused")
    return path.stat().st_size


@pytest.mark.parametrize("workers", [1, 2])
def test_one_failure_does_not_end_the_work_on_the_others(tmp_path, workers):
    paths = [tmp_path / name for name in ("a", "refused", "missing", "b")]
    for path in (paths[0], paths[3]):
        path.write_bytes(b"12345")
    results = list(run_tasks(size_of, paths, description="sizes", workers=workers))
    assert [task for task, _ in results] == paths
    assert (results[0][1], results[3][1]) == (5, 5)
    assert str(results[1][1]) == f"{paths[1]}: refused"
    assert str(results[2][1]) == f"{paths[2]}: No such file or directory"


def hold(path: Path) -> None:
    """Lock a file for as long as this process lives, and work for longer than any test."""
    file = path.open("w")
    fcntl.flock(file, fcntl.LOCK_EX)
    path.with_suffix(".held").touch()
    time.sleep(300)


def is_free(path: Path) -> bool:
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def test_workers_end_when_their_parent_is_killed(tmp_path):
    paths = [tmp_path / name for name in ("a", "b")]
    work = partial(run_tasks, hold, paths, description="hold", workers=2)
    parent = multiprocessing.get_context("fork").Process(target=lambda: list(work()))
    parent.start()
    while not all(path.with_suffix(".held").exists() for path in paths):
        assert parent.is_alive()
        time.sleep(0.01)
    parent.kill()
    parent.join()
    deadline = time.monotonic() + 60
    while not all(map(is_free, paths)):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_report_says_whether_to_trust_the_result(tmp_path, capsys):
    report = Report("validate", folder=tmp_path)
    report.counts["samples"] += 1200
    assert report.finish(tmp_path / "report.json") == 0
    for number in range(7):
        report.problem(f"shard {number} is bad")
    assert report.finish(tmp_path / "report.json") == 1
    content = json.loads((tmp_path / "report.json").read_text())
    assert (content["ok"], content["counts"], len(content["problems"])) == (False, {"samples": 1200}, 7)
    assert content["folder"] == str(tmp_path)
    assert "validate: 1,200 samples" in (shown := capsys.readouterr().out)
    assert "and 2 more problems" in shown


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_report_that_cannot_be_written_is_one_line(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError, match="cannot be written"):
        Report("index").finish(tmp_path / "report.json")


def test_no_workers_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="--workers must be at least 1, got 0"):
        list(run_tasks(size_of, [tmp_path], description="sizes", workers=0))


def test_processes_share_the_tasks_without_being_told(monkeypatch):
    def share(*given):
        parser = argparse.ArgumentParser()
        add_share_arguments(parser)
        return list(my_share(range(7), parser.parse_args(given)))

    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)
    assert share() == list(range(7))
    first, second = (share("--task-index", str(i), "--num-tasks", "2") for i in range(2))
    assert first + second == list(range(7))
    with pytest.raises(ConfigError, match="--task-index=2 must be from 0 to --num-tasks - 1 = 1"):
        share("--task-index", "2", "--num-tasks", "2")
    found = []
    for array_id in (3, 5, 7):
        for process in (0, 1):
            places = {"PROCID": process, "STEP_NUM_TASKS": 2, "ARRAY_TASK_ID": array_id}
            places |= {"ARRAY_TASK_MIN": 3, "ARRAY_TASK_STEP": 2, "ARRAY_TASK_COUNT": 3}
            for name, value in places.items():
                monkeypatch.setenv(f"SLURM_{name}", str(value))
            found += share()
    assert found == list(range(7))
