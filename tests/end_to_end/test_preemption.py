"""Told to stop at any moment, by any signal, on any rank: all ranks save once, exit with 75, and go on bit-equal."""

import itertools
import os
import random
import signal
import struct
import subprocess
import sys
import time

import torch
from wandb.proto import wandb_internal_pb2

from ipa_train.cli.main import main
from ipa_train.runtime.preemption import EXIT_STOPPED, EXIT_TAKEN_OVER
from ipa_train.training.checkpoint import list_checkpoints, step_of
from ipa_train.training.ownership import LOCK
from tests.end_to_end.conftest import forked, forked_ranks, loss_curve
from tests.end_to_end.test_resume import adapter_weights

NO_OTHER_SAVES = ("callbacks.checkpointing.every_steps=100000", "trainer.max_steps=100000")
IN_PIECES = ("data.batch_size=1", "callbacks.preemption.every_steps=3")
"""Several micro-batches a step, and agreements that are not at every step."""


def reach(run, steps, *processes):
    """Wait until the log has so many more rows."""
    goal = len(loss_curve(run)) + steps
    while len(loss_curve(run)) < goal:
        assert all(process.is_alive() for process in processes)
        time.sleep(0.01)


def exit_codes(processes):
    for process in processes:
        process.join(120)
    return [process.exitcode for process in processes]


def saved_steps(run):
    return [step_of(path) for path in list_checkpoints(run / "checkpoints")]


def tracker_records(file):
    """What wandb would send of an offline run: a LevelDB log, of chunks with checksum, length and kind."""
    data, at, record = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if at % 32768 > 32768 - 7:  # no header fits into the rest of the block
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # the whole of a record, or the last part
            yield wandb_internal_pb2.Record.FromString(record)
            record = b""


def assert_as_if_left_alone(train_command, run, start, *options):
    """Finish the run, and compare it with one that nobody has stopped."""
    options = (*options, NO_OTHER_SAVES[0], f"trainer.max_steps={saved_steps(run)[-1] + 2}")
    whole = run.with_name("left_alone")
    for name in (run.name, whole.name):
        assert set(exit_codes(start(train_command(name, *options)))) == {0}
    assert loss_curve(run) == loss_curve(whole)
    weights, expected = adapter_weights(run), adapter_weights(whole)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_one_process_stops_after_the_step_and_resumes_bit_equal(train_command, tmp_path):
    """The whole process group is told, as a scheduler does: data workers and the tracker too."""
    run, rng = tmp_path / "told", random.Random(0)
    options = ("data.batch_size=2", "data.num_workers=1")
    tracked = (*options, "logger=wandb", "logger.wandb.offline=true")
    for number, signum in enumerate((signal.SIGTERM, signal.SIGUSR1)):
        process = forked(train_command("told", *tracked, *NO_OTHER_SAVES))
        reach(run, 2 + number, process)
        time.sleep(rng.uniform(0, 0.2))
        os.killpg(process.pid, signum)
        assert exit_codes([process]) == [EXIT_STOPPED]
        assert max(loss_curve(run)) == saved_steps(run)[-1], "no step is lost"
    starts = [list(tracker_records(file)) for file in sorted(run.glob("wandb/offline-run-*/*.wandb"))]
    assert len({record.run.run_id for records in starts for record in records if record.HasField("run")}) == 1
    for records in starts:
        assert any(record.HasField("preempting") for record in records)
        assert [record.exit.exit_code for record in records if record.HasField("exit")] == [EXIT_STOPPED]
    assert_as_if_left_alone(train_command, run, lambda arguments: [forked(arguments)], *options)


