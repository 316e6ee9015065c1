"""The demo's world: shards as img2dataset writes them, and a base that real diffusers loads."""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pyarrow.parquet as pq
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from examples.tiny_world import image_use
from examples.tiny_world.draw_shards import write_shard
from examples.tiny_world.models import Judge, read_attributes
from examples.tiny_world.scenes import draw_scenes, render
from ipa_train.data.index import build_index
from tests.data.conftest import encode, picture

ROOT = Path(__file__).parents[2]
BASE = ROOT / "examples" / "tiny_world" / "base"


def test_shards_have_img2datasets_layout(tmp_path):
    write_shard(tmp_path, 3, draw_scenes(20, seed=1))
    assert build_index(str(tmp_path)).counts.tolist() == [20]
    with tarfile.open(tmp_path / "00003.tar") as tar:
        assert {Path(m.name).suffix for m in tar} == {".jpg", ".txt", ".json"}
        row = json.loads(tar.extractfile("000030000.json").read())
    table = pq.read_table(tmp_path / "00003.parquet").to_pylist()
    assert len(table) == 20
    assert table[0] == row
    assert json.loads((tmp_path / "00003_stats.json").read_text())["successes"] == 20


def test_scenes_are_drawn_alike_and_captions_name_the_shape():
    a, b = draw_scenes(50, seed=2), draw_scenes(50, seed=2)
    assert torch.equal(render(a), render(b))
    assert 0 <= render(a).min() <= render(a).max() <= 1
    for i in range(50):
        assert a.caption(i, template=0).split()[1] in a.rich_caption(i)


def test_the_judge_reads_held_out_scenes():
    judge = Judge().eval()
    judge.load_state_dict({name: w.float() for name, w in load_file(BASE / "judge.safetensors").items()})
    scenes = draw_scenes(100, seed=31)
    with torch.no_grad():
        read = read_attributes(judge(render(scenes)))
    assert (read["shape"] == scenes.shape).float().mean() > 0.95
    for name in ("shape_hue", "background_hue"):
        assert (((read[name] - getattr(scenes, name) + 0.5) % 1 - 0.5).abs() * 360).mean() < 10


def test_the_gap_tells_a_run_that_learns_from_one_that_does_not(tmp_path, monkeypatch):
    """Forty steps of each."""
    options = ["--out", str(tmp_path), "--steps", "40", "--every-steps", "40", "--num-samples", "160", "--seeds", "0"]
    monkeypatch.setattr(sys, "argv", ["image_use", *options, "--variants", "learning", "image always dropped"])
    image_use.main()
    rows = json.loads((tmp_path / "image_use.json").read_text())
    assert image_use.separated_from(rows, "image always dropped", "val/gap_other") == 40
    learning, broken = (
        [row for row in rows if row["variant"] == variant and "val/gap_other" in row][-1]
        for variant in ("learning", "image always dropped")
    )
    assert learning["val/gap_other"] > 2 * learning["val/gap_other_ci"]
    assert abs(broken["val/gap_other"]) < 2 * broken["val/gap_other_ci"]
    with Image.open(tmp_path / "image_use.png") as picture:
        assert picture.width > 500


def test_the_base_is_small_and_loads():
    assert sum(p.stat().st_size for p in BASE.rglob("*") if p.is_file()) < 8e6
    pipe = StableDiffusionPipeline.from_pretrained(BASE, torch_dtype=torch.float32, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    image = pipe("a star", num_inference_steps=2, output_type="np").images[0]
    assert image.shape == (32, 32, 3)
    assert image.std() > 0.02


def test_plain_torch_training_runs(tiny_models, tmp_path):
    for i in range(4):
        (tmp_path / f"photo_{i}.jpg").write_bytes(encode(picture(i)))
    command = [sys.executable, str(ROOT / "examples" / "train_without_a_framework.py"), "--resolution", "32"]
    command += ["--base", str(tiny_models[0]), "--image-encoder", str(tiny_models[1]), "--images", str(tmp_path)]
    command += ["--out", str(tmp_path / "out"), "--steps", "3"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "step 0: loss" in done.stdout
    assert (tmp_path / "out" / "ip_adapter.safetensors").is_file()
