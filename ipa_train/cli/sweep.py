"""Several trainings by one command, ``ipa train -m``: Hydra says which, and its launcher where; each is an `ipa train`.

A process of its own for each, so that signals, exit status and ranks are as without a sweep.
"""

import signal
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from tempfile import TemporaryDirectory
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from ipa_train.cli.config import config_folder, load_config, one_line_errors, overrides_for_hydra
from ipa_train.errors import ConfigError
from ipa_train.runtime import preemption

_HYDRA = (
    "hydra.sweep.dir=outputs/sweeps/${now:%Y-%m-%d_%H-%M-%S}",
    "hydra.sweep.subdir=.",
    "hydra.output_subdir=null",
    "hydra/job_logging=none",
    "hydra/hydra_logging=none",
)


def sweep(overrides: Sequence[str], *, config_dir: str | None = None) -> int:
    """Train once for each combination of ``key=a,b`` overrides, and return 0 when all are done.

    Raises:
        ConfigError: a job whose options do not fit, or two in one run directory; before any is started.
    """
    if "hydra/launcher=slurm" in overrides and find_spec("hydra_plugins.hydra_submitit_launcher") is None:
        raise ConfigError("hydra/launcher=slurm needs a package: pip install 'ipa-train[slurm]'.")
    jobs = jobs_of(overrides, config_dir=config_dir)
    paths: dict[str, list[str]] = {}
    for job in jobs:
        path = str(load_config(job, config_dir=config_dir).run.path)
        if path in paths:
            differing = [override for override in job if override not in paths[path]]
            raise ConfigError(
                f"{len(jobs)} jobs, and two of them in {path}: let run.name say what differs, e.g. "
                f"run.name='first-${{{differing[0].partition('=')[0] if differing else 'seed'}}}'."
            )
        paths[path] = job
    _multirun(overrides, config_dir, partial(_train, config_dir))
    return 0


def jobs_of(overrides: Sequence[str], *, config_dir: str | None = None) -> list[list[str]]:
    """The overrides of each job of a sweep. Nothing is started."""
    jobs: list[list[str]] = []
    with TemporaryDirectory() as scratch:
        ours = [override for override in overrides if not override.lstrip("+~").startswith("hydra")]
        _multirun([*ours, f"hydra.sweep.dir={scratch}"], config_dir, lambda config: jobs.append(_own_overrides()))
    return jobs


def _multirun(overrides: Sequence[str], config_dir: str | None, task: Any) -> None:
    with (
        one_line_errors(overrides, config_dir),
        hydra.initialize_config_dir(str(config_folder()), version_base="1.3"),
    ):
        composer = GlobalHydra.instance().hydra
        assert composer is not None
        composer.multirun(
            config_name="train",
            task_function=task,
            overrides=[*_HYDRA, *overrides_for_hydra(overrides, config_dir)],
            with_log_configuration=False,
        )


def _own_overrides() -> list[str]:
    return list(HydraConfig.get().overrides.task)


def _train(config_dir: str | None, config: DictConfig) -> None:
    """One job, wherever its launcher has brought it; what ends it badly ends the sweep."""
    where = [] if config_dir is None else [f"--config-dir={config_dir}"]
    process = subprocess.Popen([sys.executable, "-m", "ipa_train.cli.main", "train", *where, *_own_overrides()])
    for signum in preemption.SIGNALS:
        signal.signal(signum, lambda received, _: process.send_signal(received))
    if status := process.wait():
        raise SystemExit(status if status > 0 else 128 - status)
