"""Learning-rate schedules. The optimizer itself is plain ``torch.optim.AdamW``, as in the paper (section 4.1)."""

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ipa_train.errors import ConfigError, did_you_mean

_SHAPES = ("constant", "cosine", "linear")


class LRSchedule:
    """A linear warm-up over ``warmup_steps``, then ``shape`` down to ``final_fraction`` of the learning rate.

    ``shape``: ``constant`` (the paper's), ``cosine`` or ``linear``; the latter two end at the run's last step.
    """

    def __init__(self, *, shape: str = "constant", warmup_steps: int = 0, final_fraction: float = 0.0) -> None:
        if shape not in _SHAPES:
            raise ConfigError(f"lr_schedule.shape is {shape!r}.{did_you_mean(shape, _SHAPES)}")
        if warmup_steps < 0:
            raise ConfigError(f"lr_schedule.warmup_steps is {warmup_steps}: it must be 0 or more")
        if not 0.0 <= final_fraction <= 1.0:
            raise ConfigError(f"lr_schedule.final_fraction is {final_fraction}: it must be within 0 and 1")
        if shape == "constant" and final_fraction:
            raise ConfigError(
                f"lr_schedule.final_fraction={final_fraction} has no effect with shape=constant: "
                "choose lr_schedule.shape=cosine or linear, or leave it out"
            )
        self.shape = shape
        self.warmup_steps = warmup_steps
        self.final_fraction = final_fraction

    def factor(self, step: int, max_steps: int) -> float:
        """Return the factor in [0, 1] on the learning rate of update number ``step`` (from 0) of ``max_steps``."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        if self.shape == "constant":
            return 1.0
        progress = min(1.0, (step - self.warmup_steps) / max(1, max_steps - self.warmup_steps))
        remaining = 1.0 - progress if self.shape == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
        return self.final_fraction + (1.0 - self.final_fraction) * remaining

    def build(self, optimizer: Optimizer, max_steps: int) -> LambdaLR:
        """Return the scheduler for Lightning to step once per optimizer step."""
        if self.shape != "constant" and max_steps < 1:
            raise ConfigError(f"lr_schedule.shape={self.shape} needs a length: set trainer.max_steps (got {max_steps})")
        return LambdaLR(optimizer, lambda step: self.factor(step, max_steps))
