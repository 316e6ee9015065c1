"""A Lightning module of the shape of the real one, small enough to train in milliseconds."""

from functools import partial

import lightning
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ipa_train.data.batch import Batch, Pictures
from ipa_train.training.callbacks.checkpointing import Checkpointing
from ipa_train.training.checkpoint import AdapterCheckpointIO
from ipa_train.training.ema import AdapterEMA
from ipa_train.training.metrics import RunningMeans
from ipa_train.training.optim import LRSchedule

FUSED_ADAMW = partial(torch.optim.AdamW, fused=True)
"""What a run has unless told otherwise."""


class Images(Dataset):
    """Endless enough; sample ``i`` is the same in every process. ``poison``: positions whose loss is not finite."""

    def __init__(self, batch_size=4, poison=(), length=100_000, rank=0, world_size=1):
        self.batch_size, self.poison, self.length = batch_size, set(poison), length
        self.rank, self.world_size = rank, world_size

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        positions = torch.arange(self.batch_size) + (index * self.world_size + self.rank) * self.batch_size
        pixels = torch.stack([torch.full((3, 2, 2), int(p) * 37 % 256, dtype=torch.uint8) for p in positions])
        zeros = torch.zeros(self.batch_size, 2, dtype=torch.int64)
        captions = ["poison" if int(p) in self.poison else "good" for p in positions]
        keys = [f"shard/{int(p):04d}" for p in positions]
        return Batch(
            content=Pictures(pixels=pixels, separate_prompts=None),
            captions=captions,
            positions=positions,
            original_sizes=zeros,
            crop_top_lefts=zeros,
            target_sizes=zeros,
            keys=keys,
        )

    def loader(self):
        return DataLoader(self, batch_size=None)


class Stream(IterableDataset):
    """The same batches from number ``start`` on, as the real data continue after a resume."""

    def __init__(self, start):
        self.start = start

    def __iter__(self):
        images = Images()
        return (images[i] for i in range(self.start, 1000))


class ToyTraining(lightning.LightningModule):
    def __init__(self, ema=True, shape="cosine", optimizer=FUSED_ADAMW):
        super().__init__()
        self.strict_loading = False
        torch.manual_seed(0)
        self.base = nn.Linear(12, 3).requires_grad_(False)
        self.adapter = nn.Sequential(nn.Linear(12, 8), nn.GELU(), nn.Linear(8, 3))
        self.ema = AdapterEMA(decay=0.9) if ema else None
        self.metrics = RunningMeans()
        self.lr_schedule = LRSchedule(shape=shape, warmup_steps=2)
        self.make_optimizer = optimizer
        self.losses = []

    def training_step(self, batch, batch_idx):
        x = batch.content.pixels.flatten(1).float() / 255
        losses = (self.adapter(x) - self.base(x)).square().mean(dim=1)
        losses = losses * torch.tensor([float("nan") if c == "poison" else 1.0 for c in batch.captions])
        self.metrics.update("train/loss", losses)
        loss = losses.mean()
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        optimizer = self.make_optimizer(self.adapter.parameters(), lr=1e-2)
        scheduler = self.lr_schedule.build(optimizer, 8)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def optimizer_step(self, *args, **kwargs):
        super().optimizer_step(*args, **kwargs)
        if self.ema is not None:
            self.ema.update(self.adapter.named_parameters())

    def on_save_checkpoint(self, checkpoint):
        if self.ema is not None:
            checkpoint["ema"] = self.ema.state_dict()

    def on_load_checkpoint(self, checkpoint):
        if self.ema is not None:
            self.ema.load_state_dict(checkpoint["ema"])

    def state_dict(self, *args, **kwargs):
        return {f"adapter.{name}": weight for name, weight in self.adapter.state_dict().items()}


def make_trainer(max_steps, callbacks=(), **options):
    defaults = {"accelerator": "cpu", "devices": 1, "logger": False, "max_epochs": -1}
    return lightning.Trainer(
        **defaults | options,
        max_steps=max_steps,
        callbacks=list(callbacks),
        plugins=[AdapterCheckpointIO()],
        enable_checkpointing=any(isinstance(callback, Checkpointing) for callback in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
