"""What validation measures, on its way to the loggers and to those who choose by it."""

from collections.abc import Mapping, Sequence
from typing import Literal, Protocol, runtime_checkable

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback

from ipa_train.errors import ConfigError, did_you_mean

Mode = Literal["max", "min"]
"""Which values of a metric are the better ones."""


@runtime_checkable
class Measures(Protocol):
    """A callback that measures something now and then."""

    @property
    def metric_names(self) -> Sequence[str]:
        """What it measures; nothing if it is off."""


@runtime_checkable
class Watches(Protocol):
    """A callback that acts on what is measured."""

    def require_measured(self, callbacks: Sequence[Callback]) -> None:
        """Raise ConfigError if it waits for what none of a run's callbacks measures."""

    def on_measured(self, trainer: Trainer, metrics: Mapping[str, float]) -> None:
        """Called on all ranks with the same numbers, after the step that they are of and before it is saved."""


def publish(trainer: Trainer, metrics: Mapping[str, float]) -> None:
    """Log ``metrics``, alike on all ranks, and show them to the callbacks that watch."""
    if trainer.is_global_zero:
        for logger in trainer.loggers:
            logger.log_metrics(dict(metrics), step=trainer.global_step)
    for callback in trainer.callbacks:
        if isinstance(callback, Watches):
            callback.on_measured(trainer, metrics)


def require_measured(callbacks: Sequence[Callback], metric: str, *, option: str) -> None:
    """Raise ConfigError unless one of ``callbacks`` measures ``metric``, which ``option`` names."""
    known = [name for callback in callbacks if isinstance(callback, Measures) for name in callback.metric_names]
    if metric not in known:
        raise ConfigError(f"{option}={metric}: nothing in this run measures that.{did_you_mean(metric, known)}")


def is_better(value: float, best: float | None, mode: Mode, *, by: float = 0.0) -> bool:
    """Whether ``value`` beats ``best`` by more than ``by``; what is not a number never does."""
    if value != value:
        return False
    return best is None or (value - best if mode == "max" else best - value) > by
