import logging
import warnings

import pytest

from ipa_train.runtime.logging import setup_logging


@pytest.fixture
def console(capsys):
    """Set logging up and return what it writes; leave pytest's own handlers as they were."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    show = warnings.showwarning, warnings.formatwarning

    def setup(**options):
        setup_logging(**options)
        return lambda: capsys.readouterr().err.splitlines()

    yield setup
    logging.captureWarnings(False)
    root.handlers[:] = handlers
    root.setLevel(level)
    warnings.showwarning, warnings.formatwarning = show
