"""A log file for each rank, in the run's folder."""

from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from ipa_train.runtime.distributed import failing_alike
from ipa_train.runtime.rank_log import RankLog


class RankLogs(Callback):
    """Write ``folder/rank-N.log`` from the setup of training on, and the error that ends it.

    Not before: by then all ranks have met, so rank 0 has found that the run's folder is a run's.
    """

    def __init__(self, *, folder: str) -> None:
        self.folder = Path(folder)
        self._log: RankLog | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Open the file."""
        with failing_alike():
            self._log = RankLog(self.folder, rank=trainer.global_rank, world_size=trainer.world_size)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write what has ended the run; what is said after it still comes into the file."""
        if self._log is not None:
            self._log.note_end(exception)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Close the file."""
        if self._log is not None:
            self._log.note(f"training has ended at step {trainer.global_step}")
            self._log.leave()
            self._log = None
