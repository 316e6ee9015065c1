"""`ipa play` as a process of its own, as a user starts it."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@contextlib.contextmanager
def serving(words):
    """The address that `ipa WORDS` says it serves, and the process, which Ctrl-C stops afterwards."""
    command = [sys.executable, "-m", "ipa_train.cli.main", *map(str, words), "--port", str(free_port())]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ) as process:
        giving_up = threading.Timer(300, process.kill)
        giving_up.start()
        try:
            address = process.stdout.readline().strip()
            assert address, f"no page: ipa {words[0]} exited with {process.wait()}"
            yield address, process
        finally:
            giving_up.cancel()
            process.send_signal(signal.SIGINT)
            process.wait(60)
