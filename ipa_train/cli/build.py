"""From a config to the objects of a run; shared by training and checking."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig

from ipa_train.bases import adapter_sites
from ipa_train.cli.binding import instantiate
from ipa_train.data.datamodule import StreamingDataModule
from ipa_train.errors import ConfigError
from ipa_train.export.description import describe_adapter
from ipa_train.export.loadability import require_loadable
from ipa_train.export.warm_start import init_from
from ipa_train.runtime.distributed import rank
from ipa_train.training.callbacks.validation import Validation
from ipa_train.training.checkpoint import AdapterCheckpointIO, step_of
from ipa_train.training.measuring import Watches
from ipa_train.training.module import AdapterTraining
from ipa_train.training.run_dir import RunDir
from ipa_train.training.strategies import require_fitting


def build_module(config: DictConfig) -> AdapterTraining:
    """Load the frozen models and make the adapter, from a released file where one is given.

    Raises:
        ConfigError, ExportError: a folder or file that cannot serve, or an adapter that nothing could load afterwards.
    """
    acceleration = instantiate(config.acceleration)
    if acceleration.cuda_graphs and config.data.get("bucket_step"):
        raise ConfigError(
            "acceleration.cuda_graphs=true replays kernels for pictures of one size, and data.bucket_step="
            f"{config.data.bucket_step} makes several: set data.bucket_step=null or leave cuda_graphs out."
        )
    base = instantiate(config.base)
    for option in ("resolution", "bucket_step"):
        if (size := config.data.get(option)) and size % base.size_multiple:
            raise ConfigError(f"data.{option}={size} must be a multiple of {base.size_multiple} for this base.")
    aspect_ratio = config.data.max_aspect_ratio if config.data.get("bucket_step") else 1.0
    longest = round(config.data.resolution * aspect_ratio**0.5)
    if base.max_size is not None and longest > base.max_size:
        raise ConfigError(
            f"data.resolution={config.data.resolution} gives pictures of up to {longest} pixels a side, and this base "
            f"takes {base.max_size}: set a lower one."
        )
    module = AdapterTraining(
        base=base,
        image_encoder=instantiate(config.image_encoder),
        projector=instantiate(config.adapter.projector),
        objective=instantiate(config.objective),
        timesteps=instantiate(config.timesteps),
        dropout=instantiate(config.dropout),
        optimizer=instantiate(config.optimizer),
        lr_schedule=instantiate(config.lr_schedule),
        ema=instantiate(config.ema),
        sites=instantiate(config.adapter.sites) if "sites" in config.adapter else adapter_sites,
        train_denoiser=config.adapter.get("train_denoiser", False),
        seed=config.seed,
    )
    acceleration.apply(base)
    try:
        # Made once for its complaints: the trainer asks for it only after the run directory has been written.
        module.make_optimizer(module.adapter.parameters())
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{config.optimizer._target_}: {error}") from error
    if module.adapter.unexportable is None:
        require_loadable(describe_adapter(module.adapter, module.sites), source="adapter")
    if config.adapter.init_from is not None:
        init_from(module.adapter, module.sites, Path(config.adapter.init_from), module.image_encoder)
    return module


def build_data(config: DictConfig, module: AdapterTraining) -> StreamingDataModule:
    """Make the data module; rank 0 indexes the shards now, so that their faults show before anything is written."""
    data: StreamingDataModule = instantiate(
        config.data,
        image_prompt_size=module.image_encoder.image_size,
        embedding_shape=module.image_encoder.embedding_shape,
        bad_samples_dir=config.run.path,
        encoders=module.encoders_identity(),
    )
    if rank() == 0:
        data.prepare_data()
    return data


def build_trainer(
    config: DictConfig, module: AdapterTraining, data: StreamingDataModule, *, is_here: bool = True
) -> lightning.Trainer:
    """Make the trainer and its callbacks, without loggers; ``is_here``: for this machine, and not for one elsewhere.

    Raises:
        ConfigError: the global batch does not divide among the processes and micro-batches, or the strategy does not
            go with the base, the machine or other options.
    """
    for option in ("log_every_n_steps", "gradient_clip_val"):
        value = config.trainer[option]
        if value is not None and value <= 0:  # Lightning would take it for "off"
            raise ConfigError(f"trainer.{option} must be above 0 or null, got {value}.")
    if config.optimizer.get("fused") and config.trainer.gradient_clip_val and "mixed" in str(config.trainer.precision):
        raise ConfigError(
            f"trainer.precision={config.trainer.precision} with trainer.gradient_clip_val needs optimizer.fused=false: "
            "Lightning clips no gradients of a fused optimizer there. Or leave 32-true: the frozen models have their "
            "own precision, base.dtype."
        )
    callbacks = [instantiate(node) for node in config.callbacks.values()]
    for callback in callbacks:
        if isinstance(callback, Validation) and rank() == 0:
            callback.prepare(data)
    for callback in callbacks:
        if isinstance(callback, Watches):
            callback.require_measured(callbacks)
    trainer: lightning.Trainer = instantiate(
        config.trainer,
        callbacks=callbacks,
        logger=False,
        plugins=[AdapterCheckpointIO()],
        default_root_dir=config.run.path,
    )
    trainer.accumulate_grad_batches = data.accumulate_grad_batches(trainer.world_size)
    require_fitting(trainer, module, instantiate(config.acceleration), is_here=is_here)
    return trainer


def build_loggers(config: DictConfig, run_dir: RunDir) -> list[Logger]:
    """Make the loggers. Trackers go on with the run that they have begun; what is to be done again, they forget."""
    known: dict[str, dict[str, Any]] = {"wandb": {"id": run_dir.tracker_id, "resume": "allow"}}
    if run_dir.resume_from is not None:
        known["tensorboard"] = {"purge_step": step_of(run_dir.resume_from) + 1}
    return [instantiate(node, **known.get(name, {})) for name, node in config.logger.items()]


def describe_parameters(module: AdapterTraining) -> Iterator[str]:
    """One line for each part: parameters, trained or frozen, and precision."""
    parts = {
        "base": [p for p in module.base.parameters() if not p.requires_grad],  # a trained denoiser is the adapter's
        "image encoder": list(module.image_encoder.parameters()),
        "adapter": list(module.adapter.parameters()),
    }
    for name, parameters in parts.items():
        kind = "trained" if any(p.requires_grad for p in parameters) else "frozen"
        dtypes = ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in parameters}))
        yield f"{name:<14}{sum(p.numel() for p in parameters):>15,} parameters  {kind:<8}{dtypes}"
