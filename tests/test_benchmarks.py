"""The benchmarks run on tiny settings, and their figures are complete."""

import json
import subprocess
import sys

from benchmarks import cache, loader


def run(module, out, *arguments):
    command = [sys.executable, "-m", module.__name__, "--out", str(out), "--rounds", "1", *arguments]
    subprocess.run(command, check=True, capture_output=True)
    figures = json.loads(out.read_text())
    assert {"machine", "python", "versions", "commit", "settings"} <= figures.keys()
    return figures, out.with_suffix(".md").read_text()


def test_cache(tmp_path):
    sizes = ("--shards", "2", "--shard-size", "12", "--batch-size", "4", "--batches", "2")
    figures, markdown = run(cache, tmp_path / "cache.json", *sizes)
    costs = figures["cpu_us_per_sample"]
    assert {cache.OURS, cache.PLAIN, cache.LIMIT} <= costs.keys()
    assert len(costs) + len(figures["not_installed"]) == 7
    assert figures["times_ours"].keys() == costs.keys()
    assert figures["cpu_us_per_sample_with_one_worker"].keys() == {cache.OURS, cache.PLAIN}
    assert all(f"| {name} |" in markdown for name in (*costs, *figures["not_installed"]))


def test_loader(tmp_path):
    sizes = ("--pictures", "4", "--batch-size", "2", "--samples", "40000", "--shards", "40")
    figures, markdown = run(loader, tmp_path / "loader.json", *sizes)
    names = (loader.TUTORIAL, loader.PLAIN, loader.OURS, loader.DEVICE)
    assert {f"{name}, {form}" for name in names for form in loader.FORMS} <= figures["cpu_us_per_sample"].keys()
    assert figures["mean_difference_of_255"].keys() == set(loader.FORMS)
    downloaded = figures["mean_difference_of_255"][loader.FORMS[0]]
    assert max(downloaded.values()) < 0.2, "the parity that the documentation claims"
    for kind in ("one bucket", "10 buckets", "3 mixed sources"):
        assert figures["order"][kind].keys() == {"resume_ms", "us_per_sample", "peak_mb", "replay_10000_steps_ms"}
    assert "| ipa-train, 512 x 512 |" in markdown
