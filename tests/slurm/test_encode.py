"""slurm/encode.sbatch: the shards of a cache are shared out over an array, and over the processes of its jobs."""

import json

from ipa_train.cli.main import main


def test_an_array_encodes_every_shard_once(cluster, tiny_run, tmp_path):
    cache = tmp_path / "cache"
    resources = {"array": "0-1", "gpus_per_node": 2, "cpus_per_gpu": 2}
    array = cluster.submit("encode.sbatch", *tiny_run, "--out", cache, folder=tmp_path, **resources)
    jobs = [array.element(0), array.element(1)]
    for job in jobs:
        job.wait("COMPLETED")
    reports = [json.loads(path.read_text()) for path in sorted(cache.glob("encode-report-*.json"))]
    assert len(reports) == 4
    assert sum(report["counts"].get("shards encoded", 0) for report in reports) == 3
    assert sum(report["counts"]["samples"] for report in reports) == 60
    assert main(["data", "validate", str(cache)]) == 0
