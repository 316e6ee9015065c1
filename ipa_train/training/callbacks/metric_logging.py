"""Everything a run measures, gathered, reduced and shown once per log interval."""

import logging
from typing import cast

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor
from torch.optim import Optimizer

from ipa_train.data.batch import Batch
from ipa_train.data.datamodule import StreamingDataModule
from ipa_train.runtime.distributed import failing_alike, gather_objects, sum_over_ranks
from ipa_train.training.csv_log import CSVLog
from ipa_train.training.metrics import RunningMeans, ends_interval
from ipa_train.training.module import AdapterTraining
from ipa_train.training.status_line import StatusLine
from ipa_train.training.stragglers import Stragglers
from ipa_train.training.throughput import Arithmetic, Throughput, num_pixels, peak_memory_gib

SETTLED_STEPS = 10
"""After so many steps a start counts its arithmetic: the first ones say nothing of its speed."""
_log = logging.getLogger(__name__)


class MetricLogging(Callback):
    """Send ``module.metrics``, learning rate, throughput, data wait and peak memory to all loggers and the console.

    Every ``trainer.log_every_n_steps`` optimizer steps and at the last one, with a single all-reduce. Means are over
    all samples of all ranks since the last time; ``perf/peak_memory_gib`` is the mean over ranks, and so are
    ``perf/tflops`` and ``perf/mfu`` (see ``Arithmetic``), which begin after :data:`SETTLED_STEPS`. ``progress``: a bar
    (true), lines (false), or a bar if stderr is a terminal (null). A rank whose slowness costs the others more than
    ``max_straggler_fraction`` of the time is named (see ``Stragglers``).
    """

    def __init__(self, *, progress: bool | None = None, max_straggler_fraction: float = 0.1) -> None:
        self._throughput = Throughput()
        self._stragglers = Stragglers(max_fraction=max_straggler_fraction)
        self._status = StatusLine(progress=progress)
        self._shown_step = 0
        self._arithmetic: Arithmetic | None = None
        self._first_step, self._is_counted = 0, False
        self._num_pixels = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clocks; let a resumed CSV file forget the rows that will come again."""
        self._shown_step = self._first_step = trainer.global_step
        with failing_alike():
            for logger in trainer.loggers:
                if isinstance(logger, CSVLog):
                    logger.resume(trainer.global_step)
        if trainer.is_global_zero:
            self._status.start(trainer.global_step, trainer.max_steps)
        self._throughput.start(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        """Count the arithmetic of a batch that begins an interval; the time for that is nobody's."""
        step = trainer.global_step
        if self._is_counted or step != self._shown_step or step < self._first_step + SETTLED_STEPS:
            return
        self._is_counted = True
        if not isinstance(pl_module, AdapterTraining):
            return
        try:
            self._arithmetic = Arithmetic(pl_module, batch)
        except RuntimeError as error:
            _log.warning("no perf/tflops in this run, as its step cannot be run without data: %s", error)
        self._throughput.take()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Note where the time of a rank's own ends."""
        self._throughput.reached_loss()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Note the learning rate before the schedule moves on."""
        self._lr = optimizer.param_groups[0]["lr"]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Batch, batch_idx: int
    ) -> None:
        """Count; at the end of an interval reduce, log and show."""
        step = trainer.global_step
        self._throughput.count(len(batch))
        self._num_pixels += len(batch) * num_pixels(batch)
        if trainer.is_global_zero:
            self._status.advance(step)
        if step != self._shown_step and ends_interval(trainer):
            self._shown_step = step
            self._log(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Close the bar, also after an error."""
        self._status.close()
        self._throughput.stop(trainer)

    def _log(self, trainer: Trainer, module: LightningModule) -> None:
        mine = self._throughput.take()
        own, waited = mine.own_seconds / mine.seconds, mine.waited_seconds / mine.seconds
        means = cast(RunningMeans, module.metrics)
        # As a mean per rank: the sum of all images over the mean of the ranks' seconds.
        means.add("perf/images_per_second", float(mine.num_images * trainer.world_size), mine.seconds)
        means.add("perf/data_wait_fraction", mine.waited_seconds, mine.seconds)
        means.add("perf/peak_memory_gib", peak_memory_gib(module.device))
        metrics = means.compute_and_reset(sum_over_ranks)
        metrics["train/lr"] = self._lr
        if self._arithmetic is not None:
            rate = metrics["perf/images_per_second"] / trainer.world_size
            metrics |= self._arithmetic.metrics(rate * self._num_pixels / mine.num_images)
        self._num_pixels = 0
        metrics |= self._stragglers.judge(own, waited, gather_objects)
        if isinstance(trainer.datamodule, StreamingDataModule):
            trainer.datamodule.budget.settle(gather_objects)
            metrics |= trainer.datamodule.progress()
        with failing_alike():
            if trainer.is_global_zero:
                self._status.show(trainer.global_step, metrics)
                for logger in trainer.loggers:
                    logger.log_metrics(metrics, step=trainer.global_step)
            else:  # for this rank's own log
                shares = f"{own:.0%} of the time until its losses, {waited:.0%} waiting for data"
                _log.info("step %d: %.3g s, %s", trainer.global_step, mine.seconds, shares)
