"""The training step, the same for every base, variant and objective."""

import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor, nn

from ipa_train.adapter.adapter import IPAdapter
from ipa_train.adapter.projector import Projector
from ipa_train.adapter.sites import AttentionSite
from ipa_train.bases import Base, LatentPosterior, MicroConditioning, UNetBase, adapter_sites
from ipa_train.conditioning import ImageEncoder
from ipa_train.conditioning.dropout import ConditionDropout, Dropped
from ipa_train.data.batch import Batch, Pictures
from ipa_train.data.cache import encoders_identity
from ipa_train.diffusion.objective import Objective
from ipa_train.diffusion.timesteps import Timesteps
from ipa_train.errors import ConfigError
from ipa_train.export.file import NO_EXPORT, write_export
from ipa_train.export.layouts import interchange_names
from ipa_train.runtime.distributed import leave_frozen_to_each_rank
from ipa_train.runtime.seeding import Draws
from ipa_train.training.ema import AdapterEMA
from ipa_train.training.metrics import RunningMeans
from ipa_train.training.optim import LRSchedule

_log = logging.getLogger(__name__)


class AdapterTraining(lightning.LightningModule):
    """A frozen base and image encoder, and the adapter that is trained on them.

    ``sites`` says what attaches to the base, and ``train_denoiser`` that its denoiser is trained as well: it then is a
    part of the adapter, in its checkpoints too.

    The partials are what YAML leaves open until the models are there: ``projector`` wants the widths of encoder and
    base, ``objective`` the base's noise schedule, ``optimizer`` the adapter's parameters.
    """

    def __init__(
        self,
        *,
        base: Base,
        image_encoder: ImageEncoder,
        projector: Callable[..., Projector],
        objective: Callable[..., Objective],
        optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
        timesteps: Timesteps,
        dropout: ConditionDropout,
        lr_schedule: LRSchedule,
        ema: AdapterEMA | None = None,
        sites: Callable[[Base], list[AttentionSite]] = adapter_sites,
        train_denoiser: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if train_denoiser and not isinstance(base, UNetBase):
            raise ConfigError(
                f"adapter.train_denoiser: fine-tuning is a baseline for UNets, not {base.pipeline_class}."
            )
        if train_denoiser and base.dtype != torch.float32:
            raise ConfigError(
                f"adapter.train_denoiser=true needs base.dtype=float32, got {str(base.dtype).removeprefix('torch.')}: "
                "the optimizer's small steps would be lost in rounding."
            )
        if base.dtype == torch.float16:
            _log.warning("base.dtype=float16: small gradients are lost in its range; bfloat16 keeps them")
        self.strict_loading = False  # checkpoints hold the adapter only
        self.base, self.image_encoder = base, image_encoder
        torch.manual_seed(seed)
        kinds = projector.func.feature_kinds  # type: ignore[attr-defined]
        dims = map(image_encoder.feature_dim, kinds)
        sizes = dict(zip(("feature_dim", "hidden_dim"), dims, strict=False))
        self.sites = sites(base)
        self.adapter = IPAdapter(
            projector=projector(**sizes, context_dim=base.context_dim),
            sites=self.sites,
            denoiser=base.denoiser if train_denoiser else None,
        ).attach(self.sites)
        for i, kind in enumerate(kinds):
            null = image_encoder.null_features(kind, base.null_image(kind))
            self.register_buffer(f"null_features_{i}", null, persistent=False)
        self.objective = objective(base_prediction=base.prediction_type, schedule=base.schedule)
        base.schedule = self.objective.schedule  # so that sample grids are drawn by what is trained
        self.timesteps, self.dropout = timesteps, dropout
        self.make_optimizer, self.lr_schedule = optimizer, lr_schedule
        self.ema, self.seed = ema, seed
        self.metrics = RunningMeans()
        leave_frozen_to_each_rank(self)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Eq. 6 of the paper: mean squared error of the denoiser under text and image conditions, each droppable."""
        draws = Draws(self.seed, batch.positions, batch.device)
        dropped = self.dropout.draw(draws)
        text = self.base.encode_text(dropped.captions(batch.captions))
        posterior, image_features = self.encode(batch)

        posterior_noise, noise = self.objective.draw_noise(draws, posterior.mean.shape[1:])
        latents = posterior.sample(posterior_noise)
        u = self.timesteps.draw(draws, base_shift=self.base.timestep_shift((latents.shape[2], latents.shape[3])))
        timesteps = self.objective.schedule.timesteps(u)
        noisy_latents = self.objective.add_noise(latents, noise, timesteps)

        image_tokens = self.adapter(*dropped.image_features(image_features, self.null_features), timesteps=timesteps)
        micro = MicroConditioning(batch.original_sizes, batch.crop_top_lefts, batch.target_sizes)
        prediction = self.base.predict(noisy_latents, timesteps, text, image_tokens, micro)
        losses = self.objective.losses(prediction, self.objective.target(latents, noise, timesteps), timesteps)
        self.record(losses.detach(), timesteps, dropped)
        return losses.mean()

    @property
    def null_features(self) -> tuple[Tensor, ...]:
        """Features of "no image", of each kind that the projector takes."""
        kinds = self.adapter.projector.feature_kinds
        return tuple(self.get_buffer(f"null_features_{i}") for i in range(len(kinds)))

    def encode(self, batch: Batch) -> tuple[LatentPosterior, tuple[Tensor, ...]]:
        """Latents and image features of a batch: from its pictures, or as they were cached."""
        content = batch.content
        if isinstance(content, Pictures):
            kinds = self.adapter.projector.feature_kinds
            features = self.image_encoder.features(content.image_prompts, kinds, embeddings=content.embeddings)
            return self.base.vae.encode(content.pixels), features
        mean = content.latents_mean.float()
        std = torch.zeros_like(mean) if content.latents_std is None else content.latents_std.float()
        features = tuple(x.to(null.dtype) for x, null in zip(content.image_features, self.null_features, strict=True))
        return LatentPosterior(mean, std), features

    def encoders_identity(self) -> dict[str, Any]:
        """What cached features depend on, so that those of other encoders are refused."""
        kinds = self.adapter.projector.feature_kinds
        return encoders_identity(self.base.vae.identity(), self.image_encoder.identity(), "+".join(kinds))

    def record(self, losses: Tensor, timesteps: Tensor, dropped: Dropped) -> None:
        """Add a micro-batch to the running means: loss, loss by timestep quarter, realised drop rates."""
        quarters = self.objective.quarters(timesteps)
        self.metrics.update("train/loss", losses)
        for quarter in range(4):
            self.metrics.update(f"train/loss_t{quarter}", losses, where=quarters == quarter)
        self.metrics.update("data/dropped_text", dropped.text & ~dropped.image)
        self.metrics.update("data/dropped_image", dropped.image & ~dropped.text)
        self.metrics.update("data/dropped_both", dropped.text & dropped.image)

    def configure_optimizers(self) -> dict[str, Any]:
        """The optimizer over the adapter alone, and its schedule by optimizer step."""
        optimizer = self.make_optimizer(self.adapter.parameters())
        scheduler = self.lr_schedule.build(optimizer, self.trainer.max_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def averaged_weights(self) -> AbstractContextManager[None]:
        """Within the block the adapter holds its average, if there is one."""
        return nullcontext() if self.ema is None else self.ema.applied(self.adapter.named_parameters())

    def write_exports(self, folder: Path) -> None:
        """Write the adapter, averaged if there is an average, as interchange files; called for every checkpoint.

        Of an adapter that no loader takes there are none, but a line that says why.
        """
        if self.adapter.unexportable is not None:
            (folder / NO_EXPORT).write_text(f"{self.adapter.unexportable}\n")
            return
        # A hub id as it is; of a folder its name, since the rest is nobody's business.
        base = Path(self.base.path).name if Path(self.base.path).is_dir() else self.base.path
        metadata = {
            "base": {"name": base, "prediction_type": self.base.prediction_type},
            "image_encoder": self.image_encoder.identity(),
            "feature_kinds": self.adapter.projector.feature_kinds,
            "variant": self.adapter.projector.variant,
            "num_tokens": getattr(self.adapter.projector, "num_tokens", None),
            "shortcut": getattr(self.adapter.projector, "shortcut", None),
            "step": self.global_step,
            "ema": self.ema is not None,
            "dropout": vars(self.dropout),
            "objective": self.objective.options,
            "timesteps": {"distribution": type(self.timesteps).__name__, **vars(self.timesteps)},
            "optimizer": getattr(self.make_optimizer, "keywords", {}),
            "lr_schedule": vars(self.lr_schedule),
            "seed": self.seed,
            "state_names": interchange_names(self.adapter, self.sites),
        }
        with self.averaged_weights():
            write_export(folder, self.adapter, self.sites, metadata=metadata)

    def on_fit_start(self) -> None:
        """Begin the average with the first weights, so that the checkpoint of step 0 has one."""
        if self.adapter.unexportable is not None:
            _log.info("checkpoints of this run hold no export: %s", self.adapter.unexportable)
        if self.ema is not None:
            self.ema.start(self.adapter.named_parameters())

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, then let the average follow."""
        super().optimizer_step(*args, **kwargs)
        if self.ema is not None:
            self.ema.update(self.adapter.named_parameters())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the average to a checkpoint."""
        if self.ema is not None:
            checkpoint["ema"] = self.ema.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the average from a checkpoint, and begin a new count of micro-batches.

        The stream has no epochs, and the run may go on with another number of micro-batches per step: Lightning would
        take its old count of them for a place within the next step.
        """
        for count in ("total", "current"):
            progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"][count]
            progress.update(dict.fromkeys(progress, 0))
        if self.ema is not None and "ema" in checkpoint:
            self.ema.load_state_dict(checkpoint["ema"])

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Load what :meth:`state_dict` gave, strictly: an adapter with a hole would train on in silence."""
        return self.adapter.load_state_dict({name.removeprefix("adapter."): w for name, w in state_dict.items()})

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The adapter alone: what is frozen comes back from its own files."""
        return {f"adapter.{name}": weight for name, weight in self.adapter.state_dict(*args, **kwargs).items()}
