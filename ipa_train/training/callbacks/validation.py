"""What callbacks share that measure something of a fixed set of samples now and then."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch
from jaxtyping import Float
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor

from ipa_train.data.batch import Batch
from ipa_train.data.datamodule import StreamingDataModule
from ipa_train.data.fixed_samples import FixedSamples
from ipa_train.data.sequential import SequentialDataModule
from ipa_train.errors import ConfigError
from ipa_train.runtime.distributed import rank, sum_over_ranks
from ipa_train.runtime.watchdog import unwatched
from ipa_train.training.measuring import publish
from ipa_train.training.module import AdapterTraining
from ipa_train.training.strategies import base_shards

_log = logging.getLogger(__name__)


class Validation(Callback, ABC):
    """Every ``every_steps`` optimizer steps :meth:`measure` something of :class:`FixedSamples`, and publish it.

    The set is cut into pieces of ``batch_size``, which the ranks share: a piece is computed alike on any of them, so
    the numbers do not depend on how many there are. 0 steps turns it off.
    """

    name: ClassVar[str]
    """Its key in the config."""
    min_samples: ClassVar[int] = 1

    def __init__(
        self, *, every_steps: int, num_samples: int, batch_size: int, shards: str | Sequence[str] | None
    ) -> None:
        option = f"callbacks.{self.name}"
        if every_steps < 0:
            raise ConfigError(f"{option}.every_steps must be at least 0 (off), got {every_steps}.")
        if batch_size < 1:
            raise ConfigError(f"{option}.batch_size must be at least 1, got {batch_size}.")
        if num_samples < self.min_samples or num_samples % batch_size:
            raise ConfigError(
                f"{option}.num_samples must be at least {self.min_samples} and a multiple of "
                f"{option}.batch_size={batch_size}, got {num_samples}."
            )
        self.every_steps, self.num_samples, self.batch_size, self.shards = every_steps, num_samples, batch_size, shards
        self._samples: FixedSamples | None = None
        self._measured_step = 0

    @property
    @abstractmethod
    def metric_names(self) -> Sequence[str]:
        """What may be chosen by; nothing if it is off."""

    @abstractmethod
    def measure(self, trainer: Trainer, module: AdapterTraining) -> dict[str, float]:
        """The metrics, alike on all ranks."""

    def prepare(self, data: StreamingDataModule) -> None:
        """Find the samples; all ranks do, rank 0 first, since it may have to index ``shards``.

        ``num_samples`` then is what there is. With too few samples it turns itself off, and says so.

        Raises:
            ConfigError: too few samples in ``shards``, or none that are always the same.
            DataError: shards that cannot be used.
        """
        if not self.every_steps or self._samples is not None:
            return
        if isinstance(data, SequentialDataModule):
            self._turn_off("sources without an index have no samples that are always the same")
            return
        option = f"callbacks.{self.name}.shards"
        samples = FixedSamples(data, num_samples=self.num_samples, shards=self.shards, option=option)
        self.num_samples = len(samples) // self.batch_size * self.batch_size
        if self.num_samples < self.min_samples:
            self._turn_off(f"there are {len(samples)} samples, and it takes {max(self.min_samples, self.batch_size)}")
            return
        self._samples = samples
        if (steps := samples.held_out_steps) is not None and rank() == 0:
            _log.info(
                "%s: measured on %d samples of data.shards that are not trained on before step %d or so; "
                "callbacks.%s.shards=... takes others",
                self.name,
                self.num_samples,
                steps,
                self.name,
            )

    def _turn_off(self, reason: str) -> None:
        if self.shards is not None:
            raise ConfigError(f"callbacks.{self.name}.shards={self.shards}: {reason}.")
        if rank() == 0:
            _log.warning("%s is off: %s", self.name, reason)
        self.every_steps = 0

    def on_fit_start(self, trainer: Trainer, pl_module: AdapterTraining) -> None:
        """Find the samples on the ranks that have not yet."""
        self.prepare(trainer.datamodule)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: AdapterTraining, outputs: STEP_OUTPUT, batch: object, batch_idx: int
    ) -> None:
        """Measure if this step is due."""
        step = trainer.global_step
        if not self.every_steps or step == self._measured_step or step % self.every_steps:
            return
        self._measured_step = step
        with unwatched():
            metrics = self.measure(trainer, pl_module)
        publish(trainer, metrics)

    def pieces(self, trainer: Trainer, module: AdapterTraining) -> Iterator[tuple[int, Batch]]:
        """This rank's share of the set: the number of each piece's first sample, and the piece on the device.

        Where ranks share the base, all take part in each other's forwards: one that has no piece left takes another's.
        """
        assert self._samples is not None
        starts = range(0, self.num_samples, self.batch_size)
        for first in range(0, len(starts), trainer.world_size):
            piece = first + trainer.global_rank
            if piece < len(starts) or base_shards(trainer) > 1:
                start = starts[piece % len(starts)]
                yield start, self._samples.batch(start, start + self.batch_size).to(module.device)

    def summed_over_ranks(self, trainer: Trainer, numbered: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
        """Numbers of all n samples on every rank, exactly, from those of this rank's own pieces."""
        pieces = torch.arange(self.num_samples, device=numbered.device) // self.batch_size
        numbered[:, pieces % trainer.world_size != trainer.global_rank] = 0.0
        return sum_over_ranks(numbered)
