"""Errors a user can act on: each message is one line that says what was got, what is allowed, and what to type."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any


class UserError(Exception):
    """A mistake the user can mend. The command line prints its message alone and exits with 2."""


class ConfigError(UserError, ValueError):
    """An option, path or combination of options that cannot work."""


class DataError(UserError):
    """Shards or samples that cannot be trusted."""


class CheckpointError(UserError):
    """A run directory or checkpoint that is damaged, foreign or unwritable."""


class TrainingError(UserError):
    """A run that cannot go on, such as one whose gradients stay not finite."""


class TakenOverError(UserError):
    """A newer start of the same run has its directory now: this one must write nothing more."""


class FinishedError(CheckpointError):
    """A run that has reached its last step already."""


class ExportError(UserError):
    """An adapter file that cannot be read, or that other loaders would not load."""


def did_you_mean(got: str, allowed: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the closest of ``allowed``, else the list of what is allowed."""
    allowed = sorted(allowed)
    close = difflib.get_close_matches(got, allowed, n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else f" Allowed: {', '.join(allowed) or 'nothing'}."


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """The entries that differ, as ``name was old, now new``."""
    names = [name for name in old.keys() | new.keys() if old.get(name) != new.get(name)]
    return "; ".join(f"{name} was {_short(old.get(name))}, now {_short(new.get(name))}" for name in sorted(names))


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
