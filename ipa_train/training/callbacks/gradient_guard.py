"""Gradient norm, and what happens when it is not finite."""

import logging
import math
from typing import cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor
from torch.optim import Optimizer

from ipa_train.data.batch import Batch
from ipa_train.errors import ConfigError, TrainingError
from ipa_train.runtime.distributed import gather_objects, rank
from ipa_train.training.metrics import RunningMeans

_log = logging.getLogger(__name__)


class GradientGuard(Callback):
    """Log ``train/grad_norm`` (before clipping) and skip every update whose gradients are not finite.

    The gradients are already reduced over the ranks when their norm is taken, so all ranks decide alike. A skipped
    update leaves weights and optimizer state exactly as they were, and still counts as a step:
    ``train/skipped_steps`` is their share in the log interval. Raises TrainingError, which names the step, the ranks
    and the samples whose loss was not finite, after ``max_in_a_row`` of them.
    """

    def __init__(self, *, max_in_a_row: int = 10) -> None:
        if max_in_a_row < 1:
            raise ConfigError(f"callbacks.gradient_guard.max_in_a_row is {max_in_a_row}: it must be 1 or more")
        self.max_in_a_row = max_in_a_row
        self._in_a_row = 0
        self._micro_batches: list[tuple[Tensor, list[str]]] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Measure the norm; drop gradients that are not finite."""
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        finite = math.isfinite(norm.item())
        self._in_a_row = 0 if finite else self._in_a_row + 1
        if not finite:
            # A parameter without a gradient is passed over by the optimizer: no decay, no change of its moments.
            optimizer.zero_grad(set_to_none=True)
        metrics = cast(RunningMeans, pl_module.metrics)
        metrics.update("train/grad_norm", norm)
        metrics.add("train/skipped_steps", float(not finite))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Batch, batch_idx: int
    ) -> None:
        """Once per optimizer step: report a skipped one with the samples that caused it."""
        assert isinstance(outputs, dict)
        self._micro_batches.append((outputs["loss"].detach(), batch.keys))
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        if self._in_a_row:
            self._report(trainer.global_step)
        self._micro_batches.clear()

    def _report(self, step: int) -> None:
        keys = [key for loss, keys in self._micro_batches if not math.isfinite(loss.item()) for key in keys]
        culprits = [f"rank {r}: {', '.join(names)}" for r, names in enumerate(gather_objects(keys)) if names]
        where = "; ".join(culprits) or "no loss was, so the backward pass overflowed"
        if self._in_a_row >= self.max_in_a_row:
            raise TrainingError(
                f"the gradients were not finite {self._in_a_row} times in a row, at last at step {step} ({where}): "
                "lower optimizer.lr, set trainer.gradient_clip_val, or leave those samples out"
            )
        if rank() == 0:
            _log.warning("step %d skipped: its gradients were not finite (%s)", step, where)
