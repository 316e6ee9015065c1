"""One real cluster for all tests of this folder, and the arguments of a short run on it."""

import pytest

from ipa_train.cli.main import main
from tests.end_to_end.conftest import write_shards
from tests.slurm.cluster import Cluster, missing_packages


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    """Two nodes, with two GPUs each that are none."""
    if missing := missing_packages():
        pytest.skip(f"no {', '.join(missing)} here: slurm/dev_cluster.sh install, as root")
    cluster = Cluster(tmp_path_factory.mktemp("cluster"), num_nodes=2)
    yield cluster
    cluster.stop()


@pytest.fixture(scope="session")
def slurm_shards(tmp_path_factory):
    """Shards with their index, without which every node would have to make one of its own copies."""
    folder = write_shards(tmp_path_factory.mktemp("slurm_shards"))
    assert main(["data", "index", str(folder)]) == 0
    return folder


@pytest.fixture(scope="session")
def tiny_run(tiny_models, slurm_shards):
    """Overrides of a short fp32 run on the CPU, all but its name and length."""
    return [
        "experiment=sd15_linear",
        f"base.path={tiny_models[0]}",
        "base.dtype=float32",
        f"image_encoder.path={tiny_models[1]}",
        "image_encoder.subfolder=''",
        "image_encoder.dtype=float32",
        f"data.shards={slurm_shards}",
        "data.resolution=32",
        "data.global_batch_size=4",
        "data.num_workers=0",
        "trainer=cpu",
        "trainer.log_every_n_steps=1",
        "callbacks.sample_grid.every_steps=0",
    ]
