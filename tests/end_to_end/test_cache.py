"""`ipa data encode`, and training from what it made: the same run as from the pictures."""

import json

import pytest

from ipa_train.cli.main import main
from tests.end_to_end.conftest import forked, loss_curve


@pytest.fixture
def cached(train_command, tmp_path):
    """A function from overrides to `ipa data encode` of the shards; returns its exit status and the cache."""

    def encode(*options):
        return main(encode_command(train_command, tmp_path / "cache", *options)), tmp_path / "cache"

    return encode


def encode_command(train_command, cache, *options):
    overrides = [o for o in train_command("unused")[1:] if not o.startswith("run.")]
    return ["data", "encode", *overrides, "--out", str(cache), *options]


@pytest.mark.parametrize("adapter", ["linear", "plus"])
def test_training_from_the_cache_is_training_from_the_pictures(train_command, tmp_path, cached, adapter):
    """Same shards, same seed: the loss of every step is equal to the rounding of fp16."""
    both = [f"adapter={adapter}", "data.flip_rate=0.5", "trainer.max_steps=6"]
    assert main(train_command("online", *both)) == 0
    status, cache = cached("--flip", both[0])
    assert status == 0
    assert main(train_command("cached", *both, f"data.shards={cache}")) == 0
    online, offline = loss_curve(tmp_path / "online"), loss_curve(tmp_path / "cached")
    assert online.keys() == offline.keys() == set(range(1, 7))
    for step, loss in online.items():
        assert float(offline[step]) == pytest.approx(float(loss), rel=2e-3)


def test_a_run_from_the_cache_resumes_bit_equal_and_draws_its_grid(train_command, tmp_path, cached):
    _, cache = cached()
    options = [f"data.shards={cache}", "callbacks.sample_grid.every_steps=2"]
    options += ["callbacks.sample_grid.num_images=2", "callbacks.sample_grid.num_inference_steps=1"]
    assert main(train_command("whole", *options, "trainer.max_steps=4")) == 0
    for steps, workers in ((1, 2), (4, 0)):
        parts = (f"trainer.max_steps={steps}", f"data.num_workers={workers}")
        assert main(train_command("parts", *options, *parts)) == 0
    assert loss_curve(tmp_path / "parts") == loss_curve(tmp_path / "whole")
    assert (tmp_path / "whole" / "samples" / "step-00000004.png").is_file()
    assert main(["check", *train_command("checked", *options)[1:]]) == 0


def test_the_same_command_again_does_only_what_is_missing(cached, capsys):
    status, cache = cached()
    assert status == 0
    assert (
        "0 shards left to other tasks, 0 shards encoded before, 3 shards encoded, 60 samples, 0 bad"
        in capsys.readouterr().out
    )
    before = {path: path.stat().st_mtime_ns for path in cache.glob("*.tar")}
    (cache / "00001.json").unlink()
    assert cached()[0] == 0
    assert "2 shards encoded before, 1 shards encoded, 60 samples, 0 bad" in capsys.readouterr().out
    changed = [path.name for path in before if path.stat().st_mtime_ns != before[path]]
    assert changed == ["00001-32x32.tar"]
    assert json.loads((cache / "encode-report-00000.json").read_text())["ok"]


def test_processes_that_know_nothing_of_each_other_make_one_cache(train_command, tmp_path, cached):
    processes = [
        forked(encode_command(train_command, tmp_path / "shared", "--task-index", str(i), "--num-tasks", "2"))
        for i in range(2)
    ]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    _, alone = cached()
    for path in alone.glob("*.tar"):
        assert (tmp_path / "shared" / path.name).read_bytes() == path.read_bytes()
    assert (tmp_path / "shared" / "cache.json").read_bytes() == (alone / "cache.json").read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["base.path=/nowhere"], "base.path=/nowhere: no such folder, nor a hub id"),
        (["data.crop=random"], "features are of centre crops; set data.crop=center"),
        (["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["--task-index", "2", "--num-tasks", "2"], "--task-index=2 must be from 0 to --num-tasks - 1 = 1"),
        (["--out", "/proc/cache"], "--out /proc/cache: cannot be written"),
    ],
)
def test_a_mistake_is_one_line(train_command, tmp_path, capfd, options, message):
    assert main(encode_command(train_command, tmp_path / "cache", *options)) == 2
    (line,) = (line for line in capfd.readouterr().err.splitlines() if line.startswith("ipa "))
    assert message in line


def test_a_stream_cannot_be_encoded(train_command, tmp_path, shards, capfd):
    assert main(encode_command(train_command, tmp_path / "cache", "data=webdataset")) == 2
    assert "encoding reads them at random: use data=shards" in capfd.readouterr().err
    assert not (tmp_path / "cache").exists()


def test_another_encoder_or_adapter_is_refused_in_one_line(train_command, tmp_path, cached, capfd):
    _, cache = cached()
    for options, message in (
        (["adapter=plus"], "feature_kind was pooled, now penultimate"),
        (["data.resolution=64"], "data.resolution=64, but"),
    ):
        assert main(train_command("refused", f"data.shards={cache}", *options)) == 2
        captured = capfd.readouterr().err.strip().splitlines()[-1]
        assert message in captured
    assert not (tmp_path / "refused").exists()
