"""Faults of one machine while two ranks train: the same command then goes on, to the curve of a run left alone."""

import os
import re
import shutil
import signal
import subprocess
import time

import pytest

from ipa_train.training.checkpoint import list_checkpoints
from tests.end_to_end.conftest import forked_ranks, loss_curve, train_arguments

STEPS = 10
OPTIONS = (f"trainer.max_steps={STEPS}", "callbacks.checkpointing.every_steps=2")
PATIENCE_SECONDS = 120


def exit_statuses(ranks):
    """Wait for all ranks to end; one that does not is killed."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    for process in ranks:
        process.join(max(0, deadline - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in ranks]


def rank_log(run, rank):
    file = run / "logs" / f"rank-{rank}.log"
    return file.read_text() if file.exists() else ""


def wait_for_step(run, step, ranks):
    """Wait until this very start of the run, and not one before it, has come to a step."""
    reached = re.compile(rf"process {ranks[0].pid} on .*INFO +step {step}/", re.DOTALL)
    while not reached.search(rank_log(run, 0)):
        assert all(process.is_alive() for process in ranks)
        time.sleep(0.02)


def only_line_of_both(said, pattern):
    """The words with which both ranks stopped, if they are the same and nothing but one line."""
    assert "Traceback" not in said
    lines = re.findall(rf"^ipa train(?: \(rank 1\))?: ({pattern}.*)$", said, re.MULTILINE)
    assert len(lines) == 2
    assert len(set(lines)) == 1
    return lines[0]


@pytest.fixture(scope="module")
def left_alone(tiny_models, shards, tmp_path_factory):
    """The folder of a run on two ranks that nothing happens to."""
    folder = tmp_path_factory.mktemp("left_alone")
    wandb = ("logger=wandb", "logger.wandb.offline=true")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_SILENT", "true")
        ranks = forked_ranks(train_arguments(tiny_models, shards, folder, "run", *OPTIONS, *wandb))
        assert exit_statuses(ranks) == [0, 0]
    assert len(loss_curve(folder / "run")) == STEPS
    return folder / "run"


def test_one_rank_reports_and_each_has_its_log(left_alone):
    assert len(list((left_alone / "wandb").glob("offline-run-*"))) == 1
    for rank in range(2):
        assert re.search(rf"INFO +start of rank {rank} of 2: process \d+ on ", rank_log(left_alone, rank))
        assert "training has ended at step 10" in rank_log(left_alone, rank)
    assert re.search(r"INFO +step 3/10: loss", rank_log(left_alone, 0))
    assert re.search(r"INFO +step 3: .* waiting for data", rank_log(left_alone, 1))


def test_killed_ranks_a_damaged_checkpoint_and_a_lost_shard_change_nothing(
    train_command, shards, tmp_path, capfd, left_alone
):
    mine, run = shutil.copytree(shards, tmp_path / "shards"), tmp_path / "run"
    command = train_command("run", f"data.shards={mine}", *OPTIONS, "data.num_workers=1")

    def kill(rank, after_step):
        ranks = forked_ranks(command)
        wait_for_step(run, after_step, ranks)
        os.kill(ranks[rank].pid, signal.SIGKILL)
        statuses = exit_statuses(ranks)
        assert statuses[rank] == -signal.SIGKILL
        assert statuses[1 - rank] > 0
        assert "Traceback" in rank_log(run, 1 - rank)

    kill(1, after_step=3)

    *_, before, newest = list_checkpoints(run / "checkpoints")
    (newest / "state.pt").write_bytes((newest / "state.pt").read_bytes()[:-100])
    capfd.readouterr()
    ranks = forked_ranks([*command, "trainer.max_steps=100000", "callbacks.checkpointing.every_steps=100000"])
    wait_for_step(run, 5, ranks)
    os.truncate(mine / "00001.tar", 0)  # a file that is open would outlive its name
    assert exit_statuses(ranks) == [2, 2]
    assert "00001.tar" in only_line_of_both(capfd.readouterr().err, "more than half of")
    assert f"{newest} is damaged: state.pt is not the file that was written" in rank_log(run, 1)
    assert f"resuming from {before}" in rank_log(run, 0)
    shutil.copy2(shards / "00001.tar", mine)

    kill(0, after_step=5)

    assert exit_statuses(forked_ranks(command)) == [0, 0]
    assert loss_curve(run) == loss_curve(left_alone)
    assert [rank_log(run, rank).count(f"start of rank {rank}") for rank in range(2)] == [4, 4]


def test_a_full_disk_stops_both_ranks_in_one_line_until_there_is_room(train_command, tmp_path, capfd, left_alone):
    run = tmp_path / "run"
    run.mkdir()
    size = sum(file.stat().st_size for file in list_checkpoints(left_alone / "checkpoints")[-1].iterdir())
    small_disk = ["mount", "-t", "tmpfs", "-o", f"size={size * 3 // 2}", "tmpfs", run]
    if subprocess.run(small_disk, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        command = train_command("run", *OPTIONS)
        assert exit_statuses(forked_ranks(command)) == [2, 2]
        line = only_line_of_both(capfd.readouterr().err, "cannot write")
        assert re.search("step-00000002: .*No space left on device", line)
        assert "ended: cannot write checkpoint" in rank_log(run, 1)
        subprocess.run(["mount", "-o", f"remount,size={size * 9}", run], check=True)
        assert exit_statuses(forked_ranks(command)) == [0, 0]
        assert loss_curve(run) == loss_curve(left_alone)
    finally:
        subprocess.run(["umount", run], check=True)


def test_a_folder_that_is_no_run_is_left_alone_by_every_rank(train_command, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"jpg")
    first, second = forked_ranks(train_command("photos", *OPTIONS))
    first.join(PATIENCE_SECONDS)
    assert first.exitcode == 2
    second.kill()  # it waits for rank 0; whoever started them ends it
    second.join()
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["cat.jpg"]
