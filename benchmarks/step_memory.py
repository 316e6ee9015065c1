"""Peak memory of one case of the step's benchmark, in a process of its own."""

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.contenders import OurStep, Setting, for_reference, make_batch, make_reference, make_training
from benchmarks.ladder import OURS, OURS_ONLINE, REFERENCE
from benchmarks.memory import ENVIRONMENT, status_gib

CASES = (REFERENCE, OURS, OURS_ONLINE)


def peak_gib(setting: Setting, case: str, batch_size: int) -> float | None:
    """Of models and two steps in a new process; None where the GPU does not have as much."""
    what = (setting.base, setting.variant, setting.resolution, setting.device, case, batch_size)
    command = [sys.executable, "-m", "benchmarks.step_memory", json.dumps(what)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, **ENVIRONMENT})
    return json.loads(done.stdout)


def _measure_here(setting: Setting, case: str, batch_size: int) -> float | None:
    """This process must have done nothing before."""
    on_cpu = setting.device == "cpu"
    if on_cpu:
        _run_twice(
            _make_step(replace(setting, base="tiny", resolution=64), case, 1)
        )  # libraries load more at first use
    before = status_gib("VmRSS")
    try:
        step = _make_step(setting, case, batch_size)
        gc.collect()
        # The high-water mark begins anew: making the models takes more than they do.
        if on_cpu:
            Path("/proc/self/clear_refs").write_text("5")
        else:
            torch.cuda.reset_peak_memory_stats()
        _run_twice(step)
    except torch.OutOfMemoryError:
        return None
    return status_gib("VmHWM") - before if on_cpu else torch.cuda.max_memory_allocated() / 2**30


def _make_step(setting: Setting, case: str, batch_size: int) -> Callable[[], None]:
    if case == REFERENCE:
        reference: Any = make_reference(setting)
        batch = make_batch(setting, reference, batch_size, cached=False)
        return partial(reference.step, for_reference(setting, reference, batch))
    training = make_training(setting)
    return partial(OurStep(training).step, make_batch(setting, training, batch_size, cached=case == OURS))


def _run_twice(step: Callable[[], None]) -> None:
    step()
    step()


if __name__ == "__main__":
    torch.set_num_threads(1)
    *what, case, batch_size = json.loads(sys.argv[1])
    print(json.dumps(_measure_here(Setting(*what), case, batch_size)))