def test_two_ranks_agree_whoever_is_told_and_slow(train_command, tmp_path):
    """The slow one stands still for a moment, the other waits for it in a collective."""
    run = tmp_path / "told"
    for told, slow in (((0,), 1), ((1,), 0), ((0, 1), 1)):
        processes = forked_ranks(train_command("told", *IN_PIECES, *NO_OTHER_SAVES))
        reach(run, 2, *processes)
        os.kill(processes[slow].pid, signal.SIGSTOP)
        for rank in told:
            os.kill(processes[rank].pid, signal.SIGTERM if slow else signal.SIGUSR1)
        time.sleep(0.3)
        os.kill(processes[slow].pid, signal.SIGCONT)
        assert exit_codes(processes) == [EXIT_STOPPED, EXIT_STOPPED]
        assert saved_steps(run)[-1] == max(loss_curve(run))
        assert saved_steps(run)[-1] % 3 == 0, "at an agreement"
    assert_as_if_left_alone(train_command, run, forked_ranks, *IN_PIECES)


def test_told_again_and_again_from_its_start_to_its_end(train_command, tmp_path):
    """Before the first step, in the save and in the exit."""
    run = tmp_path / "told"
    processes = forked_ranks(train_command("told", *NO_OTHER_SAVES))
    while not (run / "config.yaml").exists():
        assert all(process.is_alive() for process in processes)
        time.sleep(0.01)
    for signum in itertools.cycle((signal.SIGTERM, signal.SIGUSR1)):
        alive = [process for process in processes if process.is_alive()]
        for process in alive:
            os.kill(process.pid, signum)
        if not alive:
            break
        time.sleep(0.005)
    assert exit_codes(processes) == [EXIT_STOPPED, EXIT_STOPPED]
    assert saved_steps(run) == [0], "the wish was there before a step was"
    assert not list((run / "checkpoints").glob(".tmp-*"))


def test_lightnings_own_launcher_passes_the_status_on(train_command, tmp_path):
    run = tmp_path / "told"
    command = train_command("told", *NO_OTHER_SAVES, "trainer.devices=2", "trainer.strategy=ddp")
    with subprocess.Popen([sys.executable, "-m", "ipa_train.cli.main", *command]) as process:
        while len(loss_curve(run)) < 2:
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
    assert process.returncode == EXIT_STOPPED
    assert saved_steps(run)[-1] == max(loss_curve(run))


def test_a_finished_run_is_done_where_slurm_starts_it_once_more(train_command, monkeypatch):
    command = train_command("short", "trainer.max_steps=1")
    assert main(command) == 0
    assert main(command) == 2
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert main(command) == 0


def test_a_restarted_job_takes_over_and_the_older_start_writes_no_more(train_command, tmp_path):
    """As when a node loses its scheduler, and the job is started on another while the old processes live on."""
    run = tmp_path / "shared"
    command = train_command("shared", "trainer.max_steps=100000", "callbacks.checkpointing.every_steps=2")
    older = forked(command, SLURM_JOB_ID="7")
    reach(run, 3, older)
    newer = forked(command, SLURM_JOB_ID="7", SLURM_RESTART_COUNT="1")
    assert exit_codes([older]) == [EXIT_TAKEN_OVER]
    reach(run, 3, newer)
    os.kill(newer.pid, signal.SIGTERM)
    assert exit_codes([newer]) == [EXIT_STOPPED]
    assert saved_steps(run)[-1] == max(loss_curve(run))
    assert not (run / "owner.json").exists()


def test_another_job_is_refused_while_the_heart_beats_though_no_lock_is_seen(train_command, tmp_path, capfd):
    run = tmp_path / "shared"
    command = train_command("shared", *NO_OTHER_SAVES)
    owner = forked(command, SLURM_JOB_ID="7")
    reach(run, 1, owner)
    (run / LOCK).unlink()  # what another node sees of it, where locks do not reach so far
    other = forked(command, SLURM_JOB_ID="8")
    assert exit_codes([other]) == [2]
    assert f"in use by process {owner.pid} on " in capfd.readouterr().err
    os.kill(owner.pid, signal.SIGKILL)
    owner.join()
    again = forked(command, SLURM_JOB_ID="8")
    reach(run, 1, again)
    os.kill(again.pid, signal.SIGUSR1)
    assert exit_codes([again]) == [EXIT_STOPPED]
