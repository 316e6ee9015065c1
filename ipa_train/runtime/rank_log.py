"""Each rank's own log file: all that it has to say, where the console shows information from rank 0 alone."""

import contextlib
import logging
import os
import socket
import sys
import time
from collections import deque
from logging.handlers import RotatingFileHandler
from pathlib import Path

from ipa_train.errors import CheckpointError, UserError

MAX_BYTES = 20_000_000
"""Of a file; the one before is kept beside it, as ``.1``."""
_log = logging.getLogger(__name__)


class Backlog(logging.Handler):
    """Keeps the newest messages until there is a file for them: a run's folder is opened long after its start."""

    def __init__(self) -> None:
        super().__init__()
        self.records: deque[logging.LogRecord] = deque(maxlen=1000)

    def emit(self, record: logging.LogRecord) -> None:
        """Keep it."""
        self.records.append(record)


class RankLog(RotatingFileHandler):
    """A file ``folder/rank-N.log`` that begins, at every start of the run, with a line on what has started.

    It takes over what a ``Backlog`` among the root logger's handlers has kept. When the file can no longer be written,
    as on a full disk, that is said once and training goes on without it.

    Raises:
        CheckpointError: no such file can be written; also if the run's folder, the parent of ``folder``, is not there
            within ``patience_seconds``. (NFS shows a new folder to other machines up to a minute late.)
    """

    def __init__(self, folder: Path, *, rank: int, world_size: int, patience_seconds: float = 90.0) -> None:
        deadline = time.monotonic() + patience_seconds
        while not folder.parent.is_dir():
            if time.monotonic() > deadline:
                raise CheckpointError(
                    f"{folder.parent} is not there on {socket.gethostname()} (rank {rank}), though rank 0 has made it: "
                    "set run.path to a folder that all machines share"
                )
            time.sleep(0.5)
        try:
            folder.mkdir(exist_ok=True)
            super().__init__(folder / f"rank-{rank}.log", maxBytes=MAX_BYTES, backupCount=1, encoding="utf-8")
        except OSError as error:
            raise CheckpointError(
                f"rank {rank} on {socket.gethostname()} cannot write its log in {folder}: {error.strerror}: "
                "mend its permissions, or choose another run.path"
            ) from error
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s", datefmt="%Y-%m-%dT%H:%M:%S%z"))
        self.setLevel(logging.INFO)
        self.note(f"start of rank {rank} of {world_size}: {_who()}")
        root = logging.getLogger()
        for backlog in [handler for handler in root.handlers if isinstance(handler, Backlog)]:
            self.filters = backlog.filters
            for record in backlog.records:
                self.handle(record)
            root.removeHandler(backlog)
        root.addHandler(self)

    def note(self, message: str, *, level: int = logging.INFO, error: BaseException | None = None) -> None:
        """Write to this file alone, with the traceback of ``error``."""
        exc_info = None if error is None else (type(error), error, error.__traceback__)
        self.handle(logging.LogRecord(__name__, level, __file__, 0, message, None, exc_info))

    def note_end(self, error: BaseException) -> None:
        """Write what has ended the run: a user's mistake in one line, all else with where it happened."""
        if isinstance(error, UserError):
            self.note(f"ended: {error}", level=logging.ERROR)
        else:
            self.note(f"ended by {type(error).__name__}", level=logging.ERROR, error=error)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - the name is logging's
        """Give the file up; called by logging, within the error."""
        error = sys.exc_info()[1]
        self.leave()
        _log.warning("cannot write %s any more (%s): this log ends here", self.baseFilename, error)

    def leave(self) -> None:
        """Take no more messages."""
        logging.getLogger().removeHandler(self)
        with contextlib.suppress(OSError):  # what it could not write before, it cannot write now
            self.close()


def _who() -> str:
    job = os.environ.get("SLURM_JOB_ID")
    restarts = os.environ.get("SLURM_RESTART_COUNT", "0")
    of_job = "" if job is None else f"Slurm job {job}, restart {restarts}, "
    return f"{of_job}process {os.getpid()} on {socket.gethostname()}"
