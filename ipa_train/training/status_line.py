"""What a run shows on the console: one line per log interval, or a bar with rate and time left on a terminal."""

import logging
import sys
import time
from collections.abc import Mapping

from tqdm import tqdm

_log = logging.getLogger(__name__)


class StatusLine:
    """``progress``: True for the bar, False for lines, None for the bar if stderr is a terminal."""

    def __init__(self, *, progress: bool | None = None) -> None:
        self.progress = sys.stderr.isatty() if progress is None else progress
        self._bar: tqdm | None = None

    def start(self, step: int, max_steps: int) -> None:
        """Begin at ``step`` of ``max_steps`` (-1: no limit)."""
        self.max_steps = max_steps
        self._first_step, self._began = step, time.perf_counter()
        if self.progress:
            total = max_steps if max_steps > 0 else None
            self._bar = tqdm(total=total, initial=step, unit="step", desc="train", dynamic_ncols=True, mininterval=0.5)

    def advance(self, step: int) -> None:
        """Move the bar to ``step``."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def show(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show what was measured in the interval that ends with ``step``."""
        if self._bar is not None:
            self._bar.set_postfix_str(describe(metrics))
        else:
            of = f"/{self.max_steps}" if self.max_steps > 0 else ""
            _log.info("step %d%s: %s%s", step, of, describe(metrics), self._time_left(step))

    def _time_left(self, step: int) -> str:
        if self.max_steps <= 0 or step <= self._first_step:
            return ""
        seconds = (time.perf_counter() - self._began) / (step - self._first_step) * (self.max_steps - step)
        return f"  {tqdm.format_interval(int(seconds))} left"

    def close(self) -> None:
        """Leave the console in order."""
        if self._bar is not None:
            self._bar.close()


_PARTS = {
    "train/loss": "loss {:.4f}",
    "train/grad_norm": "grad {:.3g}",
    "train/lr": "lr {:.2e}",
    "perf/images_per_second": "{:.1f} img/s",
    "perf/mfu": "mfu {:.0%}",
    "perf/data_wait_fraction": "data wait {:.0%}",
    "perf/peak_memory_gib": "peak {:.1f} GiB",
    "train/skipped_steps": "skipped {:.0%}",
    "data/bad_fraction": "bad {:.2%}",
}
_ONLY_WHEN_SOME = ("train/skipped_steps", "data/bad_fraction")


def describe(metrics: Mapping[str, float]) -> str:
    """Return the metrics that matter at a glance, in a fixed order, on one line."""
    shown = (k for k in _PARTS if k in metrics and (metrics[k] or k not in _ONLY_WHEN_SOME))
    return "  ".join(_PARTS[name].format(metrics[name]) for name in shown)
