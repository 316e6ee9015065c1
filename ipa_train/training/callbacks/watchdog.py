"""A rank that makes no progress ends, so that the job ends and can be started again."""

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.types import STEP_OUTPUT

from ipa_train.errors import ConfigError
from ipa_train.runtime import watchdog
from ipa_train.runtime.distributed import limit_collectives


class Watchdog(Callback):
    """End the process with status 70, after the stacks of its threads, if no micro-batch ends for ``timeout_minutes``.

    Waiting for data counts, for other ranks too. Not counted are the first micro-batch of a start, in which kernels are
    compiled, and what says so by ``runtime.watchdog.unwatched``: saves and sample grids.

    A collective may last ``collective_timeout_minutes`` (Lightning's default: 30). The other ranks wait in one while
    rank 0 saves or draws.
    """

    def __init__(self, *, timeout_minutes: float = 20, collective_timeout_minutes: float = 10) -> None:
        if collective_timeout_minutes <= 0:
            raise ConfigError(
                f"callbacks.watchdog.collective_timeout_minutes must be above 0, got {collective_timeout_minutes}."
            )
        if timeout_minutes <= collective_timeout_minutes:
            raise ConfigError(
                f"callbacks.watchdog.timeout_minutes must be above collective_timeout_minutes "
                f"({collective_timeout_minutes}), got {timeout_minutes}."
            )
        self.timeout_minutes, self.collective_timeout_minutes = timeout_minutes, collective_timeout_minutes
        self._watchdog: watchdog.Watchdog | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Limit the collectives; watch from the first micro-batch's end on."""
        if trainer.world_size > 1:
            limit_collectives(self.collective_timeout_minutes)
        self._watchdog = watchdog.Watchdog(self.timeout_minutes * 60)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: object, batch_idx: int
    ) -> None:
        """Note that something has moved."""
        assert self._watchdog is not None
        self._watchdog.pat()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Watch no longer."""
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Watch no longer."""
        self._stop()

    def _stop(self) -> None:
        if self._watchdog is not None:
            self._watchdog.stop()
            self._watchdog = None
