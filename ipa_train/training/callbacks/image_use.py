"""The image-use gap during training: whether the adapter uses its image prompts, told long before pictures show it."""

import logging
from collections.abc import Sequence
from itertools import product

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.types import STEP_OUTPUT

from ipa_train.adapter.lora import LowRankSite
from ipa_train.bases import MicroConditioning
from ipa_train.data.datamodule import StreamingDataModule
from ipa_train.data.fixed_samples import FixedSamples
from ipa_train.data.sequential import SequentialDataModule
from ipa_train.errors import ConfigError
from ipa_train.eval.image_use import MIN_SAMPLES, Probe, branch_ratios, make_probe, probe_losses, summarise
from ipa_train.runtime.distributed import rank, sum_over_ranks
from ipa_train.training.measuring import publish
from ipa_train.training.module import AdapterTraining

_log = logging.getLogger(__name__)


class ImageUse(Callback):
    """Every ``every_steps`` optimizer steps log ``val/gap_other`` and the rest of ``eval.image_use.summarise``.

    Measured on :class:`FixedSamples` with noise and timesteps that never change, on averaged weights where there is an
    average. The set is cut into pieces of ``batch_size``, which the ranks share: a piece is computed alike on any of
    them, so the numbers do not depend on how many there are. Nothing of the training state is touched, and no random
    number drawn from a generator that others use. 0 steps turns it off.

    A measurement is 3 forwards of ``num_samples`` samples, without a backward; a step is at least 2 of a global batch
    (the backward costs one or more). So its share of the time is at most 1.5 num_samples / (global batch x
    every_steps): 1.2 % at the default.
    """

    def __init__(
        self,
        *,
        every_steps: int = 250,
        num_samples: int = 128,
        batch_size: int = 8,
        shards: str | Sequence[str] | None = None,
    ) -> None:
        if every_steps < 0:
            raise ConfigError(f"callbacks.image_use.every_steps must be at least 0 (off), got {every_steps}.")
        if batch_size < 2:
            raise ConfigError(f"callbacks.image_use.batch_size must be at least 2, got {batch_size}.")
        if num_samples < MIN_SAMPLES or num_samples % batch_size:
            raise ConfigError(
                f"callbacks.image_use.num_samples must be at least {MIN_SAMPLES} and a multiple of "
                f"callbacks.image_use.batch_size={batch_size}, got {num_samples}."
            )
        self.every_steps, self.num_samples, self.batch_size, self.shards = every_steps, num_samples, batch_size, shards
        self._samples: FixedSamples | None = None
        self._probes: list[Probe] | None = None
        self._measured_step = 0

    @property
    def metric_names(self) -> list[str]:
        """What it logs, but for the ratios of single sites."""
        if not self.every_steps:
            return []
        parts = ("", "_t0", "_t1", "_t2", "_t3")
        gaps = [f"val/{gap}{part}{ci}" for gap, part, ci in product(("gap_other", "gap_none"), parts, ("", "_ci"))]
        return [*(f"val/loss{part}" for part in parts), *gaps, "val/image_to_text"]

    def prepare(self, data: StreamingDataModule) -> None:
        """Find the samples; all ranks do, rank 0 first, since it may have to index ``shards``.

        Raises:
            ConfigError: too few samples in ``shards``, or none that are always the same.
            DataError: shards that cannot be used.
        """
        if not self.every_steps or self._samples is not None:
            return
        if isinstance(data, SequentialDataModule):
            self._turn_off("sources without an index have no samples that are always the same")
            return
        samples = FixedSamples(data, num_samples=self.num_samples, shards=self.shards)
        self._num_samples = len(samples) // self.batch_size * self.batch_size
        if self._num_samples < MIN_SAMPLES:
            self._turn_off(f"there are {len(samples)} samples, and it takes {max(MIN_SAMPLES, self.batch_size)}")
            return
        self._samples = samples
        if (steps := samples.held_out_steps) is not None and rank() == 0:
            _log.info(
                "image use: measured on %d samples of data.shards that are not trained on before step %d or so; "
                "callbacks.image_use.shards=... takes others",
                self._num_samples,
                steps,
            )

    def _turn_off(self, reason: str) -> None:
        if self.shards is not None:
            raise ConfigError(f"callbacks.image_use.shards={self.shards}: {reason}.")
        if rank() == 0:
            _log.warning("image use is not measured: %s", reason)
        self.every_steps = 0

    def on_fit_start(self, trainer: Trainer, pl_module: AdapterTraining) -> None:
        """Find the samples on the ranks that have not yet."""
        self.prepare(trainer.datamodule)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: AdapterTraining, outputs: STEP_OUTPUT, batch: object, batch_idx: int
    ) -> None:
        """Measure if this step is due."""
        step = trainer.global_step
        if not self.every_steps or step == self._measured_step or step % self.every_steps:
            return
        self._measured_step = step
        metrics = self._measure(trainer, pl_module)
        publish(trainer, metrics)
        if trainer.is_global_zero:
            gaps = (f"{metrics[name]:.4f} +- {metrics[f'{name}_ci']:.4f}" for name in ("val/gap_other", "val/gap_none"))
            _log.info("image use at step %d: the loss rises by %s under another image, by %s under none", step, *gaps)

    @torch.no_grad()
    def _measure(self, trainer: Trainer, module: AdapterTraining) -> dict[str, float]:
        if self._probes is None:
            pieces = range(0, self._num_samples, self.batch_size)[trainer.global_rank :: trainer.world_size]
            self._probes = [self._probe(module, start) for start in pieces]
        numbered = torch.zeros(4, self._num_samples, dtype=torch.float64, device=module.device)
        names = [site.name for site in module.sites if not isinstance(site, LowRankSite)]
        ratios = torch.zeros(len(names), dtype=torch.float64, device=module.device)
        with module.averaged_weights():
            for probe in self._probes:
                losses = probe_losses(module.base, module.adapter, module.objective, probe, module.null_features)
                quarters = module.objective.quarters(probe.timesteps)
                numbered[:, probe.numbers] = torch.cat([losses, quarters[None]]).double()
            if trainer.is_global_zero:
                of_sites = branch_ratios(module.base, module.adapter, module.sites, self._probes[0])
                ratios += torch.stack([of_sites[name] for name in names])
        # Each number comes from one rank and the others add zeros: the sum is exact.
        reduced = sum_over_ranks(torch.cat([numbered.flatten(), ratios])).cpu()
        numbers, ratios = reduced[: numbered.numel()].view_as(numbered), reduced[numbered.numel() :]
        metrics = {f"val/{name}": value for name, value in summarise(numbers[:3], numbers[3].long()).items()}
        metrics["val/image_to_text"] = ratios.mean().item()
        return metrics | {f"image_to_text/{name}": ratio for name, ratio in zip(names, ratios.tolist(), strict=True)}

    def _probe(self, module: AdapterTraining, start: int) -> Probe:
        assert self._samples is not None
        batch = self._samples.batch(start, start + self.batch_size).to(module.device)
        posterior, image_features = module.encode(batch)
        return make_probe(
            posterior,
            image_features,
            batch.captions,
            MicroConditioning(batch.original_sizes, batch.crop_top_lefts, batch.target_sizes),
            module.objective,
            numbers=torch.arange(start, start + self.batch_size),
            num_samples=self._num_samples,
        )
