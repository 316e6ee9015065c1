"""Starts a script as several processes that form one run, as torchrun does."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path


def run_ranks(script, *arguments, world_size=2, **environment):
    """What each rank printed after SAW, by rank; and under ``stderr`` what it said there."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(world_size):
        env = os.environ | {
            "PYTHONPATH": str(Path(__file__).parents[2]),
            "TORCHELASTIC_RUN_ID": "test",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "GROUP_RANK": "0",
        }
        command = [sys.executable, str(Path(__file__).with_name(script)), *map(str, arguments)]
        processes.append(
            subprocess.Popen(command, env=env | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    ends = [process.communicate(timeout=240) for process in processes]
    assert not any(process.returncode for process in processes), "\n".join(errors for _, errors in ends)
    lines = [next(line for line in output.splitlines() if line.startswith("SAW ")) for output, _ in ends]
    return [json.loads(line.removeprefix("SAW ")) | {"stderr": end[1]} for line, end in zip(lines, ends, strict=True)]
