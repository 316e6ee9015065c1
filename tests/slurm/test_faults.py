"""What a cluster does to a training over two of its three nodes; the end is always that of a run left alone."""

import itertools
import logging
import os
import random
import re
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.end_to_end.conftest import loss_curve
from tests.slurm.cluster import started_cluster
from tests.slurm.test_train import newest_adapter

EVERY_STEPS = 5
"""From checkpoint to checkpoint."""
SEED = 6
"""Of the campaign: which fault strikes when, and whom."""
FAULTS = ("SIGKILL", "slurmd-kill", "SIGTERM", "controller-kill", "node-kill", "SIGUSR1")
PATIENCE_SECONDS = 400
_log = logging.getLogger(__name__)


@pytest.fixture(scope="module")
def nodes(tmp_path_factory):
    """A cluster of its own, whose nodes may die: two for a job, and one to spare."""
    with started_cluster(tmp_path_factory.mktemp("nodes"), num_nodes=3) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def num_steps(num_kills):
    """So many that faults come to their end before the training."""
    return 45 * max(num_kills, 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def submit(nodes, folder, slow_run, num_steps):
    """A function from a run's name to a job over two nodes."""

    def submit(name, *overrides, environment=None, **options):
        callbacks = {"checkpointing": EVERY_STEPS, "preemption": 2, "image_use": 0}
        every = [f"callbacks.{name}.every_steps={steps}" for name, steps in callbacks.items()]
        overrides = [*slow_run, *every, f"trainer.max_steps={num_steps}", f"run.name={name}", *overrides]
        options = {"nodes": 2, "gpus_per_node": 1, "cpus_per_gpu": 2, "time": 50} | options
        return nodes.submit("train.sbatch", *overrides, folder=folder, environment=environment, **options)

    return submit


@pytest.fixture(scope="module")
def array(submit, folder, num_steps):
    """Two trainings: one that nothing happens to, and one that is told to stop. Both have ended."""
    array = submit("element-${oc.env:SLURM_ARRAY_TASK_ID}", array="0-1")
    reach(folder / "outputs" / "element-1", 2)
    array.element(1).signal("USR1")
    for index in range(2):
        array.element(index).wait(seconds=PATIENCE_SECONDS + num_steps)  # two at once are slow
    return array


@pytest.fixture(scope="module")
def assert_as_left_alone(array, folder, num_steps):
    """A function that compares a run with the one that nothing happened to."""
    left_alone = folder / "outputs" / "element-0"
    assert list(loss_curve(left_alone)) == list(range(1, num_steps + 1))

    def compare(run):
        assert loss_curve(run) == loss_curve(left_alone)
        weights, expected = load_file(newest_adapter(run)), load_file(newest_adapter(left_alone))
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[name], expected[name]) for name in expected)

    return compare


def starts(run):
    """The steps that every start of a run has made so far, by its number of restarts."""
    log = run / "logs" / "rank-0.log"
    parts = re.split(r"start of rank 0 of \d+: Slurm job \d+, restart (\d+)", log.read_text() if log.exists() else "")
    steps = [[int(step) for step in re.findall(r" step (\d+)/", part)] for part in parts[2::2]]
    return dict(zip(map(int, parts[1::2]), steps, strict=True))


def newest(run):
    """Number and steps of the newest start."""
    return max(starts(run).items(), default=(-1, []))


def until(condition, what):
    end = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < end, f"no sign that {what}"
        time.sleep(0.1)


def reach(run, steps, *, after=-1):
    """Wait until a start later than ``after`` has made so many steps; return its number."""
    until(lambda: newest(run)[0] > after and len(newest(run)[1]) >= steps, f"{run.name} makes {steps} steps")
    return newest(run)[0]


def rank(job, number):
    return next(process for process in job.ranks() if process.rank == number)


def most_repeated(run):
    """The largest number of steps that a start had to do again."""
    made = [steps for _, steps in sorted(starts(run).items()) if steps]
    return max(before[-1] + 1 - after[0] for before, after in itertools.pairwise(made))


def test_an_element_told_to_stop_comes_back_without_the_others(array, assert_as_left_alone, folder):
    assert [array.element(index).num_restarts for index in range(2)] == [0, 1]
    assert_as_left_alone(folder / "outputs" / "element-1")


