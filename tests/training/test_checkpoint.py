import logging
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from ipa_train.errors import CheckpointError
from ipa_train.training.checkpoint import (
    AdapterCheckpointIO,
    checkpoint_path,
    list_checkpoints,
    newest_valid,
    prune,
    remove_temporaries,
)


@pytest.fixture
def save(tmp_path):
    def save_step(step, **more):
        weights = {"adapter.weight": torch.full((3,), float(step))}
        path = checkpoint_path(tmp_path, step)
        AdapterCheckpointIO().save_checkpoint({"global_step": step, "state_dict": weights, **more}, path)
        return path

    return save_step


def test_what_is_saved_comes_back(save):
    ema = {"num_updates": 7, "weights": {"weight": torch.ones(2)}}
    path = save(3, ema=ema, optimizer_states=[{"state": {0: {"step": torch.tensor(3.0)}}}], lr_schedulers=[])
    loaded = AdapterCheckpointIO().load_checkpoint(path)
    torch.testing.assert_close(loaded["state_dict"]["adapter.weight"], torch.full((3,), 3.0), rtol=0, atol=0)
    assert loaded["ema"]["num_updates"] == 7
    assert loaded["ema"]["weights"]["weight"].tolist() == [1, 1]
    assert loaded["optimizer_states"][0]["state"][0]["step"] == 3


def test_files_follow_the_umask(save):
    before = os.umask(0o027)
    try:
        path = save(1)
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in path.iterdir()} == {0o640}
    assert path.stat().st_mode & 0o777 == 0o750


def flip_a_byte(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("name", ["adapter.safetensors", "state.pt"])
@pytest.mark.parametrize("damage", [flip_a_byte, Path.unlink, lambda file: file.write_bytes(file.read_bytes()[:-1])])
def test_a_damaged_checkpoint_is_named_and_passed_over(save, tmp_path, caplog, name, damage):
    older, newer = save(1), save(2)
    damage(newer / name)
    with caplog.at_level(logging.WARNING):
        assert newest_valid(tmp_path) == older
    assert str(newer) in caplog.text
    assert name in caplog.text


def test_the_run_can_come_past_a_damaged_checkpoint_again(save, tmp_path):
    save(1)
    (save(2) / "manifest.json").write_text("{}")
    newest = save(2)
    assert newest_valid(tmp_path) == newest
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]


def test_no_checkpoints_is_a_first_start(tmp_path):
    assert newest_valid(tmp_path / "checkpoints") is None
    assert newest_valid(tmp_path) is None


def test_order_is_by_step_beyond_eight_digits(save, tmp_path):
    paths = [save(step) for step in (99_999_999, 5, 100_000_000)]
    assert list_checkpoints(tmp_path) == [paths[1], paths[0], paths[2]]


def test_only_the_leftovers_of_saves_are_removed(save, tmp_path):
    path = save(1)
    (tmp_path / "notes.txt").write_text("mine")
    shutil.copytree(path, tmp_path / ".tmp-step-00000002-123")
    remove_temporaries(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes.txt", "step-00000001"]


def test_prune_without_milestones(save, tmp_path):
    for step in (1, 2, 3):
        save(step)
    prune(tmp_path, keep_last=1)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-00000003"]


def test_what_could_not_be_read_again_is_refused_at_once(save, tmp_path):
    with pytest.raises(CheckpointError, match=r"pathlib\.PosixPath that could not be read again"):
        save(1, callbacks={"Mine": {"folder": tmp_path}})
    assert not list(tmp_path.iterdir())


def test_a_pickle_in_place_of_the_state_is_not_run(save, tmp_path):
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "run",)

    path = save(1)
    torch.save(Evil(), path / "state.pt")
    with pytest.raises(Exception, match="Weights only load failed"):
        AdapterCheckpointIO().load_checkpoint(path, weights_only=False)
    assert not (tmp_path / "run").exists()


def test_nothing_but_damage_is_an_error_with_the_way_out(save, tmp_path):
    for step in (1, 2):
        (save(step) / "state.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"none of the 2 checkpoints in .* run\.name"):
        newest_valid(tmp_path)


@pytest.fixture(scope="module")
def faults():
    """What faults.py wrote, line by line: kills, two limits on file sizes, no permission, and a full disk if root."""
    root = Path(tempfile.mkdtemp())  # pytest's own folders are closed to other users
    root.chmod(0o755)
    (root / "full").mkdir()
    small_disk = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(root / "full")]
    mounted = subprocess.run(small_disk, capture_output=True, check=False).returncode == 0
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, str(Path(__file__).with_name("faults.py")), str(root)]
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
    finally:
        if mounted:
            subprocess.run(["umount", str(root / "full")], check=True)
        (root / "forbidden").chmod(0o755)
        shutil.rmtree(root)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_kill_at_any_moment_of_a_save_leaves_a_loadable_checkpoint(faults):
    assert "50 kills" in faults[0]


@pytest.mark.parametrize(
    ("line", "reason"),
    [(1, "File too large"), (2, "File too large"), (3, "Permission denied"), (4, "No space left on device")],
    ids=["weights too large", "state too large", "no permission", "disk full"],
)
def test_a_save_that_cannot_be_written_says_so_and_leaves_the_rest_alone(faults, line, reason):
    if line == len(faults) == 4:
        pytest.skip("mounting a small disk needs root")
    assert faults[line].startswith("CheckpointError: cannot write checkpoint")
    assert reason in faults[line]
