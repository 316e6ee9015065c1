"""One real cluster for all tests of this folder, and the arguments of a short run on it."""

import pytest

from ipa_train.cli.main import main
from tests.end_to_end.conftest import tiny_overrides, write_shards
from tests.slurm.cluster import started_cluster


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    """Two nodes, with two GPUs each that are none."""
    with started_cluster(tmp_path_factory.mktemp("cluster"), num_nodes=2) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def slurm_shards(tmp_path_factory):
    """Shards with their index, without which every node would have to make one of its own copies."""
    folder = write_shards(tmp_path_factory.mktemp("slurm_shards"))
    assert main(["data", "index", str(folder)]) == 0
    return folder


@pytest.fixture(scope="session")
def tiny_run(tiny_models, slurm_shards):
    """Overrides of a short run on the cluster."""
    return tiny_overrides(tiny_models, slurm_shards)


@pytest.fixture(scope="session")
def slow_run(tiny_run):
    """The same with 6 micro-batches in a step: few steps in a second on a quiet machine too, so faults come in time."""
    return [*tiny_run, "data.global_batch_size=12", "data.batch_size=1"]
