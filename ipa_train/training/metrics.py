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
    """Sums and counts by name; adding to them never waits for the device, nor gives it work before they are read.

    Every rank must use the same names between two calls of :meth:`compute_and_reset`, whatever its samples: use
    ``where`` for a group of samples that may be empty.
    """

    def __init__(self) -> None:
        self._values: dict[str, list[tuple[Tensor, Tensor | None]]] = {}
        self._totals: dict[str, list[float]] = {}

    def update(self, name: str, values: Tensor, *, where: Tensor | None = None) -> None:
        """Add ``values`` (any shape) to the mean ``name``; only those where the boolean ``where`` (same shape) is true.

        Values that are not finite are left out: the update they lead to is skipped and counted by itself.
        """
        self._values.setdefault(name, []).append((values.detach(), where))

    def add(self, name: str, total: float, count: float = 1.0) -> None:
        """Add numbers known on the host: the mean is the sum of ``total`` over the sum of ``count``."""
        sums = self._totals.setdefault(name, [0.0, 0.0])
        sums[0], sums[1] = sums[0] + total, sums[1] + count

    def compute_and_reset(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Return every mean with a count above 0 and start anew.

        ``reduce`` sums a (names, 2) float64 tensor over the ranks; it is called once, by every rank.
        """
        totals = {name: _sum_and_count(values) for name, values in self._values.items()}
        totals |= {name: torch.tensor(sums, dtype=torch.float64) for name, sums in self._totals.items()}
        if not totals:
            return {}
        # Names stay, so that ranks agree on them also where one has nothing new.
        self._values, self._totals = {name: [] for name in self._values}, {name: [0.0, 0.0] for name in self._totals}
        names = sorted(totals)
        device = max((t.device for t in totals.values()), key=lambda d: d.type != "cpu")
        stacked = torch.stack([totals[name].to(device, non_blocking=True) for name in names])
        return {name: s / c for name, (s, c) in zip(names, reduce(stacked).tolist(), strict=True) if c}


def _sum_and_count(rows: list[tuple[Tensor, Tensor | None]]) -> Tensor:
    if not rows:
        return torch.zeros(2, dtype=torch.float64)
    values = torch.cat([values.flatten() for values, _ in rows]).double()
    chosen = values.isfinite()
    if any(where is not None for _, where in rows):
        masks = (torch.ones_like(v, dtype=torch.bool) if where is None else where for v, where in rows)
        chosen &= torch.cat([mask.flatten().to(chosen.device) for mask in masks])
    return torch.stack([values.where(chosen, 0.0).sum(), chosen.sum()])
