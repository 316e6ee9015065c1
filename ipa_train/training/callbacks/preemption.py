"""All ranks stop at the same step, with a checkpoint, if one of them was told to."""

import logging
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.types import STEP_OUTPUT

from ipa_train.errors import ConfigError, TakenOverError
from ipa_train.runtime import preemption

_log = logging.getLogger(__name__)


class Preemption(Callback):
    """Stop between two optimizer steps when any rank was told to; ``Checkpointing`` then saves, as at every end.

    One process looks after every step. Several agree every ``every_steps``, on the host: they wait for the slowest
    host, and never for a device. So the time from a signal to the checkpoint is at most that many steps and one save.

    ``stopped`` says whether a fit ended so.
    """

    def __init__(self, *, every_steps: int = 10) -> None:
        if every_steps < 1:
            raise ConfigError(f"callbacks.preemption.every_steps must be 1 or more, got {every_steps}.")
        self.every_steps = every_steps
        self.stopped = False
        self._group: Any = None
        self._agreed_step = -1

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the signals from Lightning.

        It would save, or broadcast, inside its handler (Lightning issue 21406), take SIGTERM for a successful end, and
        ask rank 0 for news before every batch, with a wait for the device.
        """
        trainer._signal_connector.register_signal_handlers = lambda: None
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop before the first step if told so during the start."""
        self.stopped, self._agreed_step = False, trainer.global_step
        # Of its own: a collective of the default group could wait for the device, or for one that is under way.
        self._group = dist.new_group(backend="gloo") if trainer.world_size > 1 else None
        self._agree(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: object, batch_idx: int
    ) -> None:
        """Agree, where a step has ended: not between the micro-batches of one, nor at the run's last."""
        step = trainer.global_step
        if step in (self._agreed_step, trainer.max_steps) or (self._group is not None and step % self.every_steps):
            return
        self._agreed_step = step
        self._agree(trainer)

    def _agree(self, trainer: Trainer) -> None:
        status = self._highest(preemption.wish())
        if not status:
            return
        preemption.be_deaf()
        # Lightning's launcher would kill rank 0 as soon as it sees another rank end with anything but 0.
        getattr(trainer.strategy.launcher, "procs", []).clear()
        if status == preemption.EXIT_TAKEN_OVER:
            raise TakenOverError("a newer start has taken over this run: ended, and nothing more written")
        if trainer.is_global_zero:
            _log.info("told to stop: saving a checkpoint at step %d", trainer.global_step)
        self.stopped = trainer.should_stop = True

    def _highest(self, value: int) -> int:
        if self._group is None:
            return value
        values = np.array([value])
        dist.all_reduce(torch.from_numpy(values), op=dist.ReduceOp.MAX, group=self._group)
        return int(values[0])
