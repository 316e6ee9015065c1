"""No checkpoint is written by a start that a newer one has taken over from."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.types import STEP_OUTPUT

from ipa_train.training.ownership import Ownership


class OwnershipCheck(Callback):
    """For rank 0: look at the owner's record before every save, and tell the heartbeat of each step.

    Not among the configured callbacks, as nobody should do without it.
    """

    def __init__(self, ownership: Ownership) -> None:
        self.ownership = ownership

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note where it begins."""
        self.ownership.step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: object, batch_idx: int
    ) -> None:
        """Note the progress."""
        self.ownership.step = trainer.global_step

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Raise TakenOverError, which ``Checkpointing`` passes on to all ranks, before anything is written."""
        self.ownership.require()
