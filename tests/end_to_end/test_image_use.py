"""Validation in a real run: the same from any ranks and from a cache, and without a trace in the training."""

import csv
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from ipa_train.cli.build import build_data, build_module, build_trainer
from ipa_train.cli.config import load_config
from ipa_train.cli.main import main
from ipa_train.errors import ConfigError
from ipa_train.training.checkpoint import list_checkpoints, step_of
from tests.end_to_end.conftest import loss_curve, write_shards

SMALL = ["callbacks.image_use.every_steps=2", "callbacks.image_use.num_samples=12", "callbacks.image_use.batch_size=4"]


def scoring(scorers):
    """Options that score two pictures each time."""
    options = [*zip(("clip", "dino"), scorers, strict=True), ("every_steps", 2), ("num_samples", 2), ("batch_size", 1)]
    return [f"callbacks.generation_scores.{name}={value}" for name, value in (*options, ("num_inference_steps", 1))]


def measured(run):
    """What was measured, by step."""
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    names = [name for name in rows[0] if name.startswith(("val/", "image_to_text/"))]
    found = {}
    for row in rows:
        if numbers := {name: float(row[name]) for name in names if row[name]}:
            found[int(row["step"])] = found.get(int(row["step"]), {}) | numbers
    return found


def test_it_is_measured_without_a_trace_and_goes_on_alike_after_a_resume(train_command, tmp_path):
    off = ["callbacks.image_use.every_steps=0", "trainer.max_steps=4"]
    assert main(train_command("without", *off)) == 0
    for steps in (3, 4):
        assert main(train_command("with", *SMALL, f"trainer.max_steps={steps}")) == 0
    assert loss_curve(tmp_path / "with") == loss_curve(tmp_path / "without")
    ours, theirs = (
        load_file(tmp_path / name / "checkpoints" / "step-00000004" / "adapter.safetensors")
        for name in ("with", "without")
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)

    assert main(train_command("whole", *SMALL, "trainer.max_steps=4")) == 0
    found = measured(tmp_path / "whole")
    assert found == measured(tmp_path / "with")
    assert list(found) == [2, 4]
    for numbers in found.values():
        assert numbers["val/gap_other"] != 0 != numbers["val/gap_none"]
        assert numbers["val/gap_other_ci"] > 0
        assert sum(name.startswith("image_to_text/") for name in numbers) > 4
        quarters = sum(numbers[f"val/loss_t{i}"] for i in range(4)) / 4
        assert quarters == pytest.approx(numbers["val/loss"], rel=1e-5)


def test_two_processes_measure_what_one_does_of_the_same_weights(train_command, tmp_path, tiny_scorers):
    """The learning rate is so small that weights stay alike; three pieces are not the same share for both."""
    options = [*SMALL, *scoring(tiny_scorers), "trainer.max_steps=2", "optimizer.lr=1e-12"]
    assert main(train_command("one", *options)) == 0
    command = train_command("two", *options, "trainer.devices=2", "trainer.strategy=ddp")
    subprocess.run([sys.executable, "-m", "ipa_train.cli.main", *command], check=True, timeout=300)
    assert measured(tmp_path / "two") == measured(tmp_path / "one")
    assert {"val/gap_other", "val/clip_i", "val/clip_t", "val/dino"} < measured(tmp_path / "one")[2].keys()


