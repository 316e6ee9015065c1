"""Bad samples are replaced, counted and reported; too many of them stop the run.

A sample that cannot be read or decoded is replaced by another one, drawn by (seed, position, attempt), so that every
rank keeps the same number of samples and a replay meets the same substitutes.
"""

import json
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ipa_train.errors import ConfigError, DataError, did_you_mean

MAX_ATTEMPTS = 8
_ON_MISSING_SHARD = ("stop", "redraw")


@dataclass(frozen=True)
class BadSample:
    """One failure: which sample of which shard, met at which position, and why."""

    position: int
    shard: str
    """Path of the tar: two folders may hold shards of one name."""
    shard_size: int
    """Samples in that shard."""
    row: int
    key: str
    error: str


News = tuple[int, list[BadSample]]
"""Samples seen by a rank, and the bad ones among them."""


def all_bad(attempts: list[BadSample]) -> DataError:
    """What to raise when a sample and all its substitutes are bad."""
    worst = "; ".join(f"{bad.shard}/{bad.key}: {bad.error}" for bad in attempts)
    return DataError(f"{len(attempts)} samples in a row are bad, the shards are damaged: {worst}")


class ErrorBudget:
    """Keeps count of bad samples over all ranks, and says when it is too much.

    At most ``max_bad_rate`` of the last ``window`` samples may be bad; and at most half of any one shard, unless
    ``on_missing_shard`` is ``redraw``, with which a run does without shards that have gone. Every rank notes what it
    meets (:meth:`record`); now and then all of them exchange it and come to the same verdict (:meth:`settle`).
    """

    def __init__(
        self,
        *,
        max_bad_rate: float = 0.001,
        window: int = 100_000,
        on_missing_shard: str = "stop",
        log_path: Path | None = None,
    ) -> None:
        if not 0.0 <= max_bad_rate <= 1.0:
            raise ConfigError(f"data.max_bad_rate must be between 0 and 1, got {max_bad_rate}.")
        if on_missing_shard not in _ON_MISSING_SHARD:
            hint = did_you_mean(on_missing_shard, _ON_MISSING_SHARD)
            raise ConfigError(f"data.on_missing_shard={on_missing_shard!r} is no choice.{hint}")
        self.max_bad_rate, self.window, self.log_path = max_bad_rate, window, log_path
        self.on_missing_shard = on_missing_shard
        self.num_seen = 0
        """By all ranks, up to the last :meth:`settle`."""
        self.by_shard: Counter[str] = Counter()
        """Bad samples by all ranks, likewise."""
        self._news: News = (0, [])
        self._recent: deque[int] = deque()
        self._rows: dict[str, set[int]] = {}

    @property
    def num_bad(self) -> int:
        """Bad samples met by all ranks, up to the last :meth:`settle`."""
        return self.by_shard.total()

    def record(self, num_samples: int, bad: list[BadSample]) -> None:
        """Note a batch of this rank, and write its bad samples to the log."""
        self._news = (self._news[0] + num_samples, self._news[1] + bad)
        if bad and self.log_path is not None:
            with self.log_path.open("a") as file:
                file.writelines(json.dumps(asdict(sample)) + "\n" for sample in bad)

    def settle(self, gather: Callable[[News], Sequence[News]]) -> None:
        """Exchange what was noted since the last time; every rank must call it. ``gather`` returns each rank's news.

        Raises:
            DataError: the budget is spent, for all ranks alike; names the worst shards.
        """
        shares = gather(self._news)
        self._news = (0, [])
        self.num_seen += sum(num_samples for num_samples, _ in shares)
        bad = [sample for _, of_rank in shares for sample in of_rank]
        self._recent.extend([self.num_seen] * len(bad))
        while self._recent and self._recent[0] <= self.num_seen - self.window:
            self._recent.popleft()
        for sample in bad:
            self.by_shard[sample.shard] += 1
            self._rows.setdefault(sample.shard, set()).add(sample.row)
        if len(self._recent) > self.max_bad_rate * self.window:
            self._stop(f"{len(self._recent)} of the last {min(self.num_seen, self.window)} samples are bad", bad)
        for sample in bad:
            is_lost = len(self._rows[sample.shard]) > sample.shard_size / 2
            if is_lost and self.on_missing_shard == "stop":
                self._stop(f"more than half of {sample.shard} is bad", bad)

    def _stop(self, what: str, bad: list[BadSample]) -> None:
        worst = ", ".join(f"{shard} ({count})" for shard, count in self.by_shard.most_common(3))
        error = bad[-1].error if bad else "none of late"
        raise DataError(
            f"{what} (data.max_bad_rate={self.max_bad_rate}); worst shards: {worst}; last error: {error}. "
            f"Mend or leave out these shards{f'; all failures are in {self.log_path.parent}' if self.log_path else ''}."
        )
