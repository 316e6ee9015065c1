"""Trainings over two nodes by slurm/train.sbatch, as it is."""

import os
import signal

import pytest
import torch
from safetensors.torch import load_file

from tests.end_to_end.conftest import loss_curve

NUM_STEPS = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("trainings")


@pytest.fixture(scope="module")
def submit(cluster, folder, slow_run):
    """A function from a run's name to a job over two nodes."""

    def submit(name, *overrides, environment=None, **options):
        overrides = [*slow_run, f"trainer.max_steps={NUM_STEPS}", f"run.name={name}", *overrides]
        resources = {"nodes": 2, "gpus_per_node": 1, "cpus_per_gpu": 2}
        return cluster.submit("train.sbatch", *overrides, folder=folder, environment=environment, **resources | options)

    return submit


@pytest.fixture(scope="module")
def jobs(submit, folder, slurm_shards):
    """Two trainings: in one go, from copies of the shards on a disk of the nodes'; and to be stopped."""
    staged = {"STAGE": str(slurm_shards), "LOCAL_DISK": str(folder / "disk")}
    return {"whole": submit("whole", "data.shards=elsewhere", environment=staged), "stopped": submit("stopped")}


def test_told_to_stop_a_job_comes_back_and_ends_as_if_it_had_not(jobs, folder):
    stopped, whole = jobs["stopped"], jobs["whole"]
    stopped.wait_for_log(r"step 2/")
    stopped.signal("USR1")
    for job in (stopped, whole):
        job.wait("COMPLETED")
    assert (whole.num_restarts, stopped.num_restarts) == (0, 1), whole.log + stopped.log
    assert stopped.log.count("2 x 1 processes on n[1-2]; the run lies in outputs/stopped") == 2
    curve = loss_curve(folder / "outputs" / "stopped")
    assert curve == loss_curve(folder / "outputs" / "whole")
    assert list(curve) == list(range(1, NUM_STEPS + 1))
    weights = [load_file(newest_adapter(folder / "outputs" / name)) for name in jobs]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])


def test_copies_on_the_nodes_are_removed(jobs, folder):
    jobs["whole"].wait("COMPLETED")
    assert "copying" in jobs["whole"].log
    assert list((folder / "disk").iterdir()) == []


def test_at_its_time_limit_a_job_comes_back(submit, folder):
    job = submit("limited", time=2, signal="USR1@10")
    job.wait_for_log(r"step 2/")
    for rank in job.ranks():
        os.kill(rank.pid, signal.SIGSTOP)  # so as not to end before: Slurm wakes whom it sends a signal
    job.wait("COMPLETED")
    assert job.num_restarts == 1, job.log
    assert "told to stop: saving a checkpoint" in job.log
    assert list(loss_curve(folder / "outputs" / "limited")) == list(range(1, NUM_STEPS + 1))


def newest_adapter(run):
    return sorted(run.glob("checkpoints/step-*/adapter.safetensors"))[-1]
