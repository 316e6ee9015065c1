"""Who may write into a run directory: one start of one job, known by a record that others can see.

A file lock holds off a second start on the same machine, and wherever the file system carries locks. It cannot end an
older start that lives on where a node has lost its scheduler: Slurm then starts the job again elsewhere. So each start
writes down who it is (``owner.json``), and beats (``heartbeat``). One that reads another's name in the record stops.
"""

import fcntl
import json
import logging
import os
import secrets
import socket
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TextIO

from ipa_train.errors import CheckpointError, TakenOverError
from ipa_train.runtime import preemption
from ipa_train.runtime.files import atomic_write

OWNER, HEARTBEAT, LOCK = "owner.json", "heartbeat", "run.lock"
BEAT_SECONDS = 5.0
_SILENT_SECONDS = 3 * BEAT_SECONDS
"""Without a beat for so long, an owner is gone. Seen by watching: clocks of machines differ."""
_LONG_AGO_SECONDS = 600.0
"""A beat so old needs no watching."""
_TAKE_OVER_SECONDS = 60.0
"""How long an older start has to end once its run is taken over."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """One start of a run."""

    job: str | None = field(default_factory=lambda: os.environ.get("SLURM_JOB_ID"))
    restart: int = field(default_factory=lambda: restart_count())
    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)
    token: str = field(default_factory=lambda: secrets.token_hex(8))

    def follows(self, other: "Start") -> bool:
        """Whether the scheduler has started the same job again, so that the other should be gone."""
        return self.job is not None and self.job == other.job and self.restart > other.restart

    def __str__(self) -> str:
        job = f", Slurm job {self.job}" + f" restart {self.restart}" * bool(self.restart) if self.job else ""
        return f"process {self.pid} on {self.host}{job}"


def restart_count() -> int:
    """How often Slurm has started this job again."""
    return int(os.environ.get("SLURM_RESTART_COUNT", 0))


class Ownership:
    """The run directory ``path`` for as long as this start lives, or until a newer one takes over.

    A start of another job, or none, is refused while the owner's lock can be seen or its heart beats (CheckpointError).
    A later restart of the owner's own job takes over at once: the older start ends at its next beat, and the newer one
    waits for that, a minute at most.

    ``step``: what the heartbeat says of the progress.
    """

    def __init__(self, path: Path) -> None:
        self.step = 0
        self._path, self._start, self._lock = path, Start(), None
        self._released = threading.Event()
        path.mkdir(parents=True, exist_ok=True)
        before = _owner_of(path)
        if before is not None and self._start.follows(before):
            self._write(OWNER, asdict(self._start))
            _log.info("taking over from %s", before)
            self._lock = _wait_for_end(path, before)
        else:
            self._lock = _acquire_lock(path, self._start)
            if before is not None and not _is_gone(path, before):
                self._lock.close()
                raise _in_use(path, str(before))
            self._write(OWNER, asdict(self._start))
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()

    def require(self) -> None:
        """Raise TakenOverError if another start is the owner now: called before what must not be written twice."""
        owner = _owner_of(self._path)
        # A record that cannot be read for a moment is no reason to lose the run.
        if owner is not None and owner != self._start:
            raise TakenOverError(f"run {self._path} was taken over by {owner}: ended, and nothing more written")

    def release(self) -> None:
        """Let another start have the run."""
        self._released.set()
        self._thread.join(BEAT_SECONDS)
        if _owner_of(self._path) == self._start:
            for name in (HEARTBEAT, OWNER):
                (self._path / name).unlink(missing_ok=True)
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _beat(self) -> None:
        """Beat until the run is released; once it is lost, ask all ranks to end, and insist."""
        complained = False
        while True:
            try:
                self.require()
                self._write(HEARTBEAT, {"step": self.step, "time": time.time(), "job": self._start.job})
            except TakenOverError as error:
                _log.error("%s", error)
                preemption.wish_to_exit(preemption.EXIT_TAKEN_OVER)
                if not self._released.wait(_TAKE_OVER_SECONDS):
                    os._exit(preemption.EXIT_TAKEN_OVER)  # stuck, perhaps in a collective with ranks that are gone
                return
            except OSError as error:
                if not complained:
                    _log.warning("cannot write %s (%s): others may take this run for dead", HEARTBEAT, error)
                complained = True
            if self._released.wait(BEAT_SECONDS):
                return

    def _write(self, name: str, content: dict[str, object]) -> None:
        with atomic_write(self._path / name) as temporary:
            temporary.write_text(json.dumps(content) + "\n")


def _owner_of(path: Path) -> Start | None:
    try:
        return Start(**json.loads((path / OWNER).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _is_gone(path: Path, owner: Start) -> bool:
    """Whether the owner's process has ended, by its number on this machine, else by its heartbeat."""
    if owner.host == socket.gethostname() and not _is_alive(owner.pid):
        return True
    beat = _last_beat(path)
    if time.time() - beat > _LONG_AGO_SECONDS:
        return True
    _log.info("watching for %d s whether %s is still at work", _SILENT_SECONDS, owner)
    end = time.monotonic() + _SILENT_SECONDS
    while time.monotonic() < end:
        time.sleep(BEAT_SECONDS / 10)
        if _last_beat(path) != beat:
            return False
    return True


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _last_beat(path: Path) -> float:
    try:
        return (path / HEARTBEAT).stat().st_mtime
    except OSError:
        return 0.0


def _wait_for_end(path: Path, owner: Start) -> TextIO | None:
    """Wait until an older start has let go of the lock and its heart is still; return the lock."""
    end = time.monotonic() + _TAKE_OVER_SECONDS
    lock: TextIO | None = None
    while time.monotonic() < end:
        try:
            lock = lock or _acquire_lock(path, owner)
        except CheckpointError:
            time.sleep(BEAT_SECONDS / 10)
            continue
        if _is_gone(path, owner):
            return lock
    _log.warning("%s has not ended; it will write no more checkpoints, so this start goes on", owner)
    return lock


def _acquire_lock(path: Path, start: Start) -> TextIO:
    """Take the lock for as long as this process lives; CheckpointError if another has it.

    A POSIX lock: the kernel drops it at a kill -9, and data workers do not inherit it, so that a restart need not wait
    for them to notice.
    """
    file = (path / LOCK).open("a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise _in_use(path, holder) from error
    except OSError as error:  # a file system without locks
        _log.warning("cannot lock %s (%s): the heartbeat alone holds off a second start", path, error)
    file.truncate(0)
    file.write(str(start))
    file.flush()
    return file


def _in_use(path: Path, holder: str) -> CheckpointError:
    return CheckpointError(f"run {path} is in use by {holder}: end that one first, or choose run.name=OTHER")
