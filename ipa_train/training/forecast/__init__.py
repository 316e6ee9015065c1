"""What a run will need: memory, arithmetic and time, from one training step without data, weights or a device."""

from ipa_train.training.forecast.forecast import (
    ASSUMED_UTILISATION,
    RESERVE_GIB,
    Forecast,
    forecast,
    largest_batch_size,
)
from ipa_train.training.forecast.rehearsal import Rehearsal, rehearse

__all__ = [
    "ASSUMED_UTILISATION",
    "RESERVE_GIB",
    "Forecast",
    "Rehearsal",
    "forecast",
    "largest_batch_size",
    "rehearse",
]
