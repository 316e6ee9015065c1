"""Ending a run that gets no better."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from ipa_train.errors import ConfigError
from ipa_train.runtime.distributed import rank
from ipa_train.training.measuring import Mode, is_better, require_measured

_log = logging.getLogger(__name__)


class EarlyStopping(Callback):
    """Stop after ``patience`` measurements of ``metric`` in a row that beat the best by no more than ``min_delta``.

    Lightning's own waits for the end of an epoch or of a validation loop, and the stream has neither. The step at which
    it stops is saved. The same command then stops again at once, unless it is told otherwise. Without a metric it is
    off.
    """

    def __init__(
        self, *, metric: str | None = None, mode: Mode = "max", patience: int = 10, min_delta: float = 0.0
    ) -> None:
        if patience < 1:
            raise ConfigError(f"callbacks.early_stopping.patience must be at least 1, got {patience}.")
        if min_delta < 0:
            raise ConfigError(f"callbacks.early_stopping.min_delta must be at least 0, got {min_delta}.")
        self.metric, self.mode, self.patience, self.min_delta = metric, mode, patience, min_delta
        self._best: float | None = None
        self._num_worse = 0

    def require_measured(self, callbacks: Sequence[Callback]) -> None:
        """Raise ConfigError unless something in this run measures ``metric``."""
        if self.metric is not None:
            require_measured(callbacks, self.metric, option="callbacks.early_stopping.metric")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop at once a run that had stopped already."""
        self._stop_if_due(trainer)

    def on_measured(self, trainer: Trainer, metrics: Mapping[str, float]) -> None:
        """Count; the same numbers on all ranks make them stop together."""
        if self.metric is None or self.metric not in metrics:
            return
        value = metrics[self.metric]
        if is_better(value, self._best, self.mode, by=self.min_delta):
            self._best, self._num_worse = value, 0
        else:
            self._num_worse += 1
        self._stop_if_due(trainer)

    def _stop_if_due(self, trainer: Trainer) -> None:
        if self._num_worse < self.patience:
            return
        trainer.should_stop = True
        if rank() == 0:
            _log.warning(
                "stopped early at step %d: %s was not better than %s %d times in a row; a higher "
                "callbacks.early_stopping.patience goes on",
                trainer.global_step,
                self.metric,
                self._best,
                self._num_worse,
            )

    def state_dict(self) -> dict[str, Any]:
        """What it has seen, and by which measure."""
        return {"metric": self.metric, "mode": self.mode, "best": self._best, "num_worse": self._num_worse}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting, if it is by the same measure."""
        if (state_dict["metric"], state_dict["mode"]) == (self.metric, self.mode):
            self._best, self._num_worse = state_dict["best"], state_dict["num_worse"]
