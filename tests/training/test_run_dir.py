import json
import subprocess
import sys

import pytest
import torch
import yaml

from ipa_train.errors import CheckpointError
from ipa_train.training.checkpoint import AdapterCheckpointIO, checkpoint_path
from ipa_train.training.run_dir import open_run

CONFIG = {
    "run": {"name": "a"},
    "base": {"path": "sd15", "dtype": "bfloat16"},
    "optimizer": {"lr": 1e-4, "betas": (0.9, 0.999)},
    "data": {"global_batch_size": 8, "num_workers": 2, "buckets": None},
    "trainer": {"max_steps": 10, "devices": 1},
    "callbacks": {},
}


def changed(**values):
    """CONFIG with other values: ``changed(data__num_workers=3)``."""
    config = {key: dict(value) for key, value in CONFIG.items()}
    for key, value in values.items():
        group, _, name = key.partition("__")
        config[group][name] = value
    return config


def start(path, config=CONFIG, *, reached=None, max_steps=10):
    run = open_run(path, config, max_steps=max_steps)
    if reached is not None:
        checkpoint = {"global_step": reached, "state_dict": {"w": torch.ones(1)}}
        AdapterCheckpointIO().save_checkpoint(checkpoint, checkpoint_path(run.checkpoints, reached))
    run.close()
    return run


def contents(path):
    return {p.relative_to(path): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def test_a_first_start_writes_what_explains_the_run(tmp_path):
    run = start(tmp_path / "outputs" / "a")
    assert run.resume_from is None
    assert yaml.safe_load((run.path / "config.yaml").read_text())["optimizer"]["lr"] == 1e-4
    versions = json.loads((run.path / "versions.json").read_text())
    assert versions["torch"] == torch.__version__
    assert versions["python"] == sys.version.split()[0]


def test_the_same_command_again_resumes_with_the_same_tracker_id(tmp_path):
    first = start(tmp_path / "a", reached=4)
    (first.checkpoints / ".tmp-step-00000005-123").mkdir()
    second = start(tmp_path / "a")
    assert second.resume_from == checkpoint_path(first.checkpoints, 4)
    assert second.tracker_id == first.tracker_id
    assert second.tracker_id != start(tmp_path / "b").tracker_id
    assert [p.name for p in first.checkpoints.iterdir()] == ["step-00000004"]


def test_a_finished_run_is_refused_until_it_is_made_longer(tmp_path):
    start(tmp_path / "a", reached=10)
    before = contents(tmp_path / "a")
    with pytest.raises(
        CheckpointError, match=r"finished at step 10: choose run\.name=OTHER, or raise trainer\.max_steps"
    ):
        start(tmp_path / "a")
    assert contents(tmp_path / "a").keys() == before.keys()
    longer = start(tmp_path / "a", changed(trainer__max_steps=20), max_steps=20)
    assert longer.resume_from is not None


@pytest.mark.parametrize(
    "config",
    [
        changed(data__num_workers=7),
        changed(trainer__devices=8, trainer__num_nodes=4),
        changed(run__name="elsewhere"),
        changed(callbacks__checkpointing={"every_steps": 5}),
    ],
)
def test_other_machines_and_other_views_may_resume(tmp_path, config):
    start(tmp_path / "a", reached=4)
    assert start(tmp_path / "a", config).resume_from is not None


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (changed(optimizer__lr=2e-4), r"optimizer\.lr: 0\.0001 -> 0\.0002"),
        (changed(data__global_batch_size=16), r"data\.global_batch_size: 8 -> 16"),
        (changed(base__noise=0.1), r"base\.noise: 'absent' -> 0\.1"),
        ({k: v for k, v in CONFIG.items() if k != "base"}, r"base\.dtype: 'bfloat16' -> 'absent'"),
        (changed(trainer__precision="16-mixed"), r"trainer\.precision"),
        (changed(trainer__devices_of_another_kind=1), r"trainer\.devices_of_another_kind"),
    ],
)
def test_another_config_is_refused_by_name_and_nothing_is_written(tmp_path, config, named):
    start(tmp_path / "a")
    before = contents(tmp_path / "a")
    with pytest.raises(CheckpointError, match=named + r".*run\.name=OTHER, or delete or rename"):
        start(tmp_path / "a", config)
    assert contents(tmp_path / "a") == before


def test_at_most_five_differences_are_listed(tmp_path):
    start(tmp_path / "a")
    config = changed(**{f"base__option{i}": i for i in range(7)})
    with pytest.raises(CheckpointError, match=r"base\.option4: 'absent' -> 4 and 2 more\)"):
        start(tmp_path / "a", config)


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"jpg")
    with pytest.raises(CheckpointError, match=r"holds 'cat\.jpg' but no config\.yaml"):
        start(tmp_path / "photos")
    assert [p.name for p in (tmp_path / "photos").iterdir()] == ["cat.jpg"]
    with pytest.raises(CheckpointError, match="is a file"):
        start(tmp_path / "photos" / "cat.jpg")


def test_a_process_that_died_at_its_very_start_is_no_obstacle(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "run.lock").write_text("process 1 on nowhere")
    (tmp_path / "a" / ".tmp-config.yaml-1").write_text("half")
    assert start(tmp_path / "a").resume_from is None


def test_a_damaged_tail_falls_back_and_only_damage_is_refused(tmp_path):
    run = start(tmp_path / "a", reached=2)
    start(tmp_path / "a", reached=4)
    (checkpoint_path(run.checkpoints, 4) / "state.pt").write_bytes(b"?")
    assert start(tmp_path / "a").resume_from == checkpoint_path(run.checkpoints, 2)
    (checkpoint_path(run.checkpoints, 2) / "state.pt").unlink()
    with pytest.raises(CheckpointError, match="none of the 2 checkpoints"):
        start(tmp_path / "a")


HOLD = """
import sys
from pathlib import Path
from ipa_train.training.run_dir import open_run
run = open_run(Path(sys.argv[1]), {"seed": 1}, max_steps=10)
print("open", flush=True)
sys.stdin.read()
"""


def test_a_run_in_use_is_refused_until_its_process_is_gone(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "a")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with holder:
        assert holder.stdout.readline() == "open\n"
        with pytest.raises(CheckpointError, match=f"in use by process {holder.pid} on "):
            start(tmp_path / "a", {"seed": 1})
        holder.kill()
        holder.wait()
        assert start(tmp_path / "a", {"seed": 1}).resume_from is None


def test_only_rank_0_writes(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    run = start(tmp_path / "a")
    assert run.tracker_id is None
    assert not (tmp_path / "a").exists()


def test_other_versions_at_a_resume_are_named(tmp_path, caplog):
    run = start(tmp_path / "a")
    versions = json.loads((run.path / "versions.json").read_text())
    (run.path / "versions.json").write_text(json.dumps(versions | {"torch": "1.0"}))
    start(tmp_path / "a")
    assert f"torch 1.0 -> {torch.__version__}" in caplog.text
