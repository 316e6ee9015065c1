"""Worker processes that end when the one they work for does: not later, and not before."""

import multiprocessing
import os
import threading

from ipa_train.runtime import preemption


def end_with_parent() -> None:
    """Initializer of a pool's workers: if their parent is killed they end too, where they would wait for ever."""
    parent = multiprocessing.parent_process()
    if parent is None:
        raise RuntimeError("this is not a worker")

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def leave_signals_to_parent(worker: int) -> None:
    """Initializer of a data loader's workers: a scheduler signals all processes of a job, and theirs decides."""
    preemption.be_deaf()
