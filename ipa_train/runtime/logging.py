"""The console: one plain line per message, information from rank 0 alone, warnings and errors from every rank.

What is said is also kept for the rank's own file (:mod:`ipa_train.runtime.rank_log`).
"""

import logging
import re
import sys
import warnings

from tqdm import tqdm

from ipa_train.runtime.rank_log import Backlog, RankLog

# These announce the hardware, tips and every checkpoint read; only their warnings are news.
_TALKATIVE = ("lightning", "lightning_fabric", "fsspec", "urllib3", "httpx")


# Warnings of libraries about what is so on purpose here, or that only their authors can mend.
_NOT_NEWS = (
    ".*checkpoint that ended before the epoch ended",  # the data module has its own, exact position
    ".*in eval mode at the start of training",  # the frozen models
    ".*isinstance\\(treespec, LeafSpec\\)",  # Lightning 2.6 on torch 2.13
    ".*does not have many workers",  # num_workers is the user's choice; data wait is shown
)


class _OneLine(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if record.exc_info else re.sub(r"\s*\n\s*", " ", text.strip())


class _ConsoleHandler(logging.Handler):
    """Writes above a progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stderr)
        except Exception:
            self.handleError(record)


def setup_logging(*, level: str = "INFO", rank: int = 0) -> None:
    """Send all logging and warnings to stderr, replacing earlier handlers; callable again at any time.

    ``level`` is a standard level name. Ranks above 0 show warnings and errors only, marked with their number.
    """
    threshold = logging.getLevelNamesMapping()[level.upper()]
    handler = _ConsoleHandler()
    handler.setLevel(threshold if rank == 0 else max(threshold, logging.WARNING))
    handler.addFilter(_is_news)
    who = "" if rank == 0 else f"rank {rank} "
    handler.setFormatter(_OneLine(f"%(asctime)s %(levelname)-7s {who}%(message)s", datefmt="%H:%M:%S"))

    backlog = Backlog()
    backlog.addFilter(_is_news)
    root = logging.getLogger()
    for earlier in list(root.handlers):
        if isinstance(earlier, RankLog):
            earlier.leave()
    root.handlers[:] = [handler, backlog]
    root.setLevel(threshold)
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        # Lightning gives its own loggers handlers of their own when it is imported, and cuts them off from the root.
        library = logging.getLogger(name)
        library.handlers.clear()
        library.propagate = True
    logging.captureWarnings(True)
    for message in _NOT_NEWS:
        warnings.filterwarnings("ignore", message=message)
    warnings.formatwarning = _format_warning


def _is_news(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING or not record.name.startswith(_TALKATIVE)


def _format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    return f"{category.__name__}: {message} ({filename}:{lineno})"
