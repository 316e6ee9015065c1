"""How fast a run is, and how much of its time it waits for data."""

import math
import time
from dataclasses import dataclass

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.profilers import Profiler

from ipa_train.data.batch import Batch, Pictures
from ipa_train.runtime.gpus import find_gpu
from ipa_train.training.forecast import rehearse
from ipa_train.training.module import AdapterTraining
from ipa_train.training.stragglers import OwnTime

_GIB = 2**30


@dataclass(frozen=True)
class Interval:
    """What one rank did from one :meth:`Throughput.take` to the next."""

    num_images: int
    seconds: float
    waited_seconds: float
    """For batches."""
    own_seconds: float
    """Until its losses were there: see ``OwnTime``."""


class Throughput:
    """Counts images and seconds, from one :meth:`take` to the next.

    The wait is the time Lightning spends in ``next()`` of the data loader, which it reports to its profiler and
    nowhere else. Hooks would not do: between the end of one batch and the start of the next also lie the saving of
    checkpoints, sample grids and validation.
    """

    def __init__(self) -> None:
        self._waited_seconds = 0.0
        self._num_images = 0
        self._since = time.perf_counter()
        self._own_time: OwnTime | None = None
        self._profiler: Profiler | None = None

    def start(self, trainer: Trainer) -> None:
        """Begin to measure; the user's own profiler goes on as before."""
        self._profiler = trainer.profiler
        self._own_time = own_time = OwnTime(trainer.strategy.root_device)
        trainer.profiler = _FetchTimer(self, own_time, self._profiler)
        self._since = time.perf_counter()

    def stop(self, trainer: Trainer) -> None:
        """Give the trainer its profiler back, if it was taken."""
        if self._profiler is not None:
            trainer.profiler = self._profiler
            self._profiler = None

    def count(self, num_images: int) -> None:
        """Count the images of one batch."""
        self._num_images += num_images

    def waited(self, seconds: float) -> None:
        """Count time without a batch."""
        self._waited_seconds += seconds

    def reached_loss(self) -> None:
        """Note that the loss of a batch has been computed, or on a GPU asked for."""
        assert self._own_time is not None
        self._own_time.end()

    def take(self) -> Interval:
        """Return what this rank did since the last call; waits for a GPU."""
        assert self._own_time is not None
        own_seconds, now = self._own_time.take(), time.perf_counter()
        taken = Interval(self._num_images, now - self._since, self._waited_seconds, own_seconds)
        self._num_images, self._since, self._waited_seconds = 0, now, 0.0
        return taken


class Arithmetic:
    """TFLOP/s of one device, and their share of what the device could do in bf16 (MFU) where it is a known GPU.

    Counts what the step has to compute, encoders included and recomputation left out: 2 FLOPs for each multiply-add of
    matrix products, convolutions and attention. Counted once, in about a second, for the shape of one batch; other
    buckets have about as many pixels, and their FLOPs are taken in proportion to them.

    Raises:
        RuntimeError: a step that cannot be run without data, since it reads numbers back from the device.
    """

    def __init__(self, module: AdapterTraining, batch: Batch) -> None:
        self._flops_per_pixel = rehearse(module, batch.blank(1)).model_flops / num_pixels(batch)
        gpu = find_gpu(torch.cuda.get_device_name(module.device)) if module.device.type == "cuda" else None
        self._peak_tflops = None if gpu is None else gpu.tflops

    def metrics(self, pixels_per_second: float) -> dict[str, float]:
        """What goes into the log, for the rate of one device in pixels as :func:`num_pixels` counts them."""
        tflops = pixels_per_second * self._flops_per_pixel / 1e12
        return {"perf/tflops": tflops} | ({} if self._peak_tflops is None else {"perf/mfu": tflops / self._peak_tflops})


def num_pixels(batch: Batch) -> int:
    """Of one sample: those of the picture, or of the latents where they are cached."""
    content = batch.content
    return math.prod((content.pixels if isinstance(content, Pictures) else content.latents_mean).shape[-2:])


def peak_memory_gib(device: torch.device) -> float:
    """Return the highest memory in use since the start, in GiB: of the GPU, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / _GIB
    import resource  # not on every platform

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / _GIB


class _FetchTimer(Profiler):
    def __init__(self, throughput: Throughput, own_time: OwnTime, inner: Profiler) -> None:
        super().__init__()
        self._throughput = throughput
        self._own_time = own_time
        self._inner = inner

    def start(self, action_name: str) -> None:
        self._inner.start(action_name)
        if action_name.endswith("train_dataloader_next"):
            self._began = time.perf_counter()
            self._own_time.begin()

    def stop(self, action_name: str) -> None:
        if action_name.endswith("train_dataloader_next"):
            self._throughput.waited(time.perf_counter() - self._began)
        self._inner.stop(action_name)
