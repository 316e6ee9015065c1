"""Gradient norm, and what happens when it is not finite."""

import logging
import math
from dataclasses import dataclass
from typing import cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor
from torch.optim import Adam, Optimizer

from ipa_train.data.batch import Batch
from ipa_train.errors import ConfigError, TrainingError
from ipa_train.runtime.distributed import gather_objects, rank
from ipa_train.training.metrics import RunningMeans, ends_interval
from ipa_train.training.zero import gradient_norm, shares_gradients

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Step:
    number: int
    norm: Tensor
    micro_batches: list[tuple[Tensor, list[str]]]
    """Loss and keys of each."""


@dataclass(frozen=True)
class _Skipped:
    number: int
    in_a_row: int
    """How many there were by then, this one included."""
    keys: list[str]
    """Samples of this rank in micro-batches whose loss was not finite."""


class GradientGuard(Callback):
    """Log ``train/grad_norm`` (before clipping) and skip every update whose gradients are not finite.

    The gradients are already reduced over the ranks when their norm is taken, so all ranks decide alike. A skipped
    update leaves weights and optimizer state exactly as they were, and still counts as a step:
    ``train/skipped_steps`` is their share in the log interval.

    A fused Adam or AdamW skips by itself, on the device, and the host learns of it at the end of the log interval, or
    where training ends before: then every skipped step is reported with the ranks and samples whose loss was not
    finite, and after ``max_in_a_row`` of them TrainingError is raised, which names the last. Any other optimizer has
    no such skip: there the host waits for the norm at every step. DeepSpeed skips by itself, and waits as well.
    """

    def __init__(self, *, max_in_a_row: int = 10) -> None:
        if max_in_a_row < 1:
            raise ConfigError(f"callbacks.gradient_guard.max_in_a_row is {max_in_a_row}: it must be 1 or more")
        self.max_in_a_row = max_in_a_row
        self._in_a_row = 0
        self._norm: Tensor | None = None
        self._micro_batches: list[tuple[Tensor, list[str]]] = []
        self._unread: list[_Step] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Measure the norm; see to it that gradients that are not finite change nothing."""
        self._norm = norm = gradient_norm(optimizer)
        if _skips_by_itself(optimizer):
            optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]
        elif not shares_gradients(optimizer) and not math.isfinite(norm.item()):
            # A parameter without a gradient is passed over by the optimizer: no decay, no change of its moments.
            optimizer.zero_grad(set_to_none=True)
        metrics = cast(RunningMeans, pl_module.metrics)
        metrics.update("train/grad_norm", norm)
        metrics.update("train/skipped_steps", ~norm.isfinite())

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Batch, batch_idx: int
    ) -> None:
        """Note what a step was made of; at the end of an interval report those that were skipped."""
        assert isinstance(outputs, dict)
        self._micro_batches.append((outputs["loss"].detach(), batch.keys))
        if self._norm is None:  # more micro-batches are to come
            return
        self._unread.append(_Step(trainer.global_step, self._norm, self._micro_batches))
        self._norm, self._micro_batches = None, []
        if ends_interval(trainer):
            self._report()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report the rest where training ended within an interval."""
        self._report()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Report the rest for this rank alone: the others may not have stopped."""
        if isinstance(exception, RuntimeError):  # perhaps of the device, from which nothing can be read then
            return
        for step in self._read():
            _warn(step, [step.keys if r == rank() else [] for r in range(rank() + 1)])

    def _report(self) -> None:
        skipped = self._read()
        if not skipped:  # on all ranks alike
            return
        of_ranks = gather_objects([step.keys for step in skipped])
        for step, *keys in zip(skipped, *of_ranks, strict=True):
            if step.in_a_row >= self.max_in_a_row:
                raise TrainingError(
                    f"the gradients were not finite {step.in_a_row} times in a row, at last at step {step.number} "
                    f"({_culprits(keys)}): lower optimizer.lr, set trainer.gradient_clip_val, or leave those samples "
                    "out"
                )
            if rank() == 0:
                _warn(step, keys)

    def _read(self) -> list[_Skipped]:
        """Wait for the device, and return what it skipped since the last time."""
        steps, self._unread = self._unread, []
        norms = torch.stack([step.norm for step in steps]).tolist() if steps else []
        skipped = []
        for step, norm in zip(steps, norms, strict=True):
            self._in_a_row = 0 if math.isfinite(norm) else self._in_a_row + 1
            if self._in_a_row:
                keys = [key for loss, names in step.micro_batches if not math.isfinite(loss.item()) for key in names]
                skipped.append(_Skipped(step.number, self._in_a_row, keys))
        return skipped


def _skips_by_itself(optimizer: Optimizer) -> bool:
    """Whether it leaves all as it was where its ``found_inf`` is 1.

    torch's fused SGD would, but for a first step: it then goes on from momentum that was never written.
    """
    return isinstance(optimizer, Adam) and all(group.get("fused") for group in optimizer.param_groups)


def _warn(step: _Skipped, keys_of_ranks: list[list[str]]) -> None:
    _log.warning("step %d skipped: its gradients were not finite (%s)", step.number, _culprits(keys_of_ranks))


def _culprits(keys_of_ranks: list[list[str]]) -> str:
    named = [f"rank {r}: {', '.join(keys)}" for r, keys in enumerate(keys_of_ranks) if keys]
    return "; ".join(named) or "no loss was, so the backward pass overflowed"
