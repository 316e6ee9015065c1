"""What `ipa check` says of memory and time, for this machine or for one that the run is yet to go to."""

import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from lightning import Trainer
from omegaconf import DictConfig

from ipa_train.acceleration import Acceleration
from ipa_train.cli.binding import instantiate
from ipa_train.data.batch import Batch
from ipa_train.data.datamodule import StreamingDataModule
from ipa_train.errors import ConfigError
from ipa_train.runtime.gpus import find_gpu, named_gpu
from ipa_train.training.forecast import ASSUMED_UTILISATION, RESERVE_GIB, Forecast, forecast, largest_batch_size
from ipa_train.training.module import AdapterTraining
from ipa_train.training.strategies import base_shards


@dataclass(frozen=True)
class Device:
    """What one process of the run has to itself."""

    name: str
    memory_gib: float
    tflops: float | None
    """Peak in bf16; None where it is not known."""
    is_here: bool
    """Whether it is in this machine."""
    is_gpu: bool = True

    @property
    def room_gib(self) -> float:
        """What of its memory tensors can have."""
        return max(0.0, self.memory_gib - RESERVE_GIB)


def device_of_run(config: DictConfig, gpu: str | None) -> Device:
    """The named GPU, else what this machine has.

    Raises:
        ConfigError: a GPU that is not known.
    """
    if gpu is not None:
        known = named_gpu(gpu)
        return Device(known.name, known.memory_gib, known.tflops, is_here=False)
    if torch.cuda.is_available() and config.trainer.accelerator != "cpu":
        properties = torch.cuda.get_device_properties(0)
        found = find_gpu(properties.name)
        tflops = None if found is None else found.tflops
        return Device(properties.name, properties.total_memory / 2**30, tflops, is_here=True)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Device("this machine", memory / 2**30, None, is_here=True, is_gpu=False)


@dataclass(frozen=True)
class Plan:
    """How a run shares out its batches."""

    world_size: int
    num_micro_batches: int
    batch_size: int
    """Samples of a micro-batch on one device."""
    base_shards: int = 1
    """Among how many devices the denoiser is shared out."""

    @property
    def global_batch_size(self) -> int:
        """Samples of a step."""
        return self.world_size * self.num_micro_batches * self.batch_size

    @property
    def options(self) -> dict[str, int]:
        """What a forecast takes of it."""
        return {
            "world_size": self.world_size,
            "num_micro_batches": self.num_micro_batches,
            "base_shards": self.base_shards,
        }


def plan_of_run(data: StreamingDataModule, trainer: Trainer, num_processes: int | None = None) -> Plan:
    """How the trainer's processes, or so many elsewhere, share out the global batch."""
    world_size = num_processes or trainer.world_size
    accumulate = data.accumulate_grad_batches(world_size)
    return Plan(world_size, accumulate, data.global_batch_size // world_size // accumulate, base_shards(trainer))


def choose_checkpointing(
    config: DictConfig, module: AdapterTraining, data: StreamingDataModule, plan: Plan, device: Device
) -> str | None:
    """Apply the fastest policy that fits into a GPU's memory, and return it: ``acceleration.checkpointing=auto``.

    None where the config names a policy itself, and on a CPU, which shares its memory with all else that runs.
    """
    acceleration: Acceleration = instantiate(config.acceleration)
    if not acceleration.is_automatic or not device.is_gpu:
        return None
    batch = data.first_batch(1, bucket=data.largest_bucket)
    return acceleration.choose_checkpointing(
        module.base, lambda: forecast_memory(module, batch, plan).peak_gib <= device.room_gib
    )


def forecast_memory(module: AdapterTraining, batch: Batch, plan: Plan) -> Forecast:
    """Forecast the run, from a batch of its shapes with any number of samples."""
    blank = batch.blank(plan.batch_size)
    return forecast(module, blank, **plan.options)


def describe_memory(
    module: AdapterTraining, batch: Batch, plan: Plan, device: Device, found: Forecast
) -> Iterator[str]:
    """Memory by part, and the largest micro-batch.

    Raises:
        ConfigError: the run does not fit; with what would.
    """
    parts = ", ".join(f"{name} {gib:.2f}" for name, gib in found.memory_gib.items())
    yield f"{found.peak_gib:.2f} GiB for each device: {parts}"
    largest = largest_batch_size(module, batch, device.room_gib, **plan.options)
    if found.peak_gib > device.room_gib:
        share = plan.num_micro_batches * plan.batch_size
        fitting = max((size for size in range(1, largest + 1) if share % size == 0), default=0)
        cures = [f"data.batch_size={fitting}"] if fitting else []
        if not found.rehearsal.recomputed_flops:
            cures.append("acceleration.checkpointing=full")
        cures.append("a lower data.resolution")
        raise ConfigError(
            f"a micro-batch of {plan.batch_size} samples needs {found.peak_gib:.1f} GiB, and {device.name} has room "
            f"for {device.room_gib:.1f}: set {', or '.join(cures)}."
        )
    yield f"{device.name} has room for {device.room_gib:.1f} GiB: for micro-batches of up to {largest:,} samples"


def describe_time(found: Forecast, plan: Plan, device: Device, max_steps: int, seconds: float | None) -> Iterator[str]:
    """Arithmetic, rate and length of the run; ``seconds`` are those of a micro-batch where one was timed."""
    parts = found.tflop_per_image
    yield f"{sum(parts.values()):.3g} TFLOP per image: {', '.join(f'{name} {x:.3g}' for name, x in parts.items())}"
    if seconds is not None:
        rate, source = found.batch_size / seconds, "measured"
    elif device.tflops is not None:
        rate, source = found.images_per_second(device.tflops), f"assuming {ASSUMED_UTILISATION:.0%} of its peak"
    else:
        return
    yield f"{rate * plan.world_size:.3g} images/s on {plan.world_size} x {device.name} ({source})"
    if max_steps > 0:
        hours = max_steps * plan.global_batch_size / (rate * plan.world_size) / 3600
        days = hours * plan.world_size / 24
        yield f"{max_steps:,} steps of {plan.global_batch_size:,} samples: {hours:,.3g} hours, {days:,.3g} device-days"
