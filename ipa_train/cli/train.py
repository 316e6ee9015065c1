"""Train an adapter.

    ipa train experiment=sd15_linear run.name=first data.shards='/data/laion/{00000..41000}.tar'
    ipa train -m experiment=sd15_linear run.name='lr-${optimizer.lr}' optimizer.lr=1e-4,3e-4 data.shards=SHARDS

The same command again goes on where the run stopped. With -m every combination of the values between commas is a run:
one after the other, or on Slurm with hydra/launcher=slurm. `ipa train --help` lists no options: they are in conf/,
every one can be overridden as key=value, and `ipa check` with the same arguments tries them all.
"""

import argparse
import logging
from pathlib import Path
from typing import Any, cast

import lightning
import torch
from lightning.pytorch.loggers import WandbLogger
from omegaconf import OmegaConf

from ipa_train.cli.build import build_data, build_loggers, build_module, build_trainer, describe_parameters
from ipa_train.cli.config import load_config
from ipa_train.cli.forecast import choose_checkpointing, device_of_run, plan_of_run
from ipa_train.cli.sweep import sweep
from ipa_train.errors import FinishedError
from ipa_train.runtime.distributed import rank, record_collectives
from ipa_train.runtime.logging import setup_logging
from ipa_train.runtime.preemption import EXIT_STOPPED
from ipa_train.training.callbacks.ownership import OwnershipCheck
from ipa_train.training.callbacks.preemption import Preemption
from ipa_train.training.ownership import restart_count
from ipa_train.training.run_dir import open_run

_log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. experiment=sd15_linear")
    parser.add_argument("--config-dir", help="folder with experiment/*.yaml files of your own")
    parser.add_argument("-m", "--multirun", action="store_true", help="a sweep: optimizer.lr=1e-4,3e-4 is two runs")


def run(args: argparse.Namespace) -> int:
    """Train, and return 0 when ``trainer.max_steps`` is reached."""
    if args.multirun:
        return sweep(args.overrides, config_dir=args.config_dir)
    setup_logging(rank=rank())
    config = load_config(args.overrides, config_dir=args.config_dir)
    torch.set_float32_matmul_precision("high")
    lightning.seed_everything(config.seed, verbose=False)

    module = build_module(config)
    data = build_data(config, module)
    trainer = build_trainer(config, module, data)
    plan, device = plan_of_run(data, trainer), device_of_run(config, gpu=None)
    if (policy := choose_checkpointing(config, module, data, plan, device)) not in (None, "none") and rank() == 0:
        _log.info("acceleration.checkpointing=auto is %s on %s", policy, device.name)
    plain = cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))
    max_steps = config.trainer.max_steps
    try:
        run_dir = open_run(Path(config.run.path), plain, max_steps=max_steps)
    except FinishedError:
        if not restart_count():
            raise
        # Slurm may start a finished job once more: one that was told to stop just when it ended.
        _log.info("run %s has finished at step %d: nothing to do", config.run.path, max_steps)
        return 0
    record_collectives(run_dir.path)
    status = 1
    try:
        trainer.loggers = build_loggers(config, run_dir)
        if run_dir.ownership is not None:
            trainer.callbacks.append(OwnershipCheck(run_dir.ownership))
        if rank() == 0:
            for line in describe_parameters(module):
                _log.info(line)
            if run_dir.resume_from is not None:
                _log.info("resuming from %s", run_dir.resume_from)
        trainer.fit(module, data, ckpt_path=run_dir.resume_from)
        status = EXIT_STOPPED if any(isinstance(c, Preemption) and c.stopped for c in trainer.callbacks) else 0
    finally:
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                if status == EXIT_STOPPED:
                    logger.experiment.mark_preempting()
                logger.experiment.finish(exit_code=status)
        run_dir.close()
    return status
