"""What a few steps spend their time on, operator by operator."""

import logging
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch.profiler import ProfilerActivity, profile

from ipa_train.data.batch import Batch
from ipa_train.errors import ConfigError
from ipa_train.runtime.files import atomic_write

_log = logging.getLogger(__name__)
_NUM_ROWS = 40


class Profiling(Callback):
    """Record rank 0 for ``num_steps`` optimizer steps, from the ``first_step``-th of this start on (null: never).

    Writes to ``folder`` a trace that chrome://tracing and https://ui.perfetto.dev show, and a table of the most
    expensive operators. The first steps of a start are not typical: libraries load, kernels are chosen and compiled.
    While it records, steps are slower.
    """

    def __init__(self, *, folder: str, first_step: int | None = None, num_steps: int = 3) -> None:
        for option, value in (("first_step", first_step), ("num_steps", num_steps)):
            if value is not None and value < 1:
                raise ConfigError(f"callbacks.profiling.{option} must be 1 or more, got {value}.")
        self.folder, self.first_step, self.num_steps = Path(folder), first_step, num_steps
        self._profile: Any = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note which steps to record."""
        self._first: int | None = None
        if self.first_step is not None and trainer.is_global_zero:
            self._first = trainer.global_step + self.first_step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        """Begin with the first micro-batch of the first step."""
        if self._profile is None and trainer.global_step + 1 == self._first:
            on_gpu = pl_module.device.type == "cuda"
            self._profile = profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu])
            self._profile.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Batch, batch_idx: int
    ) -> None:
        """End after the last step."""
        if self._first is not None and trainer.global_step + 1 == self._first + self.num_steps:
            self._write(trainer.global_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what there is where the run was shorter."""
        self._write(trainer.global_step)
        if self._first is not None:
            _log.warning(
                "callbacks.profiling.first_step=%s: this start ended before, at step %d, and nothing was recorded",
                self.first_step,
                trainer.global_step,
            )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stop, also after an error."""
        if self._profile is not None:
            self._profile.stop()
            self._profile = None

    def _write(self, last_step: int) -> None:
        if self._profile is None:
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        recorded, self._profile = self._profile, None
        recorded.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"steps-{self._first}-{last_step}"
        self._first = None
        with atomic_write(self.folder / f"{name}.json") as temporary:
            recorded.export_chrome_trace(str(temporary))
        operators = recorded.key_averages()
        on_gpu = ProfilerActivity.CUDA in recorded.activities
        key = "self_device_time_total" if on_gpu else "self_cpu_time_total"
        with atomic_write(self.folder / f"{name}.txt") as temporary:
            temporary.write_text(operators.table(sort_by=key, row_limit=_NUM_ROWS))
        _log.info("profiled steps %s: %s", name.removeprefix("steps-"), self.folder / name)
