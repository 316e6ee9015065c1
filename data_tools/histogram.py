"""Counts in fixed bins: what can be said of any number of values, shard by shard, in constant memory."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float64
from numpy import ndarray


class Histogram:
    """Counts between ``edges``, below the first and from the last on; least, largest and mean value are exact."""

    def __init__(self, edges: Float64[ndarray, "e"]) -> None:
        self.edges = edges
        self.counts = np.zeros(len(edges) + 1, np.int64)
        """Below the first edge, then from each edge to the next; the last is open."""
        self.minimum, self.maximum, self.total = np.inf, -np.inf, 0.0

    @property
    def num_values(self) -> int:
        """How many values there are."""
        return int(self.counts.sum())

    @property
    def mean(self) -> float:
        """Of all values; 0 of none."""
        return self.total / max(1, self.num_values)

    def add(self, values: ndarray) -> None:
        """Count values, all finite."""
        if not len(values):
            return
        bins = np.searchsorted(self.edges, values, side="right")
        self.counts += np.bincount(bins, minlength=len(self.counts))
        self.minimum, self.maximum = min(self.minimum, float(values.min())), max(self.maximum, float(values.max()))
        self.total += float(values.sum(dtype=np.float64))

    def merge(self, other: "Histogram") -> None:
        """Count the values of another one with the same edges."""
        self.counts += other.counts
        self.minimum, self.maximum = min(self.minimum, other.minimum), max(self.maximum, other.maximum)
        self.total += other.total

    def percentile(self, percent: float) -> float:
        """Approximate: as if values were spread evenly over their bin; of no value 0."""
        if not self.num_values:
            return 0.0
        bounds = np.array([self.minimum, *np.clip(self.edges, self.minimum, self.maximum), self.maximum])
        below = np.array([0, *np.cumsum(self.counts)])
        return float(np.interp(percent / 100 * self.num_values, below, bounds))

    def state(self) -> dict[str, Any]:
        """All but the edges, for JSON."""
        filled = self.num_values > 0
        limits = {"minimum": self.minimum, "maximum": self.maximum} if filled else {}
        return {"counts": self.counts.tolist(), "total": self.total, **limits}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state` gave."""
        self.counts = np.array(state["counts"], np.int64)
        self.total = state["total"]
        self.minimum, self.maximum = state.get("minimum", np.inf), state.get("maximum", -np.inf)


def short_number(value: float) -> str:
    """A value to about three digits."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 0.001 or value == 0 else f"{value:.1e}"
