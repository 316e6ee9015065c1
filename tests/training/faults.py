"""Run as a program: really fills disks, takes permissions away and kills processes in the middle of saves."""

import os
import random
import resource
import signal
import sys
import time
from pathlib import Path

import torch

from ipa_train.training.checkpoint import (
    AdapterCheckpointIO,
    checkpoint_path,
    list_checkpoints,
    newest_valid,
    prune,
    step_of,
)


def state(step, size=1000):
    weights = {"adapter.weight": torch.full((size,), float(step))}
    return {"global_step": step, "state_dict": weights, "ema": {"num_updates": step, "weights": weights}}


def save(folder, step, size=1000):
    AdapterCheckpointIO().save_checkpoint(state(step, size), checkpoint_path(folder, step))


def in_child(function):
    """Run ``function`` in a fork, which may die or change its limits; return its pid."""
    pid = os.fork()
    if pid == 0:
        try:
            function()
        except BaseException as error:
            sys.stdout.write(f"{type(error).__name__}: {error}\n")
            sys.stdout.flush()
            os._exit(1)
        os._exit(0)
    return pid


def kill(folder, num_kills):
    """Kill a process that saves again and again; every time, all that is left must be whole."""
    chance = random.Random(0)
    step = 1
    save(folder, step)
    leftovers = 0

    def save_for_ever():
        for s in range(step + 1, 10**6):
            save(folder, s)
            prune(folder, keep_last=2)

    for _ in range(num_kills):
        pid = in_child(save_for_ever)
        time.sleep(chance.uniform(0.005, 0.06))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        leftovers += any(folder.glob(".tmp-*"))
        newest = newest_valid(folder)
        assert newest == list_checkpoints(folder)[-1], "a checkpoint under its final name was not whole"
        assert step_of(newest) >= step, "a finished checkpoint was lost"
        step = step_of(newest)
        loaded = AdapterCheckpointIO().load_checkpoint(newest)
        assert loaded["global_step"] == step == loaded["state_dict"]["adapter.weight"][0].item()
    assert leftovers, "no kill hit a save: the test would prove nothing"
    assert step > 10
    sys.stdout.write(f"{num_kills} kills, {leftovers} within a save, {step} saves\n")


def after_a_good_save(folder, spoilt_save):
    """Save once, let a child fail to save again, and check that nothing but the first is there."""
    folder.mkdir(exist_ok=True)
    save(folder, 1)
    before = sorted(folder.iterdir())
    os.waitpid(in_child(spoilt_save), 0)
    assert sorted(folder.iterdir()) == before, "the failed save left something behind"
    assert newest_valid(folder) == checkpoint_path(folder, 1)


def main():
    """Write one line per scenario, in this order."""
    root = Path(sys.argv[1])

    (root / "kill").mkdir()
    kill(root / "kill", 50)

    def save_weights_beyond_limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, -1))
        save(root / "weights", 2, size=100_000)

    after_a_good_save(root / "weights", save_weights_beyond_limit)

    def save_state_beyond_limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, -1))
        checkpoint = state(2) | {"optimizer_states": [torch.zeros(100_000)]}
        AdapterCheckpointIO().save_checkpoint(checkpoint, checkpoint_path(root / "state", 2))

    after_a_good_save(root / "state", save_state_beyond_limit)

    def save_without_permission():
        (root / "forbidden").chmod(0o555)
        if os.getuid() == 0:
            os.setuid(65534)
        save(root / "forbidden", 2)

    after_a_good_save(root / "forbidden", save_without_permission)

    if (root / "full").is_mount():
        after_a_good_save(root / "full", lambda: save(root / "full", 2, size=100_000))


if __name__ == "__main__":
    main()
