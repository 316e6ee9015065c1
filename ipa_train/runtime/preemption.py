"""Told to stop: a signal only raises a flag, and the ranks agree between two steps on what to make of it.

A checkpoint cannot be written inside a signal handler: the ranks stand at different places, perhaps within a
collective. So a handler notes the exit status that is wished for, ``training.callbacks.preemption`` takes the highest
wish of all ranks at the end of a step, and all stop there. Nothing heavy is imported here, so that a process listens
before it imports torch.
"""

import atexit
import signal
from types import FrameType

EXIT_STOPPED = 75
"""Stopped when told, with a checkpoint: start again (EX_TEMPFAIL of sysexits.h)."""
EXIT_TAKEN_OVER = 76
"""A newer start has the run: this one has written nothing more, and must not be started again."""
SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
"""What Slurm sends ahead of a time limit (as its script asks), and at a preemption."""

_wish = 0


def listen() -> None:
    """Answer the signals with a flag from now on, and with nothing at all once the interpreter ends."""
    for signum in SIGNALS:
        signal.signal(signum, _note)
    # The interpreter puts the default action back at its end, and a late signal would change the exit status.
    atexit.register(be_deaf)


def be_deaf() -> None:
    """Ignore the signals: in processes that others end, and once the end is decided.

    Ranks end by their agreement, some of them before their own signal has come.
    """
    for signum in SIGNALS:
        signal.signal(signum, signal.SIG_IGN)


def wish_to_exit(status: int) -> None:
    """Ask for all ranks to stop at the end of a step with ``status``; of several wishes the highest counts."""
    global _wish
    _wish = max(_wish, status)


def wish() -> int:
    """The exit status that this process was told to stop with, 0 if it was not."""
    return _wish


def _note(signum: int, frame: FrameType | None) -> None:
    wish_to_exit(EXIT_STOPPED)
