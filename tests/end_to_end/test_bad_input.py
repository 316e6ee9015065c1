"""A user's mistake: one clear line, exit status 2, and nothing half-written."""

import json
import re
import shutil
import subprocess
import sys

import pytest

from ipa_train.cli.main import main
from tests.data.conftest import encode, picture, write_shard


@pytest.fixture
def refused(capfd, tmp_path):
    """A function that runs a command, expects it to be refused, and returns the one line."""

    def refused(command, *, run="bad"):
        capfd.readouterr()
        assert main(command) == 2
        error = capfd.readouterr().err
        lines = [line for line in error.splitlines() if line.startswith("ipa ")]
        assert len(lines) == 1, error
        assert "Traceback" not in error
        assert not (tmp_path / run / "checkpoints").exists()
        return lines[0]

    return refused


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.resolution=36", "data.resolution=36 must be a multiple of 8"),
        ("data.batch_size=3", "data.batch_size=3 does not divide"),
        ("trainer.devices=3 trainer.strategy=ddp", "data.global_batch_size=4 cannot be shared equally by 3 processes"),
        (
            "adapter.projector.num_tokens=8",
            "diffusers would not load this adapter: it knows linear adapters of 4 tokens",
        ),
        ("base.path=/nowhere", "base.path=/nowhere: neither a local folder nor a hub id"),
        ("data.shards=/nowhere", "data.shards=/nowhere: 1 of 1 files missing"),
        ("adapter.init_from=/nowhere.bin", "/nowhere.bin: no such file"),
        ("trainer.max_stepz=3", "Did you mean 'trainer.max_steps'"),
        ("trainer.max_steps=-5", "lightning.Trainer: `max_steps` must be"),
        ("trainer.log_every_n_steps=0", "trainer.log_every_n_steps must be above 0"),
        ("trainer.gradient_clip_val=-1", "trainer.gradient_clip_val must be above 0"),
        (
            "trainer.precision=bf16-mixed trainer.gradient_clip_val=1.0",
            "trainer.precision=bf16-mixed with trainer.gradient_clip_val needs optimizer.fused=false",
        ),
        ("optimizer.lr=-1", "torch.optim.AdamW: Invalid learning rate: -1"),
        ("data.window_size=0", "data.window_size must be at least 1"),
        ("data.global_batch_size=0", "data.global_batch_size must be at least 1"),
        ("base.dtype=bflot16", "base.dtype='bflot16' is not a precision. Did you mean 'bfloat16'"),
        ("image_encoder.dtype=flot32", "image_encoder.dtype='flot32' is not a precision. Did you mean 'float32'"),
    ],
)
def test_wrong_options(override, message, train_command, refused, tmp_path):
    assert message in refused(train_command("bad", *override.split()))
    assert not (tmp_path / "bad").exists(), "nothing half-written"


def test_wrong_folders(train_command, refused, tiny_models, tmp_path):
    line = refused(train_command("bad", f"base.path={tiny_models[1]}"))
    assert "no model_index.json there" in line
    line = refused(train_command("bad", f"image_encoder.path={tiny_models[0] / 'text_encoder'}"))
    assert "'clip_text_model'" in line
    assert not (tmp_path / "bad").exists()


def test_damaged_shards(train_command, refused, shards, tmp_path):
    bad = shutil.copytree(shards, tmp_path / "shards", ignore=shutil.ignore_patterns("*.npy", "index.json"))
    tar = bad / "00001.tar"
    whole = tar.read_bytes()
    tar.write_bytes(whole[:5000])
    assert "00001.tar: truncated inside the member" in refused(train_command("bad", f"data.shards={bad}"))
    tar.write_bytes(b"")
    assert "00001.tar: truncated at byte 0" in refused(train_command("bad", f"data.shards={bad}"))
    write_shard(bad, 1, {})
    assert "00001.tar: no sample" in refused(train_command("bad", f"data.shards={bad}"))


