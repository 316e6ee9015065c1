"""Run as two processes: what ranks must decide alike. Each writes what it saw as one JSON line."""

import json
import logging
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from ipa_train.adapter import LinearProjector
from ipa_train.bases import StableDiffusion
from ipa_train.conditioning import CLIPImageEncoder, ConditionDropout
from ipa_train.diffusion import Objective, UniformTimesteps
from ipa_train.errors import CheckpointError, TrainingError
from ipa_train.runtime.distributed import gather_objects, rank, sum_over_ranks
from ipa_train.training.callbacks.checkpointing import Checkpointing
from ipa_train.training.callbacks.gradient_guard import GradientGuard
from ipa_train.training.callbacks.metric_logging import MetricLogging
from ipa_train.training.callbacks.preemption import Preemption
from ipa_train.training.callbacks.watchdog import Watchdog
from ipa_train.training.checkpoint import AdapterCheckpointIO, list_checkpoints
from ipa_train.training.csv_log import CSVLog
from ipa_train.training.metrics import RunningMeans
from ipa_train.training.module import AdapterTraining
from ipa_train.training.optim import LRSchedule
from tests.training.conftest import make_batch
from tests.training.host_waits import HostWaits
from tests.training.toy import FUSED_ADAMW, Images, ToyTraining, make_trainer


def fit(folder, max_steps, *, poison=(), module=None, guard=None, first=(), log_every_n_steps=1, loader=None):
    module = module or ToyTraining()
    loader = loader or Images(poison=poison, rank=rank(), world_size=2).loader()
    callbacks = [
        *first,
        Preemption(every_steps=2),
        Watchdog(timeout_minutes=8, collective_timeout_minutes=7),
        guard or GradientGuard(),
        MetricLogging(progress=False),
        Checkpointing(folder=str(folder / "checkpoints"), every_steps=2),
    ]
    trainer = make_trainer(
        max_steps,
        callbacks,
        devices=2,
        strategy=DDPStrategy(process_group_backend="gloo"),
        logger=CSVLog(path=str(folder / "metrics.csv")),
        log_every_n_steps=log_every_n_steps,
    )
    trainer.fit(module, loader)
    return module


def error_of(function):
    try:
        function()
    except (CheckpointError, TrainingError) as error:
        return str(error)
    return None


def real_module(base, image_encoder):
    """The module that a run has, on tiny models in these folders."""
    return AdapterTraining(
        base=StableDiffusion.from_pretrained(base, dtype="float32"),
        image_encoder=CLIPImageEncoder.from_pretrained(image_encoder, dtype="float32"),
        projector=partial(LinearProjector),
        objective=partial(Objective),
        optimizer=partial(FUSED_ADAMW, lr=1e-3),
        timesteps=UniformTimesteps(),
        dropout=ConditionDropout(),
        lr_schedule=LRSchedule(),
    )


class FullOnRankZero(ToyTraining):
    def write_exports(self, folder):
        raise OSError(28, "No space left on device")


class SlowOnRankOne(Images):
    def __getitem__(self, index):
        time.sleep(0.3 * self.rank)
        return super().__getitem__(index)


def main():
    logging.basicConfig(level=logging.WARNING)
    root, saw = Path(sys.argv[1]), {"rank": rank()}

    module = fit(root / "run", 4, poison=[12])  # rank 1, step 2
    saw["weights"] = [p.sum().item() for p in module.adapter.parameters()]
    backends = [group._get_backend(torch.device("cpu")) for group in dist.distributed_c10d._world.pg_map]
    saw["timeout_minutes"] = [backend.options._timeout.total_seconds() / 60 for backend in backends]
    saw["checkpoints"] = [p.name for p in list_checkpoints(root / "run" / "checkpoints")]

    slow = SlowOnRankOne(rank=rank(), world_size=2)
    module = fit(root / "slow", 8, loader=slow.loader())
    saw["weights_beside_a_slow_rank"] = [p.sum().item() for p in module.adapter.parameters()]

    reductions = []

    def reduce(values):
        reductions.append(values.shape)
        return sum_over_ranks(values)

    means = RunningMeans()
    means.update("loss", torch.tensor([1.0]) if rank() == 0 else torch.tensor([2.0, 3.0, 6.0]))
    means.update("only_on_one", torch.tensor([5.0]), where=torch.tensor([rank() == 1]))
    means.update("on_none", torch.tensor([5.0]), where=torch.tensor([False]))
    saw["means"] = means.compute_and_reset(reduce)
    saw["num_reductions"] = len(reductions)
    saw["gathered"] = gather_objects(rank())

    newest = root / "run" / "checkpoints" / f"step-0000000{4 - 2 * rank()}"
    saw["other_checkpoint"] = error_of(lambda: AdapterCheckpointIO().load_checkpoint(newest))
    saw["full_disk"] = error_of(lambda: fit(root / "full", 4, module=FullOnRankZero()))
    guard = GradientGuard(max_in_a_row=2)
    saw["not_finite"] = error_of(lambda: fit(root / "poison", 9, poison=range(8, 999, 9), guard=guard))

    module = real_module(*sys.argv[2:])
    trained = sum(weight.numel() for weight in module.adapter.parameters())
    ddp = DistributedDataParallel(module)
    saw["sends_the_adapter_alone"] = (
        sum(weight.numel() for weight in ddp._module_parameters) == trained and not ddp.modules_buffers
    )

    waits = HostWaits()
    batches = DataLoader([make_batch([2 * i + rank()]) for i in range(3)], batch_size=None)
    with waits.watching():
        options = {"module": real_module(*sys.argv[2:]), "loader": batches, "log_every_n_steps": 3}
        fit(root / "real", 3, first=[waits], **options)
    saw["waits"] = sorted({(phase, step) for phase, step, _ in waits.found})
    sys.stdout.write("SAW " + json.dumps(saw) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