def test_preempted_twice_and_robbed_of_a_node(nodes, submit, folder, assert_as_left_alone):
    """By a job of higher priority; by a signal, while there is no controller that could take the job back."""
    job, run = submit("robbed"), folder / "outputs" / "robbed"
    first = reach(run, 3)
    urgent = ("--partition=high", "--nodes=3", "--exclusive", "--time=1", "--output=/dev/null", "--wrap=true")
    nodes.run("sbatch", *urgent, folder=folder)
    second = reach(run, 3, after=first)
    log = Path(job.shown("StdOut"))
    nodes.kill_controller()
    until(lambda: len(newest(run)[1]) >= 6, "training goes on without a controller")
    os.kill(rank(job, 1).pid, signal.SIGUSR1)
    until(lambda: "Unable to contact slurm controller" in log.read_text(), "the script has asked for its return")
    nodes.start_controller()
    third = reach(run, 3, after=second)
    assert (second, third) == (1, 2)
    assert most_repeated(run) <= 0, "no step is lost when told to stop"
    lost = rank(job, 0).node
    nodes.kill_node(lost)
    last = reach(run, 1, after=third)
    assert lost not in {process.node for process in job.ranks()}
    nodes.start_node(lost)
    job.wait(seconds=PATIENCE_SECONDS)
    assert newest(run)[0] == job.num_restarts == last
    assert most_repeated(run) <= EVERY_STEPS
    assert_as_left_alone(run)


def test_a_job_with_a_stuck_process_ends_and_comes_back(submit, folder, assert_as_left_alone):
    """A rank stands still, and later one waits for data that never come."""
    limits = ("callbacks.watchdog.timeout_minutes=0.25", "callbacks.watchdog.collective_timeout_minutes=0.2")
    job = submit("stuck", *limits, "data.num_workers=1", environment={"SLURM_WAIT": "10"})
    run = folder / "outputs" / "stuck"
    first = reach(run, 2)
    os.kill(rank(job, 1).pid, signal.SIGSTOP)
    second = reach(run, 2, after=first)
    assert "ended by" in (run / "logs" / "rank-0.log").read_text(), "the collective timed out"
    for worker in job.data_workers(1):
        os.kill(worker.pid, signal.SIGSTOP)
    reach(run, 1, after=second)
    log = (run / "logs" / "rank-1.log").read_text()
    assert re.search(r"nothing moved for 15 s: the stacks of all threads.*File .*dataloader.py", log, re.DOTALL)
    job.wait(seconds=PATIENCE_SECONDS)
    assert most_repeated(run) <= EVERY_STEPS
    assert_as_left_alone(run)


def test_killed_again_and_again(nodes, submit, folder, assert_as_left_alone, num_kills):
    """At random moments, also of the start."""
    job, run = submit("killed", environment={"MAX_CRASHES": "99", "SLURM_WAIT": "20"}), folder / "outputs" / "killed"
    saved, now = nodes.folder / "state" / "job_state", time.time()
    until(lambda: saved.stat().st_mtime > now, "slurmctld has saved that there is this job: killed before, it forgets")
    rng = random.Random(SEED)
    faults = [FAULTS[i % len(FAULTS)] for i in range(num_kills)]
    rng.shuffle(faults)
    restart, num_steps = -1, 0  # of the start that was struck last

    def living():
        """The ranks of the newest start, all of them."""
        ranks = job.ranks()
        ranks = [process for process in ranks if process.restart == max(other.restart for other in ranks)]
        return ranks if len(ranks) == 2 else []

    def goes_on(by_steps):
        """Whether the start that was struck last, or a newer one, has made so many steps; 0: a newer one exists."""
        now = next((process.restart for process in living()), -1)
        steps = len(starts(run).get(now, []))
        return steps >= num_steps + max(by_steps, 1) if now == restart else now > restart and steps >= by_steps

    for number, fault in enumerate(faults, start=1):
        by_steps, seconds, rank = rng.choice((0, 1, 2, 4, 8)), rng.random(), rng.randrange(2)
        victim = None
        while victim is None:
            until(lambda by_steps=by_steps: goes_on(by_steps), f"training goes on after fault {number - 1}")
            time.sleep(seconds * (0.5 if by_steps else 10))
            victim = next((process for process in living() if process.rank == rank), None)
        restart, num_steps = victim.restart, len(starts(run).get(victim.restart, []))
        _log.info(
            "%d: %s of rank %d on %s in restart %d, %d steps", number, fault, rank, victim.node, restart, num_steps
        )
        if fault.startswith("SIG"):
            os.kill(victim.pid, getattr(signal, fault))
        elif fault == "controller-kill":
            nodes.kill_controller()
            time.sleep(rng.uniform(0, 5))
            nodes.start_controller()
        elif fault == "node-kill":
            nodes.kill_node(victim.node)
            time.sleep(rng.uniform(0, 20))
            nodes.start_node(victim.node)
        else:
            nodes.kill_slurmd(victim.node)
            until(lambda old=restart: all(process.restart != old for process in job.ranks()), "the older start ends")
            nodes.start_node(victim.node)
    job.wait(seconds=PATIENCE_SECONDS)
    _log.info("%d restarts, at most %d steps again", job.num_restarts, most_repeated(run))
    assert most_repeated(run) <= EVERY_STEPS
    assert_as_left_alone(run)
