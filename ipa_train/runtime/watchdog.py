"""A process in which nothing moves any more says where it stands, and ends."""

import faulthandler
import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

EXIT_STUCK = 70
"""Nothing moved for too long: start again (EX_SOFTWARE of sysexits.h)."""
_LOOKS = 20
"""Looks per timeout."""
_STDERR = 2
"""The file itself, which no library can have put aside."""
_log = logging.getLogger(__name__)


class Watchdog:
    """Ends the process, without cleaning up, once ``timeout_seconds`` have passed since the last :meth:`pat`.

    Before, the stacks of all threads go to stderr and to the log's files. It watches from the first pat on and until
    :meth:`stop`, but not within :func:`unwatched`. A process has one at a time.
    """

    def __init__(self, timeout_seconds: float) -> None:
        global _current
        _current = self
        self.timeout_seconds = timeout_seconds
        self._last: float | None = None
        self._stopped = threading.Event()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def pat(self) -> None:
        """Something has moved."""
        self._last = time.monotonic()
        # Where a stuck library holds the interpreter no thread of Python can look: then this ends the process, with 1.
        faulthandler.dump_traceback_later(self.timeout_seconds * 1.5, exit=True, file=_STDERR)

    def stop(self) -> None:
        """Watch no longer."""
        self._stopped.set()
        self._look_away()

    def _look_away(self) -> bool:
        watched, self._last = self._last is not None, None
        faulthandler.cancel_dump_traceback_later()
        return watched

    def _watch(self) -> None:
        while not self._stopped.wait(self.timeout_seconds / _LOOKS):
            last = self._last
            if last is not None and time.monotonic() - last > self.timeout_seconds:
                break
        else:
            return
        _log.error("nothing moved for %.0f s: the stacks of all threads, and the end", self.timeout_seconds)
        for file in (_STDERR, *_log_files()):
            faulthandler.dump_traceback(file)
        os._exit(EXIT_STUCK)


_current: Watchdog | None = None


@contextmanager
def unwatched() -> Iterator[None]:
    """Within the block the watchdog looks away: for what may rightly take long, such as a save."""
    watchdog = _current
    watched = watchdog is not None and watchdog._look_away()
    try:
        yield
    finally:
        if watchdog is not None and watched:
            watchdog.pat()


def _log_files() -> list[int]:
    handlers = logging.getLogger().handlers
    return [h.stream.fileno() for h in handlers if isinstance(h, logging.FileHandler) and h.stream is not None]
