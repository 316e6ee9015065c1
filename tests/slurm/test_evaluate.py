"""slurm/evaluate.sbatch: the pictures are shared out over the processes of a job, and the last one reports."""

import json

import numpy as np
from PIL import Image

from tests.cli.test_eval import adapter_file

NUM_PICTURES = 6  # in two parts


def test_a_job_draws_scores_and_reports(cluster, tiny_models, tiny_scorers, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for i in range(NUM_PICTURES):
        pixels = np.random.default_rng(i).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / f"{i}.png")
        (images / f"{i}.txt").write_text(f"picture {i}")
    words = ["--adapter", adapter_file(tmp_path / "adapter", tiny_models[0], feature_dim=24), "--images", images]
    words += ["--base", tiny_models[0], "--image-encoder", tiny_models[1], "--clip", tiny_scorers[0]]
    words += ["--dino", tiny_scorers[1], "--size", 32, "--steps", 1, "--num-samples", 1, "--out", "eval"]
    job = cluster.submit("evaluate.sbatch", *words, folder=tmp_path, gpus_per_node=2, cpus_per_gpu=2)
    job.wait("COMPLETED")
    assert "6 image prompts; eval/report.html" in job.log
    assert len(list((tmp_path / "eval" / "parts").glob("*.parquet"))) == 2
    (of_scale,) = json.loads((tmp_path / "eval" / "summary.json").read_text())["by_scale"]
    assert of_scale["scores"].keys() == {"clip_i", "clip_t", "dino"}