def test_a_run_stops_when_a_shard_is_mostly_bad(train_command, refused, tmp_path):
    folder = tmp_path / "mostly_bad"
    samples = {f"{i:04d}": {"jpg": b"\xff\xd8 no picture", "txt": "bad"} for i in range(3)}
    write_shard(folder, 0, samples)
    write_shard(folder, 1, {f"{i:04d}": {"jpg": encode(picture(i)), "txt": "good"} for i in range(30)})
    command = train_command("stops", f"data.shards={folder}", "trainer.max_steps=50")
    line = refused(command, run="nothing")
    assert f"more than half of {folder / '00000.tar'} is bad" in line
    (log,) = (tmp_path / "stops").glob("bad_samples-*.jsonl")
    failures = [json.loads(text) for text in log.read_text().splitlines()]
    assert {f["shard"] for f in failures} == {str(folder / "00000.tar")}
    assert all(f["error"].startswith("cannot decode") for f in failures)


def test_finished_and_foreign_runs(train_command, refused, tmp_path):
    assert main(train_command("first", "trainer.max_steps=1")) == 0
    assert "has finished at step 1" in refused(train_command("first", "trainer.max_steps=1"))
    line = refused(train_command("first", "trainer.max_steps=2", "dropout.text_rate=0.5"))
    assert "belongs to another config (dropout.text_rate: 0.05 -> 0.5)" in line
    assert (tmp_path / "first" / "checkpoints" / "step-00000001").is_dir()


def test_other_shards_are_refused_and_moved_ones_are_not(train_command, shards, tmp_path, capfd):
    assert main(train_command("moved", "trainer.max_steps=1")) == 0
    moved = shutil.copytree(shards, tmp_path / "moved_shards")
    assert main(train_command("moved", "trainer.max_steps=2", f"data.shards={moved}")) == 0
    (moved / "00002.tar").unlink()
    capfd.readouterr()
    assert main(train_command("moved", "trainer.max_steps=3", f"data.shards={moved}")) == 2
    assert "data.shards are not the ones of the checkpoint" in capfd.readouterr().err
    allowed = train_command("moved", "trainer.max_steps=3", f"data.shards={moved}", "data.allow_index_change=true")
    assert main(allowed) == 0


def test_other_verbs(refused, tiny_models, tmp_path, capfd):
    assert "neither a checkpoint nor a run" in refused(["export", str(tmp_path), "--out", str(tmp_path / "out")])
    assert "no such file" in refused(["import", "nothing.bin"])
    sample = ["sample", "--adapter", "nothing.bin", "--image", str(tmp_path / "no.jpg")]
    assert "no picture that can be read" in refused(sample)
    assert main(["trian"]) == 2
    assert "no verb 'trian'. Did you mean 'train'" in capfd.readouterr().err


def test_every_rank_stops_with_the_same_words(train_command, tmp_path):
    """Bad samples that one rank meets are everyone's: no rank is left waiting, and none ends in a traceback."""
    samples = {f"{i:04d}": {"jpg": encode(picture(i)), "txt": "good"} for i in range(40)}
    samples |= {f"{i:04d}": {"jpg": b"\xff\xd8 no picture", "txt": "bad"} for i in range(3)}
    write_shard(tmp_path / "shards", 0, samples)
    options = [f"data.shards={tmp_path / 'shards'}", "data.max_bad_rate=0.00001", "trainer.max_steps=100"]
    options += ["trainer.devices=2", "trainer.strategy=ddp"]
    command = [sys.executable, "-m", "ipa_train.cli.main", *train_command("ranks", *options)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    (first,) = re.findall(r"^ipa train: (.*)$", done.stderr, re.MULTILINE)
    (second,) = re.findall(r"^ipa train \(rank 1\): (.*)$", done.stderr, re.MULTILINE)
    assert first == second
    assert re.search(r"\d of the last \d+ samples are bad .*worst shards: .*00000\.tar \(\d\)", first)
