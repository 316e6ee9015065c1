"""When checkpoints are written, which stay, and which is the best."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint
from lightning.pytorch.utilities.types import STEP_OUTPUT

from ipa_train.errors import ConfigError, UserError
from ipa_train.runtime.distributed import failing_alike
from ipa_train.runtime.watchdog import unwatched
from ipa_train.training.checkpoint import checkpoint_path, point_to_best, prune
from ipa_train.training.measuring import Mode, is_better, require_measured


class Checkpointing(Checkpoint):
    """Save into ``folder`` every ``every_steps`` and ``keep_every`` optimizer steps, and wherever training ends.

    Keeps the ``keep_last`` newest, and for good those whose step is a multiple of ``keep_every``. Where ``keep_best``
    names a metric that is measured in training, every step at which it is better than ever before is saved too, and the
    best of them stays: ``folder/best`` is a link to it. A module that has ``write_exports(folder)`` is asked to add its
    export to each. Saves happen between two steps only; whoever wants one at another moment, such as the handling of a
    preemption, sets ``trainer.should_stop``. Lightning runs callbacks of this base class after all others, so the state
    of the others is that of the finished step.
    """

    def __init__(
        self,
        *,
        folder: str,
        every_steps: int = 1000,
        keep_last: int = 3,
        keep_every: int | None = None,
        keep_best: str | None = None,
        best_mode: Mode = "max",
    ) -> None:
        if every_steps < 1:
            raise ConfigError(f"callbacks.checkpointing.every_steps is {every_steps}: it must be 1 or more")
        if keep_last < 1:
            raise ConfigError(f"callbacks.checkpointing.keep_last is {keep_last}: it must be 1 or more")
        if keep_every is not None and keep_every < 1:
            raise ConfigError(f"callbacks.checkpointing.keep_every is {keep_every}: it must be 1 or more, or null")
        self.folder = Path(folder)
        self.every_steps = every_steps
        self.keep_last = keep_last
        self.keep_every = keep_every
        self.keep_best, self.best_mode = keep_best, best_mode
        self._best: dict[str, Any] = {}
        self._best_due = False
        self._saved_step = 0

    def require_measured(self, callbacks: Sequence[Callback]) -> None:
        """Raise ConfigError unless something in this run measures ``keep_best``."""
        if self.keep_best is not None:
            require_measured(callbacks, self.keep_best, option="callbacks.checkpointing.keep_best")

    def on_measured(self, trainer: Trainer, metrics: Mapping[str, float]) -> None:
        """Have this step saved if it is the best so far."""
        value = metrics.get(self.keep_best or "", float("nan"))
        if is_better(value, self._best.get("value"), self.best_mode):
            self._best = {**self._criterion, "step": trainer.global_step, "value": value}
            self._best_due = True

    @property
    def _criterion(self) -> dict[str, Any]:
        return {"metric": self.keep_best, "mode": self.best_mode}

    def state_dict(self) -> dict[str, Any]:
        """The best step so far, and by what."""
        return self._best

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the best so far, if it was chosen by the same metric and is still there."""
        same = self._criterion.items() <= state_dict.items()
        if same and checkpoint_path(self.folder, state_dict["step"]).is_dir():
            self._best = dict(state_dict)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the untrained adapter, to compare with; take the checkpoint that a run resumes from as saved.

        That of step 0 as well: saved again it would look, to a batch script, like progress at every start.
        """
        if trainer.global_step == 0 and trainer.ckpt_path is None:
            self._saved_step = -1
            self._save(trainer, pl_module)
        self._saved_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: object, batch_idx: int
    ) -> None:
        """Save if this step is due, the best so far, or the last."""
        step = trainer.global_step
        due = step % self.every_steps == 0 or (self.keep_every is not None and step % self.keep_every == 0)
        if due or self._best_due or step == trainer.max_steps or trainer.should_stop:
            self._save(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save where the data ended before ``max_steps``."""
        self._save(trainer, pl_module)

    def _save(self, trainer: Trainer, module: LightningModule) -> None:
        step = trainer.global_step
        if step == self._saved_step:  # between the micro-batches of the next step, or already done
            return
        with unwatched():
            self._write(trainer, module, step)
        self._saved_step, self._best_due = step, False

    def _write(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        path = checkpoint_path(self.folder, step)
        with failing_alike():  # only rank 0 writes
            try:
                trainer.save_checkpoint(path, storage_options=getattr(module, "write_exports", None))
            except UserError:
                trainer.strategy.barrier()  # the one inside save_checkpoint, where the other ranks are waiting
                raise
        if trainer.is_global_zero:
            if self._best:
                point_to_best(self.folder, self._best["step"])
            prune(self.folder, keep_last=self.keep_last, keep_every=self.keep_every, best=self._best.get("step"))
