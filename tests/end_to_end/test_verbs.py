"""The other verbs, on a short real run."""

import csv
import json
import re

from PIL import Image
from safetensors import safe_open

from ipa_train.cli.main import main
from tests.data.conftest import picture


def test_a_run_leaves_what_it_promises(run):
    for name in ("config.yaml", "versions.json", "tracker.json", "metrics.csv", "samples/step-00000004.png"):
        assert (run / name).is_file(), name
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["2", "4"]
    for name in (
        "train/loss",
        "train/grad_norm",
        "train/lr",
        "perf/images_per_second",
        "perf/data_wait_fraction",
        "perf/peak_memory_gib",
        "data/dropped_text",
        "data/bad_fraction",
    ):
        assert float(rows[-1][name]) >= 0, name
    assert any(name.startswith("train/loss_t") for name in rows[0])
    assert list((run / "wandb").glob("offline-run-*"))
    assert not list(run.rglob(".tmp-*"))


WRITTEN_AS_JSON = ("base", "dropout", "step", "ema", "optimizer", "image_encoder")


def test_a_checkpoints_export_says_how_it_was_made(run, tiny_models, image_encoder):
    with safe_open(run / "checkpoints" / "step-00000004" / "ip_adapter.safetensors", framework="pt") as file:
        metadata = {k: json.loads(v) for k, v in file.metadata().items() if k in WRITTEN_AS_JSON}
    assert metadata["base"] == {"name": tiny_models[0].name, "prediction_type": "epsilon"}
    assert metadata["dropout"] == {"text_rate": 0.05, "image_rate": 0.05, "both_rate": 0.05}
    assert (metadata["step"], metadata["ema"], metadata["optimizer"]["lr"]) == (4, True, 1e-4)
    assert metadata["image_encoder"]["weights_sha256"] == image_encoder.identity()["weights_sha256"]


def test_export_sample_and_import(run, tiny_models, tmp_path, capsys):
    out = tmp_path / "exported"
    assert main(["export", str(run), "--out", str(out)]) == 0
    assert "diffusers: loads" in capsys.readouterr().out
    photo = tmp_path / "photo.png"
    picture(0).save(photo)
    command = ["sample", "--base", str(tiny_models[0]), "--image-encoder", str(tiny_models[1]), "--image", str(photo)]
    command += ["--adapter", str(out / "ip_adapter.safetensors"), "--num", "2", "--steps", "2", "--size", "64"]
    assert main([*command, "--out", str(tmp_path / "a")]) == 0
    assert main([*command, "--scale", "0", "--out", str(tmp_path / "b")]) == 0
    a, b = (Image.open(tmp_path / x / "0-photo-1.png") for x in "ab")
    assert a.size == (64, 64)
    assert a.tobytes() != b.tobytes()
    assert (tmp_path / "a" / "grid.png").is_file()


def test_raw_and_averaged_weights_differ(run, tmp_path):
    for flags, name in (([], "ema"), (["--no-ema"], "raw")):
        assert main(["export", str(run), "--dtype", "fp32", "--out", str(tmp_path / name), *flags]) == 0
    ema, raw = ((tmp_path / name / "ip_adapter.bin").read_bytes() for name in ("ema", "raw"))
    assert ema != raw
    newest = run / "checkpoints" / "step-00000004"
    assert (newest / "ip_adapter.bin").read_bytes() == ema, "a checkpoint's own export is the averaged one"


def test_an_export_starts_another_run(run, tiny_models, shards, tmp_path):
    command = [
        "check",
        "experiment=sd15_linear",
        f"base.path={tiny_models[0]}",
        f"image_encoder.path={tiny_models[1]}",
        "image_encoder.subfolder=''",
        f"adapter.init_from={run / 'checkpoints' / 'step-00000004' / 'ip_adapter.safetensors'}",
        f"data.shards={shards}",
        "data.resolution=32",
        "data.global_batch_size=4",
        "trainer=cpu",
        "run.name=second",
        f"run.path={tmp_path / 'second'}",
    ]
    assert main(command) == 0
    assert not (tmp_path / "second").exists()


def test_check_reports(tiny_models, shards, tmp_path, capsys, train_command):
    assert main(["check", *train_command("checked")[1:]]) == 0
    report = capsys.readouterr().out
    for text in ("every option fits", "60 samples in 3 shards", "1 processes x 1 micro-batches x 4 samples", "frozen"):
        assert text in report
    for text in ("trained", "gradient norm", "peak memory", "diffusers               loads", "all good"):
        assert text in report
    assert not (tmp_path / "checked").exists()
    assert re.search(r"memory +\d\.\d\d GiB for each device: frozen weights 0\.\d\d, adapter .*, activations", report)
    assert re.search(r"memory +this machine has room for .* micro-batches of up to [\d,]{3,} samples", report)
    assert re.search(r"time +[\d.e-]+ TFLOP per image: encoders [\d.e-]+, forward [\d.e-]+, backward", report)
    assert "images/s on 1 x this machine (measured)" in report
    assert re.search(r"time +[\d,]+ steps of 4 samples: [\d.,e+-]+ hours, [\d.,e+-]+ device-days", report)


def test_check_forecasts_for_gpus_that_are_elsewhere(train_command, capsys):
    command = ["check", *train_command("checked")[1:], "data.global_batch_size=64", "trainer.max_steps=1000"]
    assert main([*command, "--gpu", "h100", "--gpus", "8"]) == 0
    report = capsys.readouterr().out
    assert "8 processes x 1 micro-batches x 8 samples" in report
    assert "H100 has room for 78.1 GiB" in report
    assert "images/s on 8 x H100 (assuming 35% of its peak)" in report
    assert "1,000 steps of 64 samples" in report


def test_index(shards, capsys):
    assert main(["data", "index", str(shards)]) == 0
    assert "index: 60 samples, 3 shards, 0 incomplete samples left out" in capsys.readouterr().out
