"""``metrics.csv`` that a resumed run continues (Lightning's own CSV logger deletes what it finds)."""

import csv
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger

from ipa_train.errors import CheckpointError
from ipa_train.runtime.distributed import rank
from ipa_train.runtime.files import atomic_write


class CSVLog(Logger):
    """One row per call of ``log_metrics``, on the disk at once; a new metric adds a column to the whole file.

    Raises CheckpointError where it cannot be written, as when the disk is full.
    """

    def __init__(self, *, path: str) -> None:
        super().__init__()
        self.path = Path(path)
        self._columns: list[str] = []

    @property
    def name(self) -> str:
        """Return the kind of logger; Lightning asks for it."""
        return "csv"

    @property
    def version(self) -> str:
        """There are no versions: a run has one file."""
        return ""

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: object, **kwargs: object) -> None:
        """Do nothing: the resolved config is in the run directory."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Append one row; rank 0 does, for all."""
        if rank():
            return
        row = {"step": step, **metrics}
        with self._writing():
            if new := [name for name in row if name not in self._columns]:
                rows = self._read()
                self._columns += new
                self._write(rows)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", newline="") as file:
                csv.DictWriter(file, self._columns).writerow(row)

    def resume(self, step: int) -> None:
        """Keep the rows up to and including ``step``: what comes after will be measured again."""
        if rank():
            return
        with self._writing():
            self._write([row for row in self._read() if int(row["step"]) <= step])

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CheckpointError(
                f"cannot write {self.path}: {error.strerror or error}; the checkpoints are untouched: "
                "make room or mend the permissions, then run the same command again"
            ) from error

    def _read(self) -> list[dict[str, str]]:
        """Return the complete rows of the file, and take over its columns."""
        if not self.path.exists():
            return []
        with self.path.open(newline="") as file:
            reader = csv.reader(line for line in file if line.endswith("\n"))  # a killed process may leave half a line
            header = next(reader, [])
            self._columns = header + [name for name in self._columns if name not in header]
            return [dict(zip(header, values, strict=True)) for values in reader if len(values) == len(header)]

    def _write(self, rows: list[dict[str, str]]) -> None:
        if not self._columns:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.path) as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, self._columns)
            writer.writeheader()
            writer.writerows(rows)
