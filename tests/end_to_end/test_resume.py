"""The same command again goes on exactly where the run stopped, however it stopped."""

import csv
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from ipa_train.cli.main import main
from ipa_train.training.checkpoint import list_checkpoints, step_of
from tests.data.conftest import write_paired_shards, write_shards
from tests.end_to_end.conftest import forked, loss_curve


def adapter_weights(run):
    newest = sorted((run / "checkpoints").glob("step-*"))[-1]
    return load_file(newest / "adapter.safetensors")


@pytest.fixture
def uninterrupted(train_command, tmp_path):
    """A run of six steps in one go."""
    assert main(train_command("whole", "trainer.max_steps=6")) == 0
    return tmp_path / "whole"


def test_resumed_with_other_workers_is_bit_equal(train_command, tmp_path, uninterrupted):
    for max_steps, workers in ((2, 0), (3, 2), (6, 1)):
        options = (f"trainer.max_steps={max_steps}", f"data.num_workers={workers}")
        assert main(train_command("parts", *options)) == 0
    assert loss_curve(tmp_path / "parts") == loss_curve(uninterrupted)
    whole, parts = adapter_weights(uninterrupted), adapter_weights(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_resumed_with_micro_batches_it_takes_the_same_steps(train_command, tmp_path, uninterrupted):
    """Stopped after an odd number of steps, so that an old count of micro-batches would shift the new steps."""
    for max_steps, batch_size in ((3, "null"), (4, 2), (6, 1)):
        options = (f"trainer.max_steps={max_steps}", f"data.batch_size={batch_size}")
        assert main(train_command("micro", *options)) == 0
    whole, parts = loss_curve(uninterrupted), loss_curve(tmp_path / "micro")
    assert whole.keys() == parts.keys()
    for step, loss in whole.items():
        assert float(parts[step]) == pytest.approx(float(loss), rel=1e-5)


def test_augmented_references_resume_bit_equal_and_matter(train_command, tmp_path):
    paired = write_paired_shards(tmp_path / "paired", (12, 7))
    options = [f"data.shards={paired}", "data.image_prompt=reference", "data.reference_mask=crop", "data.crop=random"]
    options += ["data.reference_augment.colour_jitter=0.5", "data.reference_augment.max_rotation_degrees=20"]
    assert main(train_command("whole", *options, "trainer.max_steps=5")) == 0
    for steps, workers in ((2, 1), (5, 0)):
        assert main(train_command("parts", *options, f"trainer.max_steps={steps}", f"data.num_workers={workers}")) == 0
    assert loss_curve(tmp_path / "parts") == loss_curve(tmp_path / "whole")
    assert main(train_command("plain", *options[:4], "trainer.max_steps=5")) == 0
    assert loss_curve(tmp_path / "plain") != loss_curve(tmp_path / "whole")


def test_buckets_and_mixed_sources_resume_bit_equal(train_command, tmp_path, capsys):
    """Stopped between batches of several shapes from two weighted sources; resumed with other workers."""
    sizes = [(64, 64), (64, 128), (128, 64)]
    sources = {name: write_shards(tmp_path / name, (16, 9), sizes=sizes) for name in ("a", "b")}
    options = [f"data.shards={{a: {sources['a']}, b: {sources['b']}}}", "data.weights={a: 0.7, b: 0.3}"]
    options += ["data.resolution=64", "data.bucket_step=8", "data.min_bucket_rate=0", "data.crop=random"]
    assert main(train_command("whole", *options, "trainer.max_steps=7")) == 0
    for steps, workers in ((3, 2), (4, 0), (7, 1)):
        assert main(train_command("parts", *options, f"trainer.max_steps={steps}", f"data.num_workers={workers}")) == 0
    assert loss_curve(tmp_path / "parts") == loss_curve(tmp_path / "whole")
    whole, parts = adapter_weights(tmp_path / "whole"), adapter_weights(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    with (tmp_path / "whole" / "metrics.csv").open() as file:
        last = list(csv.DictReader(file))[-1]
    assert float(last["data/epochs_a"]) == pytest.approx(0.7 * 7 * 4 / 25, abs=1 / 25)
    assert float(last["data/epochs_b"]) == pytest.approx(0.3 * 7 * 4 / 25, abs=1 / 25)
    assert main(["check", *train_command("checked", *options)[1:]]) == 0
    shown = capsys.readouterr().out
    assert "a: 25 samples, 70.0% of what is seen" in shown
    assert "64x64 (height x width): 3" in shown


def test_two_processes_equal_one(train_command, tmp_path, uninterrupted):
    command = train_command("two", "trainer.max_steps=6", "trainer.devices=2", "trainer.strategy=ddp")
    subprocess.run([sys.executable, "-m", "ipa_train.cli.main", *command], check=True, timeout=300)
    whole, two = loss_curve(uninterrupted), loss_curve(tmp_path / "two")
    assert whole.keys() == two.keys()
    for step, loss in whole.items():
        assert float(two[step]) == pytest.approx(float(loss), rel=1e-5)


def test_killed_at_random_moments_it_always_resumes(train_command, tmp_path):
    """SIGKILL 20 times, in start-up, steps and saves; the run then ends with the curve of one that was left alone."""
    rng = random.Random(0)
    every = "callbacks.checkpointing.every_steps=3"
    run, moments = tmp_path / "killed", []
    start_seconds = 0.0
    for _ in range(20):
        process = forked(train_command("killed", "trainer.max_steps=100000", every))
        began = time.perf_counter()
        while not start_seconds and not loss_curve(run):  # how long a start takes here, learnt from the first
            assert process.is_alive()
            time.sleep(0.05)
        start_seconds = start_seconds or time.perf_counter() - began
        time.sleep(rng.uniform(0.1, 2.5) * start_seconds)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL, "it must have been at work until it was killed"
        moments.append(len(loss_curve(run)))
    assert moments[-1] > moments[0], "it must get on between the kills"
    steps = max(step_of(p) for p in list_checkpoints(run / "checkpoints")) + 2
    for name in ("killed", "left_alone"):
        process = forked(train_command(name, f"trainer.max_steps={steps}", every))
        process.join()
        assert process.exitcode == 0
    assert loss_curve(run) == loss_curve(tmp_path / "left_alone")
