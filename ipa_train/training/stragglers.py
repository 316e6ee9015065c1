"""Which rank holds the others up.

Where ranks sum their gradients all of them take a step in the same time, that of the slowest. What tells them apart is
the time that each works by itself, before the first of these sums.
"""

import logging
import socket
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ipa_train.errors import ConfigError
from ipa_train.runtime.distributed import rank

PATIENCE = 5
"""Log intervals in a row with the same straggler before anything is said of it."""
_log = logging.getLogger(__name__)


class OwnTime:
    """Seconds between asking for a batch and having its loss, summed over batches: fetching, copying, forward.

    On a GPU they pass on its own clock: marks in its queue, which no host waits for, are read in :meth:`take`. So a GPU
    that is slow counts, and a wait for data that hides behind earlier work does not. Where the forward has collectives
    (in every step under FSDP, in the second of a start under DDP) it holds waits for other ranks too.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._began: float | torch.cuda.Event | None = None
        self._spans: list[tuple[float | torch.cuda.Event, float | torch.cuda.Event]] = []

    def begin(self) -> None:
        """A batch is asked for."""
        self._began = self._now()

    def end(self) -> None:
        """The loss of that batch is there."""
        if self._began is not None:
            self._spans.append((self._began, self._now()))
            self._began = None

    def take(self) -> float:
        """Return the seconds since the last call; a batch that is under way is left out. Waits for a GPU."""
        spans, self._spans, self._began = self._spans, [], None
        return sum(_seconds(began, ended) for began, ended in spans)

    def _now(self) -> float | torch.cuda.Event:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event


def _seconds(began: float | torch.cuda.Event, ended: float | torch.cuda.Event) -> float:
    if isinstance(began, torch.cuda.Event) and isinstance(ended, torch.cuda.Event):
        ended.synchronize()
        return began.elapsed_time(ended) / 1000
    assert isinstance(began, float)
    assert isinstance(ended, float)
    return ended - began


@dataclass(frozen=True)
class Share:
    """What a rank did in a log interval, as shares of its time."""

    own: float
    """As ``OwnTime`` has it."""
    waited: float
    """For data."""
    host: str


class Stragglers:
    """Finds the slowest rank of each log interval, and warns of one that stays it.

    A rank is a straggler if its own time is longer than the median of the others' by more than ``max_fraction`` of the
    interval, which is what it costs every rank.
    """

    def __init__(self, *, max_fraction: float) -> None:
        if not 0.0 < max_fraction <= 1.0:
            raise ConfigError(
                f"callbacks.metric_logging.max_straggler_fraction is {max_fraction}: it must be above 0, and at most 1"
            )
        self.max_fraction = max_fraction
        self._straggler: int | None = None
        self._in_a_row = 0

    def judge(self, own: float, waited: float, gather: Callable[[Share], Sequence[Share]]) -> dict[str, float]:
        """Compare the ranks' shares of an interval; every rank must call it, and all come to the same verdict.

        ``gather`` returns each rank's share. Returns ``perf/slowest_rank`` and ``perf/straggler_fraction``, the part
        of the interval that its slowness took; of a rank alone there is nothing to say.
        """
        shares = gather(Share(own, waited, socket.gethostname()))
        if len(shares) == 1:
            return {}
        slowest = max(range(len(shares)), key=lambda r: shares[r].own)
        others = [share for r, share in enumerate(shares) if r != slowest]
        fraction = shares[slowest].own - statistics.median(share.own for share in others)
        straggler = slowest if fraction > self.max_fraction else None
        self._in_a_row = self._in_a_row + 1 if straggler == self._straggler else 1
        self._straggler = straggler
        if straggler is not None and self._in_a_row == PATIENCE and rank() == 0:
            _warn(straggler, shares[straggler], others)
        return {"perf/slowest_rank": float(slowest), "perf/straggler_fraction": fraction}


def _warn(straggler: int, share: Share, others: Sequence[Share]) -> None:
    own, waited = (statistics.median(getattr(other, name) for other in others) for name in ("own", "waited"))
    # Which of the two it has more of than others: waiting, or working.
    is_data = share.waited - waited > (share.own - own) / 2
    cause = "its data come late: look at the disk or network" if is_data else "look at clocks, heat and other processes"
    _log.warning(
        "rank %d on %s has held the others up for %d log intervals: %.0f%% of its time passes before its losses, "
        "%.0f%% of it waiting for data (others: %.0f%%, %.0f%%); %s of that machine",
        *(straggler, share.host, PATIENCE),
        *(100 * x for x in (share.own, share.waited, own, waited)),
        cause,
    )
