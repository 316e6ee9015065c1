"""Real processes that are told to stop."""

import signal
import subprocess
import sys

import pytest

from ipa_train.runtime.preemption import EXIT_STOPPED, EXIT_TAKEN_OVER

START = """
import os, sys
from ipa_train.runtime.preemption import *
from ipa_train.runtime.preemption import SIGNALS
def tell():
    for signum in SIGNALS:
        os.kill(os.getpid(), signum)
"""


def run(code):
    return subprocess.run([sys.executable, "-c", START + code], capture_output=True, text=True, timeout=60)


def test_a_signal_raises_a_flag_and_nothing_else():
    done = run("listen()\nassert wish() == 0\ntell()\ntell()\nsys.exit(wish())")
    assert done.returncode == EXIT_STOPPED, done.stderr


def test_of_several_wishes_the_highest_counts():
    assert run(f"listen()\nwish_to_exit({EXIT_TAKEN_OVER})\ntell()\nsys.exit(wish())").returncode == EXIT_TAKEN_OVER


@pytest.mark.parametrize("signum", [signal.SIGUSR1, signal.SIGTERM])
def test_before_it_listens_a_signal_ends_the_process(signum):
    assert run(f"os.kill(os.getpid(), {int(signum)})").returncode == -signum


def test_a_late_signal_changes_no_exit_status():
    """One that comes when the interpreter has run its exit functions and takes itself apart."""
    code = "listen()\nclass Late:\n    def __del__(self, kill=os.kill, pid=os.getpid(), signals=SIGNALS):\n"
    code += "        [kill(pid, signum) for signum in signals]\nlate = Late()\nsys.exit(3)"
    assert run(code).returncode == 3


def test_it_needs_no_torch():
    assert run("assert 'torch' not in sys.modules").returncode == 0
