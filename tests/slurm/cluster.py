"""A real Slurm on this machine, and the jobs that tests give to it."""

import os
import random
import re
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "slurm" / "dev_cluster.sh"
DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "OUT_OF_MEMORY", "PREEMPTED")


@contextmanager
def started_cluster(folder, *, num_nodes):
    """A cluster for as long as it is needed; skips the test where Slurm is not installed."""
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    if missing := [name for name in DAEMONS if shutil.which(name, path=path) is None]:
        pytest.skip(f"no {', '.join(missing)} here: slurm/dev_cluster.sh install, as root")
    cluster = Cluster(folder, num_nodes=num_nodes)
    try:
        yield cluster
    finally:
        cluster.stop()


class Cluster:
    """Nodes n1, n2, ...: each with a network of its own where this process may make one, else all on the host's."""

    def __init__(self, folder: Path, *, num_nodes: int):
        self.folder = folder
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
        self.environment |= {
            "SLURM_DEV_DIR": str(folder),
            "SLURM_DEV_PORT": str(_free_ports(num_nodes + 1)),
            "SLURM_DEV_TIMEOUT": "10",
            "SLURM_CONF": str(folder / "etc" / "slurm.conf"),
            "IPA_SLURM": str(ROOT / "slurm"),
            "PYTHONPATH": str(ROOT),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin",
        }
        # However this process ends, the cluster ends with it.
        watch = ["bash", "-c", f"tail --pid={os.getpid()} --follow /dev/null; exec {SCRIPT} stop"]
        self._watch = subprocess.Popen(watch, env=self.environment, start_new_session=True)
        try:
            self._control("start", str(num_nodes), SLURM_DEV_MODE="isolated")
        except subprocess.CalledProcessError:
            self._control("start", str(num_nodes))

    def stop(self):
        self._control("stop")
        self._watch.terminate()
        self._watch.wait()

    def submit(self, script, *arguments, folder, environment=None, **options):
        """Hand a script of slurm/ to sbatch in ``folder``; ``options`` are sbatch's, such as ``nodes=2``."""
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in ({"time": 10} | options).items()]
        command = ["sbatch", "--parsable", *flags, str(ROOT / "slurm" / script), *map(str, arguments)]
        number = self.run(*command, folder=folder, environment=environment).strip()
        return Job(self, number, Path(folder))

    def run(self, *command, folder=None, environment=None):
        """Output of a command of Slurm's."""
        environment = self.environment | (environment or {})
        done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def kill_node(self, node):
        """As at a loss of power: nothing of the node is left, and Slurm learns of it by its silence."""
        self._control("node-kill", node)

    def kill_slurmd(self, node):
        """The tasks of the node live on."""
        self._control("slurmd-kill", node)

    def start_node(self, node):
        self._control("node-start", node)

    def kill_controller(self):
        self._control("controller-kill")

    def start_controller(self):
        self._control("controller-start")

    def _control(self, *arguments, **environment):
        environment = self.environment | environment
        subprocess.run([str(SCRIPT), *arguments], env=environment, check=True, capture_output=True, timeout=60)


@dataclass(frozen=True)
class Process:
    """A training process of a job, or a data worker of one."""

    pid: int
    parent: int
    node: str
    restart: int
    rank: int


@dataclass
class Job:
    """A submitted job, or one element of an array: ``job.element(3)``."""

    cluster: Cluster
    number: str
    folder: Path

    def element(self, index):
        return Job(self.cluster, f"{self.number}_{index}", self.folder)

    def shown(self, field):
        """What `scontrol show job` says of ``field``, such as JobState or Restarts."""
        text = self.cluster.run("scontrol", "--oneliner", "show", "job", self.number)
        return re.search(rf"\b{field}=(\S*)", text)[1]

    @property
    def state(self):
        return self.shown("JobState")

    @property
    def num_restarts(self):
        return int(self.shown("Restarts"))

    @property
    def log(self):
        """What the job has written so far, over all its starts."""
        path = Path(self.shown("StdOut"))
        return path.read_text() if path.exists() else ""

    def wait(self, state="COMPLETED", *, seconds=300):
        """Until the job is in ``state``; fails with its log if it ends otherwise."""
        self._until(lambda: self.state == state, f"to be {state}", seconds)

    def wait_for_log(self, pattern, *, seconds=300):
        """Until a line of the log matches."""
        self._until(lambda: re.search(pattern, self.log) is not None, f"to write {pattern!r}", seconds)

    def wait_until_gone(self, *, seconds=60):
        """Until no process of the job is left: its state may say that it has ended before."""
        end = time.monotonic() + seconds
        while self.cluster.run("squeue", "--noheader", "--states=running,completing,pending", "--job", self.number):
            assert time.monotonic() < end, f"job {self.number} goes on:\n{self.log}"
            time.sleep(0.3)

    def ranks(self):
        """The training processes that live, of whatever start: an older one may live on beside the newest."""
        processes = self._processes()
        pids = {process.pid for process in processes}
        return [process for process in processes if process.parent not in pids]

    def data_workers(self, rank):
        """The processes that read for a rank."""
        processes = self._processes()
        pids = {process.pid for process in processes}
        return [process for process in processes if process.parent in pids and process.rank == rank]

    def _processes(self):
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                entries = (folder / "environ").read_text(errors="replace").split("\0")
                arguments = (folder / "cmdline").read_text(errors="replace").split("\0")
                parent = int(re.search(r"^PPid:\s*(\d+)", (folder / "status").read_text(), re.MULTILINE)[1])
            except (FileNotFoundError, ProcessLookupError, PermissionError):  # it has ended, or is another user's
                continue
            environment = dict(entry.split("=", 1) for entry in entries if "=" in entry)
            mine = ("SLURM_CONF", self.cluster.environment["SLURM_CONF"]), ("SLURM_JOB_ID", self.number)
            if arguments[2:3] == ["train"] and set(mine) <= environment.items():
                node, restart = environment["SLURMD_NODENAME"], int(environment.get("SLURM_RESTART_COUNT", 0))
                rank = int(environment["SLURM_PROCID"])
                found.append(Process(int(folder.name), parent, node, restart, rank))
        return found

    def signal(self, name):
        """Send a signal to all processes of the job, as Slurm does before the time limit."""
        self.cluster.run("scancel", f"--signal={name}", self.number)

    def cancel(self):
        self.cluster.run("scancel", self.number)

    def _until(self, condition, what, seconds):
        end = time.monotonic() + seconds
        while not condition():
            state = self.state
            over = state in ENDED or time.monotonic() > end
            assert not over or condition(), f"job {self.number}, {state}, was {what}:\n{self.log}"
            time.sleep(0.3)


def _free_ports(count):
    """The first of ``count`` neighbouring ports that nobody listens on, below those that the kernel hands out."""
    while True:
        first = random.randrange(20000, 32000)
        sockets = [socket.socket() for _ in range(count)]
        try:
            for i, each in enumerate(sockets):
                each.bind(("", first + i))
            return first
        except OSError:
            continue
        finally:
            for each in sockets:
                each.close()
