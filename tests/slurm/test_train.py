"""Trainings over two nodes by slurm/train.sbatch, as it is."""

import pytest
import torch
from safetensors.torch import load_file

from tests.end_to_end.conftest import loss_curve

NUM_STEPS = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("trainings")


@pytest.fixture(scope="module")
def jobs(cluster, folder, tiny_run, slurm_shards):
    """Two trainings on two nodes: in one go, from copies of the shards on a disk of the nodes'; and to be stopped."""

    def submit(name, *arguments, **environment):
        overrides = [*tiny_run, f"trainer.max_steps={NUM_STEPS}", f"run.name={name}", *arguments]
        resources = {"nodes": 2, "gpus_per_node": 1, "cpus_per_gpu": 2}
        return cluster.submit("train.sbatch", *overrides, folder=folder, environment=environment, **resources)

    staged = {"STAGE": str(slurm_shards), "LOCAL_DISK": str(folder / "disk")}
    return {"whole": submit("whole", "data.shards=elsewhere", **staged), "stopped": submit("stopped")}


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


def newest_adapter(run):
    return sorted(run.glob("checkpoints/step-*/adapter.safetensors"))[-1]
