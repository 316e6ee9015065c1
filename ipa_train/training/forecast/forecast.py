"""What a run will need of each of its devices, and how long it will take."""

from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import nn

from ipa_train.bases import Base
from ipa_train.data.batch import Batch
from ipa_train.training.forecast.memory import tensor_bytes
from ipa_train.training.forecast.rehearsal import Rehearsal, rehearse
from ipa_train.training.module import AdapterTraining

ASSUMED_UTILISATION = 0.35
"""Share of a GPU's peak that a step reaches: what published trainings of Stable Diffusion reach (28 to 39 %)."""
RESERVE_GIB = 1.0
"""What a process needs on its device beside tensors: CUDA's context and the its libraries' workspaces; an estimate."""
_GIB = 2**30


@dataclass(frozen=True)
class Forecast:
    """Needs of one device for micro-batches of ``batch_size`` samples."""

    batch_size: int
    num_frozen: int
    """Parameters."""
    num_trained: int
    rehearsal: Rehearsal
    """One micro-batch."""
    state_bytes: int
    """Of the optimizer and of the average of the weights, and of the copy of the gradients that ranks exchange."""

    @property
    def memory_gib(self) -> dict[str, float]:
        """Memory at the highest moment, by what it is for."""
        rehearsal = self.rehearsal
        trained = 2 * rehearsal.trained_bytes + self.state_bytes
        held = rehearsal.frozen_bytes + rehearsal.activation_bytes + trained
        parts = {
            "frozen weights": rehearsal.frozen_bytes,
            "adapter with gradients and optimizer": trained,
            "activations": rehearsal.activation_bytes,
            "temporaries": rehearsal.peak_bytes + self.state_bytes - held,
        }
        return {name: size / _GIB for name, size in parts.items()}

    @property
    def peak_gib(self) -> float:
        """Memory at the highest moment, all in all."""
        return (self.rehearsal.peak_bytes + self.state_bytes) / _GIB

    @property
    def tflop_per_image(self) -> dict[str, float]:
        """Arithmetic by what it is for, in TFLOP."""
        rehearsal = self.rehearsal
        parts = {
            "encoders": rehearsal.encoder_flops,
            "forward": rehearsal.forward_flops,
            "backward": rehearsal.backward_flops,
            "recomputation": rehearsal.recomputed_flops,
        }
        return {name: flops / self.batch_size / 1e12 for name, flops in parts.items() if flops}

    def images_per_second(self, tflops: float) -> float:
        """Rate of one device whose peak is ``tflops``, at :data:`ASSUMED_UTILISATION`."""
        return tflops * ASSUMED_UTILISATION / sum(self.tflop_per_image.values())


def forecast(
    module: AdapterTraining, batch: Batch, *, world_size: int = 1, num_micro_batches: int = 1, base_shards: int = 1
) -> Forecast:
    """Forecast a run of ``world_size`` devices whose steps are of ``num_micro_batches`` such batches on each.

    ``base_shards``: among how many of them the denoiser is shared out (``strategies.ShardedBase``). Takes about a
    second, and neither memory nor a device: see :func:`rehearse`.
    """
    parameters = list(module.parameters())
    num_trained = sum(p.numel() for p in parameters if p.requires_grad)
    rehearsal = rehearse(module, batch, accumulates=num_micro_batches > 1)
    if base_shards > 1:
        elsewhere = bytes_elsewhere(module.base, base_shards)
        rehearsal = replace(
            rehearsal,
            frozen_bytes=rehearsal.frozen_bytes - elsewhere,
            peak_bytes=rehearsal.peak_bytes - elsewhere,
        )
    copies = (module.ema is not None) + (world_size > 1)
    return Forecast(
        batch_size=len(batch),
        num_frozen=sum(p.numel() for p in parameters) - num_trained,
        num_trained=num_trained,
        rehearsal=rehearsal,
        state_bytes=round(_optimizer_bytes_per_parameter(module) * num_trained) + copies * rehearsal.trained_bytes,
    )


def largest_batch_size(module: AdapterTraining, batch: Batch, memory_gib: float, **plan: int) -> int:
    """The largest micro-batch of samples like those of ``batch`` that ``memory_gib`` hold; 0 if not even one fits.

    ``plan`` is :func:`forecast`'s.
    """

    @cache
    def peak_gib(size: int) -> float:
        return forecast(module, batch.blank(size), **plan).peak_gib

    if peak_gib(1) > memory_gib:
        return 0
    # Memory grows in a straight line, or in two, the second steeper, where the highest moment moves from one place of
    # the step to another: a line through two sizes never promises too much between them, and may do so beyond.
    fitting, size = 1, 2
    while True:
        slope = (peak_gib(size) - peak_gib(fitting)) / (size - fitting)
        guess = int(fitting + (memory_gib - peak_gib(fitting)) / slope)
        if peak_gib(size) > memory_gib or guess <= size:
            return min(guess, size)
        fitting, size = size, guess


def bytes_elsewhere(base: Base, num_shards: int) -> int:
    """What of the denoiser a device does not hold at the highest moment.

    Beside its part it then has two blocks whole, one that runs and the next, and all that is in no block.
    """
    of_blocks = [sum(map(tensor_bytes, block.parameters())) for block in base.blocks]
    whole = sum(map(tensor_bytes, base.denoiser.parameters()))
    gathered = whole - sum(of_blocks) + 2 * max(of_blocks)
    return max(0, whole - whole // num_shards - gathered)


def _optimizer_bytes_per_parameter(module: AdapterTraining) -> float:
    """Of its state, found by a step on one small matrix."""
    weight = nn.Parameter(torch.zeros(256, 256))
    optimizer = module.make_optimizer([weight])
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    state = optimizer.state[weight].values()
    return sum(tensor_bytes(value) for value in state if isinstance(value, torch.Tensor)) / weight.numel()
