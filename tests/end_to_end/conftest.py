"""The whole command on tiny models and small real shards."""

import csv
import io
import json
import multiprocessing
import os
import signal
import socket
import sys
from functools import partial

import numpy as np
import pytest
import webdataset
from PIL import Image

from ipa_train.cli.main import main


def write_shards(folder, *, num_shards=3, per_shard=20, size=40):
    """Small shards in img2dataset's layout, with smooth random pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for shard in range(num_shards):
        with webdataset.TarWriter(str(folder / f"{shard:05d}.tar")) as writer:
            for i in range(per_shard):
                coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
                buffer = io.BytesIO()
                coarse.resize((size, size + i % 7)).save(buffer, format="JPEG", quality=95)
                key = f"{shard:05d}{i:04d}"
                writer.write({"__key__": key, "jpg": buffer.getvalue(), "txt": f"picture {i} of {shard}"})
        stats = {"count": per_shard, "successes": per_shard}
        (folder / f"{shard:05d}_stats.json").write_text(json.dumps(stats))
    return folder


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="session")
def run(tmp_path_factory, tiny_models, shards):
    """A finished run of four steps with two sample grids."""
    folder = tmp_path_factory.mktemp("run") / "run"
    assert (
        main(
            [
                "train",
                "experiment=sd15_linear",
                f"base.path={tiny_models[0]}",
                f"image_encoder.path={tiny_models[1]}",
                "image_encoder.subfolder=''",
                f"data.shards={shards}",
                "data.resolution=32",
                "data.global_batch_size=4",
                "data.batch_size=2",
                "data.num_workers=0",
                "trainer=cpu",
                "trainer.max_steps=4",
                "trainer.log_every_n_steps=2",
                "callbacks.sample_grid.every_steps=2",
                "callbacks.sample_grid.num_inference_steps=2",
                "logger=wandb",
                "logger.wandb.offline=true",
                "run.name=verbs",
                f"run.path={folder}",
            ]
        )
        == 0
    )
    return folder


def tiny_overrides(models, shards):
    """Overrides of a short fp32 run on the CPU, all but its name and length."""
    return [
        "experiment=sd15_linear",
        f"base.path={models[0]}",
        "base.dtype=float32",
        f"image_encoder.path={models[1]}",
        "image_encoder.subfolder=''",
        "image_encoder.dtype=float32",
        f"data.shards={shards}",
        "data.resolution=32",
        "data.global_batch_size=4",
        "data.num_workers=0",
        "trainer=cpu",
        "trainer.log_every_n_steps=1",
        "callbacks.sample_grid.every_steps=0",
    ]


def train_arguments(models, shards, folder, name, *overrides):
    """Of `ipa` for a short fp32 run on the CPU in ``folder``."""
    return ["train", *tiny_overrides(models, shards), f"run.name={name}", f"run.path={folder / name}", *overrides]


@pytest.fixture
def train_command(tiny_models, shards, tmp_path):
    """A function from run name and overrides to the arguments of a run in ``tmp_path``."""
    return partial(train_arguments, tiny_models, shards, tmp_path)


@pytest.fixture(autouse=True)
def no_process_left():
    """End what a failed test has left running."""
    yield
    for process in multiprocessing.active_children():
        os.killpg(process.pid, signal.SIGKILL)
        process.join()


def forked(arguments, **environment):
    """Start `ipa` as a process of its own: a fork of this one, which has imported everything already."""

    def run():
        os.setpgid(0, 0)
        os.environ.update(environment)
        sys.argv = ["ipa", *arguments]
        sys.exit(main())

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


def forked_ranks(arguments, world_size=2):
    """Start so many ranks of one run, as torchrun does."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"TORCHELASTIC_RUN_ID": "test", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GROUP_RANK": "0"}
    shared |= {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
    arguments = [*arguments, f"trainer.devices={world_size}"]
    return [forked(arguments, **shared, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(world_size)]


def run_ranks(arguments, world_size=2):
    """Run so many ranks of one run until all have ended well."""
    for process in forked_ranks(arguments, world_size):
        process.join(timeout=240)
        assert process.exitcode == 0


def loss_curve(run):
    """Loss by step, as logged."""
    if not (run / "metrics.csv").exists():
        return {}
    with (run / "metrics.csv").open() as file:
        return {int(row["step"]): row["train/loss"] for row in csv.DictReader(file) if row.get("train/loss")}
