"""Between log steps the host never waits for the device: it only hands out work."""

from functools import partial

import lightning
import pytest
import torch
from torch.utils.data import DataLoader

from ipa_train.adapter import LinearProjector, Resampler, TimeResampler
from ipa_train.bases import Flux, StableDiffusion, StableDiffusion3, StableDiffusionXL
from ipa_train.bases.tiny import tiny_pipeline
from ipa_train.data.transfer import DeviceCopies
from ipa_train.training.callbacks.checkpointing import Checkpointing
from ipa_train.training.callbacks.gradient_guard import GradientGuard
from ipa_train.training.callbacks.metric_logging import MetricLogging
from ipa_train.training.callbacks.sample_grid import SampleGrid
from ipa_train.training.csv_log import CSVLog
from ipa_train.training.ema import AdapterEMA
from tests.training.conftest import make_batch
from tests.training.host_waits import HostWaits
from tests.training.toy import FUSED_ADAMW, make_trainer

FAMILIES = {
    "sd15": (StableDiffusion, partial(Resampler, num_tokens=4, dim=64, heads=1)),
    "sdxl": (StableDiffusionXL, partial(LinearProjector)),
    "sd35m": (StableDiffusion3, partial(TimeResampler, num_tokens=8, dim=64, heads=1)),
    "flux": (Flux, partial(LinearProjector)),
}


@pytest.fixture(params=FAMILIES)
def make(request, make_module, tmp_path):
    """A function that makes the training module of a family, on a base of its own."""
    tiny_pipeline(request.param).save_pretrained(tmp_path / "base")
    family, projector = FAMILIES[request.param]

    def make_one(**options):
        base = family.from_pretrained(str(tmp_path / "base"), dtype="bfloat16")
        return make_module(base=base, projector=projector, optimizer=partial(FUSED_ADAMW, lr=1e-3), **options)

    return make_one


class Data(lightning.LightningDataModule):
    """Batches that go to the device as those of a run do."""

    def __init__(self, count):
        super().__init__()
        self.count, self.copies = count, DeviceCopies()

    def train_dataloader(self):
        batches = [make_batch(range(4 * i, 4 * i + 4)) for i in range(self.count)]
        return DataLoader(batches, batch_size=None, pin_memory=torch.cuda.is_available())

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        return self.copies(batch, device)


def fit(module, folder, *, max_steps, log_every_n_steps, first=(), **options):
    callbacks = [
        *first,
        GradientGuard(),
        MetricLogging(progress=False),
        SampleGrid(folder=str(folder / "samples")),
        Checkpointing(folder=str(folder / "checkpoints")),
    ]
    log = CSVLog(path=str(folder / "metrics.csv"))
    trainer = make_trainer(max_steps, callbacks, logger=log, log_every_n_steps=log_every_n_steps, **options)
    trainer.fit(module, Data(max_steps))


def test_the_host_reads_nothing_back_between_log_steps(make, tmp_path):
    waits = HostWaits()
    module = make(ema=AdapterEMA())
    with waits.watching():
        fit(module, tmp_path, max_steps=4, log_every_n_steps=2, first=[waits], gradient_clip_val=1.0)
    assert {(phase, step) for phase, step, _ in waits.found} == {("end", 2), ("end", 4)}, waits.found


def test_an_optimizer_that_cannot_skip_by_itself_costs_a_look_at_every_step(make_module, tmp_path):
    waits = HostWaits()
    with waits.watching():
        module = make_module(optimizer=partial(torch.optim.SGD, lr=1e-3))
        fit(module, tmp_path, max_steps=2, log_every_n_steps=2, first=[waits])
    assert {("update", 1), ("update", 2)} <= {(phase, step) for phase, step, _ in waits.found}


def test_a_step_needs_no_value_of_any_tensor_on_the_device(make):
    """On the meta device there are none to be had."""
    module = make().to("meta")
    loss = module.training_step(make_batch(range(2)).to("meta"), 0)
    loss.backward()
    assert loss.device.type == "meta"
    assert all(p.grad is not None for p in module.adapter.parameters())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_agrees(make, tmp_path):
    """CUDA's own watch over waits, but for the ends of log intervals; and what is restored lies where it must."""

    class Watch(HostWaits):
        def on_train_batch_start(self, trainer, *_):
            if trainer.global_step:  # the noise schedule moves to the device in the first step
                torch.cuda.set_sync_debug_mode("error")

        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step % 3 == 0:
                torch.cuda.set_sync_debug_mode("default")

        def on_exception(self, *_):
            torch.cuda.set_sync_debug_mode("default")

    module = make(ema=AdapterEMA())
    options = {"accelerator": "gpu", "log_every_n_steps": 3, "gradient_clip_val": 1.0}
    fit(module, tmp_path, max_steps=6, first=[Watch()], **options)
    assert all(state["step"].is_cuda for state in module.optimizers().state.values())
