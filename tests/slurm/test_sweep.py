"""`ipa train -m`: a run for each combination, here or by Hydra's Slurm launcher."""

import pytest

from ipa_train.cli.main import main
from tests.end_to_end.conftest import loss_curve

SWEEP = ["train", "-m", "optimizer.lr=1e-4,3e-4", "trainer.max_steps=2"]


def test_jobs_that_share_a_run_are_refused(tiny_run, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert main([*SWEEP, *tiny_run, "run.name=same"]) == 2
    assert "2 jobs, and two of them in outputs/same: let run.name say what differs, e.g. run.name='first-${op" in (
        capfd.readouterr().err
    )
    assert not list(tmp_path.iterdir())


def test_every_job_is_looked_at_before_one_is_started(tiny_run, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    options = ["run.name=${data.resolution}", "data.resolution=32,large"]
    assert main([*SWEEP, *tiny_run, *options]) == 2
    assert "data.resolution=large does not fit" in capfd.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.fixture
def swept(tmp_path):
    """A function that says what the runs of SWEEP left."""
    return lambda: {lr: loss_curve(tmp_path / "outputs" / f"lr-{lr}") for lr in ("0.0001", "0.0003")}


def test_on_slurm_each_job_is_a_run_of_its_own(cluster, tiny_run, tmp_path, monkeypatch, swept):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="pip install 'ipa-train[slurm]'")
    monkeypatch.chdir(tmp_path)
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    where = ["hydra/launcher=slurm", "hydra.launcher.cpus_per_task=1", "hydra.launcher.timeout_min=9"]
    assert main([*SWEEP, *tiny_run, "run.name='lr-${optimizer.lr}'", *where]) == 0
    low, high = swept().values()
    assert list(low) == list(high) == [1, 2]
    assert low[1] == high[1]
    assert low[2] != high[2]


def test_a_job_that_fails_ends_the_sweep_as_it_ended(tiny_run, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main([*SWEEP, *tiny_run, "run.name='lr-${optimizer.lr}'", "data.shards=nowhere"])
    assert stop.value.code == 2
    assert capfd.readouterr().err.count("ipa train: ") == 1
