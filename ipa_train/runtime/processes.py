"""Worker processes that do not outlive the one they work for."""

import multiprocessing
import os
import threading


def end_with_parent() -> None:
    """Initializer of a pool's workers: if their parent is killed they end too, where they would wait for ever."""
    parent = multiprocessing.parent_process()
    if parent is None:
        raise RuntimeError("this is not a worker")

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