def test_the_best_by_a_score_is_kept_and_exported(train_command, tmp_path, tiny_scorers):
    options = [*scoring(tiny_scorers), "callbacks.checkpointing.keep_last=1", "optimizer.lr=0.1"]
    options += ["callbacks.checkpointing.keep_best=val/clip_i", "callbacks.early_stopping.metric=val/clip_i"]
    options += ["callbacks.early_stopping.patience=1", "callbacks.early_stopping.mode=min"]
    for _ in range(2):  # the second finds that it had stopped
        assert main(train_command("run", *options, "trainer.max_steps=40")) == 0
    found = {step: numbers["val/clip_i"] for step, numbers in measured(tmp_path / "run").items()}
    best = max(found, key=found.get)
    checkpoints = tmp_path / "run" / "checkpoints"
    assert [step_of(path) for path in list_checkpoints(checkpoints)] == sorted({0, best, max(found)})
    *_, before, last = found.values()
    assert max(found) < 40
    assert last >= before
    assert main(["export", str(checkpoints / "best"), "--dtype", "fp32", "--out", str(tmp_path / "exported")]) == 0
    ours, theirs = (
        load_file(folder / "ip_adapter.safetensors") for folder in (tmp_path / "exported", checkpoints / "best")
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_held_out_shards_may_be_cached_as_the_training_shards_are(train_command, tmp_path, capsys):
    held_out = write_shards(tmp_path / "held_out", num_shards=1, per_shard=14, size=48)
    options = [*SMALL, "trainer.max_steps=2"]
    assert main(train_command("pictures", *options, f"callbacks.image_use.shards={held_out}")) == 0
    assert "not trained on before" not in capsys.readouterr().err
    config = train_command("cache")[1:]
    source = next(option for option in config if option.startswith("data.shards="))
    for name, of in (("train", source), ("held_out", f"data.shards={held_out}")):
        arguments = [*(option for option in config if option != source), of]
        assert main(["data", "encode", *arguments, "--out", str(tmp_path / "cache" / name)]) == 0
    cached = [f"data.shards={tmp_path}/cache/train", f"callbacks.image_use.shards={tmp_path}/cache/held_out"]
    assert main(train_command("cached", *options, *cached)) == 0
    online, from_cache = (measured(tmp_path / name)[2] for name in ("pictures", "cached"))
    for name, value in online.items():
        assert from_cache[name] == pytest.approx(value, rel=2e-2, abs=2e-4), name


def test_samples_of_the_training_shards_are_those_that_come_last(train_command):
    config = load_config([*train_command("x")[1:], *SMALL, "data.num_lanes=2", "data.window_size=10"])
    module = build_module(config)
    data = build_data(config, module)
    trainer = build_trainer(config, module, data)
    (callback,) = (one for one in trainer.callbacks if type(one).__name__ == "ImageUse")
    keys = set(callback._samples.batch(0, 12).keys)
    assert len(keys) == 12
    steps = callback._samples.held_out_steps
    assert steps == 9  # 60 samples in two lanes: the last 12 of the first lane begin at position 36
    batches = iter(data.loader())
    seen = [key for _ in range(15) for key in next(batches).batch.keys]
    assert not keys & set(seen[: 4 * steps])
    assert keys < set(seen)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["num_samples=12"], r"num_samples must be at least 8 and a multiple of .*batch_size=16, got 12"),
        (["batch_size=1"], "batch_size must be at least 2"),
        (["every_steps=-1"], r"every_steps must be at least 0 \(off\)"),
        (["shards={shards}/00001.tar"], r"00001\.tar is one of data\.shards too"),
        (["shards={few}"], "there are 5 samples, and it takes 16"),
        (
            ["every_steps=0", "shards={few}", "early"],
            r"early_stopping\.metric=val/gap_other: nothing in this run measures",
        ),
    ],
)
def test_mistakes_are_named_before_anything_is_written(train_command, shards, tmp_path, options, message):
    few = write_shards(tmp_path / "few", num_shards=1, per_shard=5)
    given = [f"callbacks.image_use.{option.format(shards=shards, few=few)}" for option in options if "=" in option]
    given += ["callbacks.early_stopping.metric=val/gap_other"] if "early" in options else []
    config = load_config([*train_command("x")[1:], *given])
    module = build_module(config)
    with pytest.raises(ConfigError, match=message):
        build_trainer(config, module, build_data(config, module))
    assert not (tmp_path / "x").exists()


def test_too_few_training_samples_turn_it_off_aloud(train_command, tmp_path, capsys):
    few = write_shards(tmp_path / "few", num_shards=1, per_shard=5)
    assert main(train_command("x", f"data.shards={few}", "trainer.max_steps=1")) == 0
    assert "image_use is off: there are 5 samples" in capsys.readouterr().err
