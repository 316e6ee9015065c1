"""Bad samples are replaced, counted and reported; too many of them stop the run.

A sample that cannot be read or decoded is replaced by another one, drawn by (seed, position, attempt), so that every
rank keeps the same number of samples and a replay meets the same substitutes.
"""

import json
from collections import Counter, deque
from dataclasses import asdict, dataclass
from pathlib import Path

from ipa_train.errors import ConfigError, DataError

MAX_ATTEMPTS = 8


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


def all_bad(attempts: list[BadSample]) -> DataError:
    """What to raise when a sample and all its substitutes are bad."""
    worst = "; ".join(f"{bad.shard}/{bad.key}: {bad.error}" for bad in attempts)
    return DataError(f"{len(attempts)} samples in a row are bad, the shards are damaged: {worst}")


class ErrorBudget:
    """Keeps count of bad samples in the process that trains, and says when it is too much.

    At most ``max_bad_rate`` of the last ``window`` samples may be bad, and at most half of any one shard.
    """

    def __init__(self, *, max_bad_rate: float = 0.001, window: int = 100_000, log_path: Path | None = None) -> None:
        if not 0.0 <= max_bad_rate <= 1.0:
            raise ConfigError(f"data.max_bad_rate must be between 0 and 1, got {max_bad_rate}.")
        self.max_bad_rate, self.window, self.log_path = max_bad_rate, window, log_path
        self.num_seen = 0
        self.num_bad = 0
        self.by_shard: Counter[str] = Counter()
        self._recent: deque[int] = deque()
        self._rows: dict[str, set[int]] = {}

    def record(self, num_samples: int, bad: list[BadSample]) -> None:
        """Count a batch.

        Raises:
            DataError: the budget is spent; names the worst shards.
        """
        self.num_seen += num_samples
        self.num_bad += len(bad)
        self._recent.extend([self.num_seen] * len(bad))
        while self._recent and self._recent[0] <= self.num_seen - self.window:
            self._recent.popleft()
        for sample in bad:
            self.by_shard[sample.shard] += 1
            self._rows.setdefault(sample.shard, set()).add(sample.row)
        if bad and self.log_path is not None:
            with self.log_path.open("a") as file:
                file.writelines(json.dumps(asdict(sample)) + "\n" for sample in bad)
        if len(self._recent) > self.max_bad_rate * self.window:
            self._stop(f"{len(self._recent)} of the last {min(self.num_seen, self.window)} samples are bad", bad)
        for sample in bad:
            if len(self._rows[sample.shard]) > sample.shard_size / 2:
                self._stop(f"more than half of {sample.shard} is bad", bad)

    def _stop(self, what: str, bad: list[BadSample]) -> None:
        worst = ", ".join(f"{shard} ({count})" for shard, count in self.by_shard.most_common(3))
        raise DataError(
            f"{what} (data.max_bad_rate={self.max_bad_rate}); worst shards: {worst}; last error: {bad[-1].error}. "
            f"Mend or leave out these shards{f'; all failures are in {self.log_path}' if self.log_path else ''}."
        )
