"""`ipa submit`: the command and the script that it shows, and a job that it makes."""

import re
import shlex

import pytest

from ipa_train.cli.main import main
from tests.slurm.cluster import ROOT, Job

COMMAND = ["submit", "experiment=sdxl_plus", "run.name=a b", "data.shards=/data/{00000..00010}.tar"]


def test_dry_run_shows_the_command_and_the_shipped_script(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert main([*COMMAND, "--nodes", "8", "--time", "12:00:00", "--dry-run"]) == 0
    command, script = capfd.readouterr().out.split("\n\n", 1)
    environment, *words = shlex.split(command)
    assert environment == f"IPA_SLURM={ROOT / 'slurm'}"
    assert words[0] == "sbatch"
    assert {"--nodes=8", "--time=12:00:00", "--job-name=a-b"} < set(words)
    assert words[-4:] == [str(ROOT / "slurm" / "train.sbatch"), *COMMAND[1:]]
    assert script == (ROOT / "slurm" / "train.sbatch").read_text()


def test_a_sites_own_script_comes_first(tmp_path, monkeypatch, capfd):
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "train.sbatch").write_text("#!/bin/bash\n# the site's own\n")
    monkeypatch.chdir(tmp_path)
    assert main([*COMMAND, "--dry-run"]) == 0
    out = capfd.readouterr().out
    assert out.startswith(f"IPA_SLURM={tmp_path / 'slurm'} ")
    assert out.endswith("# the site's own\n")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["data.shards=x"], "run.name is not set"),
        (["run.name=x", "data.shards=x", "optimizer.learning_rate=1"], "optimizer.learning_rate"),
        (["run.name=x", "data.shards=x"], "there is no sbatch here"),
    ],
)
def test_what_cannot_work_is_not_submitted(arguments, complaint, monkeypatch, capfd, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["submit", "experiment=sd15_linear", *arguments]) == 2
    assert complaint in capfd.readouterr().err


def test_a_submitted_job_trains_until_it_is_cancelled_for_good(cluster, tiny_run, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    resources = ["--nodes", "1", "--gpus-per-node", "2", "--time", "9", "--partition", "high"]
    assert main(["submit", *tiny_run, "run.name=submitted", *resources]) == 0
    out = capfd.readouterr().out
    assert out.endswith("the run lies in outputs/submitted\n")
    job = Job(cluster, re.match(r"job (\d+) is in the queue", out)[1], tmp_path)
    shown = [job.shown(field) for field in ("JobName", "Partition", "TimeLimit")]
    assert shown == ["submitted", "high", "00:09:00"]
    job.wait_for_log(r"step 2/")
    assert "1 x 2 processes on n" in job.log
    job.cancel()
    job.wait("CANCELLED")
    job.wait_until_gone()
    assert job.num_restarts == 0
    assert "Back to the queue" not in job.log


def test_what_sbatch_refuses_is_said_in_one_line(cluster, tiny_run, monkeypatch, capfd):
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    assert main(["submit", *tiny_run, "run.name=x", "--partition", "gold"]) == 2
    error = capfd.readouterr().err
    assert "sbatch refused the job" in error
    assert "invalid partition" in error
