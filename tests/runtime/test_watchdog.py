"""Real processes: one that is stuck ends with a status of its own, and says where."""

import subprocess
import sys

from ipa_train.runtime.watchdog import EXIT_STUCK

START = """
import logging, sys, time
from ipa_train.runtime.watchdog import Watchdog, unwatched
log = logging.FileHandler(sys.argv[1])
logging.getLogger().addHandler(log)
watchdog = Watchdog(0.5)
def wait(seconds=1.5):
    time.sleep(seconds)
"""


def run(tmp_path, code):
    command = [sys.executable, "-c", START + code, str(tmp_path / "log")]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_a_stuck_process_ends_and_shows_all_stacks_in_console_and_log(tmp_path):
    done = run(tmp_path, "watchdog.pat()\nwait(50)\n")
    assert done.returncode == EXIT_STUCK
    for text in (done.stderr, (tmp_path / "log").read_text()):
        assert "in wait" in text
        assert "Thread 0x" in text


def test_it_looks_away_before_the_first_pat_where_told_so_and_after_the_end(tmp_path):
    code = "wait()\nwatchdog.pat()\nwith unwatched():\n    wait()\nwatchdog.stop()\nwait()\n"
    assert run(tmp_path, code).returncode == 0


def test_what_was_not_watched_before_is_not_after(tmp_path):
    assert run(tmp_path, "with unwatched():\n    pass\nwait()\n").returncode == 0


def test_it_watches_again_after_it_has_looked_away(tmp_path):
    assert run(tmp_path, "watchdog.pat()\nwith unwatched():\n    pass\nwait(50)\n").returncode == EXIT_STUCK


def test_a_library_that_holds_the_interpreter_is_no_refuge(tmp_path):
    done = run(tmp_path, "watchdog.pat()\nimport ctypes\nctypes.PyDLL(None).sleep(50)\n")
    assert done.returncode == 1
    assert "Timeout" in done.stderr
