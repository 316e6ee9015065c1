"""Run as two processes: the same training under every strategy. Each writes what it saw as one JSON line."""

import json
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.strategies import deepspeed as lightning_deepspeed
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from ipa_train.acceleration import Acceleration
from ipa_train.adapter import LinearProjector, TimeResampler
from ipa_train.bases import Flux, StableDiffusion, StableDiffusion3
from ipa_train.conditioning import CLIPImageEncoder, ConditionDropout
from ipa_train.diffusion import Objective, UniformTimesteps
from ipa_train.runtime.distributed import rank
from ipa_train.training.callbacks.checkpointing import Checkpointing
from ipa_train.training.callbacks.gradient_guard import GradientGuard
from ipa_train.training.callbacks.metric_logging import MetricLogging
from ipa_train.training.ema import AdapterEMA
from ipa_train.training.module import AdapterTraining
from ipa_train.training.optim import LRSchedule
from ipa_train.training.strategies import DDP, ShardedBase
from ipa_train.training.zero import ZeRO
from tests.training.conftest import make_batch
from tests.training.toy import FUSED_ADAMW, Images, ToyTraining, make_trainer

LEARNING_RATE = 1e-3


def real_module(base, image_encoder, projector, **options):
    return AdapterTraining(
        base=base(),
        image_encoder=CLIPImageEncoder.from_pretrained(image_encoder, dtype="float32"),
        projector=projector,
        objective=partial(Objective),
        optimizer=partial(FUSED_ADAMW, lr=LEARNING_RATE),
        timesteps=UniformTimesteps(),
        dropout=ConditionDropout(),
        lr_schedule=LRSchedule(),
        ema=AdapterEMA(),
        **options,
    )


class CPUZeRO(ZeRO):
    """DeepSpeed on CPUs, which Lightning would refuse."""

    def setup_environment(self):
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled here
        lightning_deepspeed._validate_device_index_selection = lambda devices: None
        super(DeepSpeedStrategy, self).setup_environment()

    def _get_process_group_backend(self):
        return "gloo"

    @property
    def root_device(self):
        return torch.device("cpu", 0)


def fit(strategy, folder, max_steps, module, *, resume=None):
    """Train up to ``max_steps``, and on from the checkpoint ``resume``; return the last checkpoint."""
    first = int(resume.name.removeprefix("step-")) if resume else 0
    batches = [make_batch([4 * i + 2 * rank(), 4 * i + 2 * rank() + 1]) for i in range(first, max_steps)]
    callbacks = [GradientGuard(), MetricLogging(progress=False), Checkpointing(folder=str(folder), every_steps=2)]
    options = {"devices": 2, "strategy": strategy, "log_every_n_steps": 2, "gradient_clip_val": 0.1}
    trainer = make_trainer(max_steps, callbacks, **options)
    trainer.fit(module, DataLoader(batches, batch_size=None), ckpt_path=resume)
    return folder / f"step-{max_steps:08d}"


def sharding(root, make, saw):
    """Two steps sharded, and two more sharded or not."""
    module = make()
    half = fit(ShardedBase(), root / "sharded", 2, module)
    saw["sharded"] = sorted({type(weight).__name__ for weight in module.base.denoiser.parameters()})
    held = [w.to_local().numel() for w in module.base.denoiser.parameters() if isinstance(w, DTensor)]
    saw["share"] = sum(held) / sum(weight.numel() for weight in module.base.denoiser.parameters())
    fit(ShardedBase(), root / "sharded_sharded", 4, make(), resume=half)
    fit(DDP(), root / "sharded_ddp", 4, make(), resume=half)


def recomputing(root, make):
    """An SD 3 that is shared out and recomputes its blocks, beside one that does neither."""
    fit(DDP(), root / "sd3_ddp", 2, make())
    module = make()
    Acceleration(checkpointing="full").apply(module.base)
    fit(ShardedBase(), root / "sd3_sharded", 2, module)


def zero(root, make):
    """Steps under ZeRO before, after and between steps under DDP."""
    half = fit(CPUZeRO(stage=1), root / "zero1", 2, make())
    fit(CPUZeRO(stage=2), root / "zero1_zero2", 4, make(), resume=half)
    fit(DDP(), root / "zero1_ddp", 4, make(), resume=half)


def poisoned(saw):
    """A loss on one rank, in the second of three steps, that is not a number."""
    for name, strategy in (("ddp_poisoned", DDP()), ("zero_poisoned", CPUZeRO())):
        module = ToyTraining(ema=False)
        images = Images(poison=[12], rank=rank(), world_size=2).loader()
        make_trainer(3, [GradientGuard()], devices=2, strategy=strategy).fit(module, images)
        saw[name] = torch.nn.utils.parameters_to_vector(module.adapter.parameters()).tolist()


def compression(saw):
    """The change of the weights in one step of plain descent, which is the gradient."""
    for name, compress in (("plain", False), ("compressed", True)):
        module = ToyTraining(ema=False, optimizer=torch.optim.SGD)
        before = torch.nn.utils.parameters_to_vector(module.adapter.parameters()).detach()
        images = Images(rank=rank(), world_size=2).loader()
        trainer = make_trainer(1, devices=2, strategy=DDP(compress_gradients=compress))
        trainer.fit(module, images)
        after = torch.nn.utils.parameters_to_vector(module.adapter.parameters()).detach()
        saw[name] = (after - before).tolist()


def main():
    root, flux, image_encoder, sd3, sd15 = map(Path, sys.argv[1:])
    saw = {"rank": rank()}
    compression(saw)
    base = partial(Flux.from_pretrained, str(flux), dtype="float32", max_t5_tokens=32)
    make = partial(real_module, base, image_encoder, partial(LinearProjector))
    fit(DDP(), root / "ddp", 4, make())
    sharding(root, make, saw)
    base = partial(StableDiffusion3.from_pretrained, str(sd3), dtype="float32")
    projector = partial(TimeResampler, num_tokens=8, dim=64, heads=1)
    recomputing(root, partial(real_module, base, image_encoder, projector))
    if find_spec("deepspeed") is not None:
        zero(root, make)
        poisoned(saw)
        base = partial(StableDiffusion.from_pretrained, str(sd15), dtype="float32")
        make = partial(real_module, base, image_encoder, partial(LinearProjector), train_denoiser=True)
        fit(DDP(), root / "finetune_ddp", 2, make())
        fit(CPUZeRO(stage=2), root / "finetune_zero2", 2, make())
    sys.stdout.write("SAW " + json.dumps(saw) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
