"""Strategies of several devices through the command, and those that a run cannot have."""

import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ipa_train.cli.main import main
from tests.end_to_end.conftest import loss_curve, run_ranks

FLUX = ["experiment=flux_linear", "base.max_t5_tokens=32", "acceleration.checkpointing=full"]

needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs the package deepspeed")


@pytest.fixture
def flux_command(train_command, tiny_flux):
    """As ``train_command``, for a tiny Flux and with any of the trainers."""

    def command(name, trainer, *overrides):
        own = [f"base.path={tiny_flux[0]}", f"image_encoder.path={tiny_flux[1]}", f"trainer={trainer}"]
        inherited = [x for x in train_command(name)[1:] if x not in ("experiment=sd15_linear", "trainer=cpu")]
        return [*inherited, *FLUX, *own, "trainer.accelerator=cpu", *overrides]

    return command


def test_a_sharded_flux_trains_draws_and_goes_on_replicated(flux_command, tmp_path):
    """Sample grids are drawn too, for which all ranks must be there."""
    grid = ["callbacks.sample_grid.every_steps=2", "callbacks.sample_grid.num_inference_steps=1"]
    run_ranks(["train", *flux_command("sharded", "fsdp2", "trainer.max_steps=2", *grid)], 2)
    assert main(["train", *flux_command("sharded", "default", "trainer.devices=1", "trainer.max_steps=3", *grid)]) == 0
    assert main(["train", *flux_command("alone", "default", "trainer.devices=1", "trainer.max_steps=3", *grid)]) == 0
    losses = loss_curve(tmp_path / "sharded")
    assert losses.keys() == {1, 2, 3}
    for step, loss in loss_curve(tmp_path / "alone").items():
        assert float(losses[step]) == pytest.approx(float(loss), rel=1e-5)
    for run in ("sharded", "alone"):
        Image.open(tmp_path / run / "samples" / "step-00000002.png").verify()
    exports = [
        load_file(tmp_path / run / "checkpoints" / "step-00000003" / "ip_adapter.safetensors")
        for run in ("sharded", "alone")
    ]
    assert exports[0].keys() == exports[1].keys()


@pytest.mark.parametrize("verb", ["check", "train"])
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("trainer=fsdp2 trainer.devices=1", "trainer=fsdp2 shares out the base among the devices of a node"),
        ("trainer=fsdp2 trainer.devices=2", "the forward of StableDiffusionPipeline joins weights"),
        ("trainer=deepspeed", "trainer=deepspeed needs CUDA GPUs, and this run has none"),
        ("trainer=deepspeed trainer.strategy.stage=3", "trainer.strategy.stage must be 1 or 2, got 3"),
        ("trainer=default trainer.strategy=deepspeed", "DeepSpeedStrategy has checkpoints of its own"),
    ],
)
def test_what_cannot_run_is_refused(verb, overrides, message, train_command, tmp_path, capfd):
    inherited = [x for x in train_command("bad")[1:] if x != "trainer=cpu"]
    assert main([verb, *inherited, "trainer.accelerator=cpu", *overrides.split()]) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("ipa ")]
    assert message in line
    assert not (tmp_path / "bad" / "checkpoints").exists()


def test_sharding_is_refused_with_what_holds_on_to_weights(flux_command, capfd):
    options = ["trainer.devices=2", "base.dtype=bfloat16", "acceleration.float8=true"]
    assert main(["check", *flux_command("bad", "fsdp2", *options)]) == 2
    assert "acceleration.float8=True does not go with trainer=fsdp2" in capfd.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("trainer", "devices"),
    [
        pytest.param("deepspeed trainer.strategy.stage=1", 1, marks=needs_deepspeed),
        pytest.param("deepspeed trainer.strategy.stage=2", 1, marks=needs_deepspeed),
        ("ddp trainer.strategy.compress_gradients=true", 2),
        ("fsdp2", 2),
    ],
)
def test_on_gpus_it_is_the_training_of_one(trainer, devices, flux_command, tmp_path):
    """Two steps under the strategy and one more without; with the rounding of GPUs and of gradients in bf16."""
    if torch.cuda.device_count() < devices:
        pytest.skip(f"needs CUDA devices: {devices}")

    def train(name, trainer, devices, max_steps):
        options = ["trainer.accelerator=gpu", f"trainer.devices={devices}", f"trainer.max_steps={max_steps}"]
        command = flux_command(name, *trainer.split(), *options)
        subprocess.run([sys.executable, "-m", "ipa_train.cli.main", "train", *command], check=True, timeout=600)

    train("shared", trainer, devices, 2)
    for name in ("shared", "alone"):
        train(name, "default", 1, 3)
    losses = loss_curve(tmp_path / "shared")
    for step, loss in loss_curve(tmp_path / "alone").items():
        assert float(losses[step]) == pytest.approx(float(loss), rel=1e-2)
