"""Means over the samples of a log interval, kept on the device and summed over ranks once per interval."""

from collections.abc import Callable

import torch
from lightning.pytorch import Trainer
from torch import Tensor


def ends_interval(trainer: Trainer) -> bool:
    """Whether the step just done ends a log interval: the only steps after which the host may wait for the device."""
    step = trainer.global_step
    return step % trainer.log_every_n_steps == 0 or step == trainer.max_steps


class RunningMeans:
    """Sums and counts by name; adding to them never waits for the device.

    Every rank must use the same names between two calls of :meth:`compute_and_reset`, whatever its samples: use
    ``where`` for a group of samples that may be empty.
    """

    def __init__(self) -> None:
        self._totals: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self, name: str, values: Tensor, *, where: Tensor | None = None) -> None:
        """Add ``values`` (any shape) to the mean ``name``; only those where the boolean ``where`` (same shape) is true.

        Values that are not finite are left out: the update they lead to is skipped and counted by itself.
        """
        values = values.detach().double()
        chosen = values.isfinite() if where is None else values.isfinite() & where
        self._add(name, torch.stack([values.where(chosen, 0.0).sum(), chosen.sum()]))

    def add(self, name: str, total: float, count: float = 1.0) -> None:
        """Add numbers known on the host: the mean is the sum of ``total`` over the sum of ``count``."""
        self._add(name, torch.tensor([total, count], dtype=torch.float64))

    def compute_and_reset(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Return every mean with a count above 0 and start anew.

        ``reduce`` sums a (names, 2) float64 tensor over the ranks; it is called once, by every rank.
        """
        if not self._totals:
            return {}
        names = sorted(self._totals)
        device = max((t.device for t in self._totals.values()), key=lambda d: d.type != "cpu")
        stacked = torch.stack([self._totals[name].to(device, non_blocking=True) for name in names])
        self._totals = {name: torch.zeros_like(total) for name, total in self._totals.items()}
        return {name: s / c for name, (s, c) in zip(names, reduce(stacked).tolist(), strict=True) if c}

    def _add(self, name: str, increment: Tensor) -> None:
        total = self._totals.get(name)
        self._totals[name] = increment if total is None else total + increment
