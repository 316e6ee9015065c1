"""The image-use gap during training: whether the adapter uses its image prompts, told long before pictures show it."""

import logging
from collections.abc import Sequence
from itertools import product
from typing import ClassVar

import torch
from lightning.pytorch import Trainer

from ipa_train.adapter.lora import LowRankSite
from ipa_train.bases import MicroConditioning
from ipa_train.data.batch import Batch
from ipa_train.errors import ConfigError
from ipa_train.eval.image_use import MIN_SAMPLES, Probe, branch_ratios, make_probe, probe_losses, summarise
from ipa_train.runtime.distributed import sum_over_ranks
from ipa_train.training.callbacks.validation import Validation
from ipa_train.training.module import AdapterTraining
from ipa_train.training.strategies import base_shards

_log = logging.getLogger(__name__)


class ImageUse(Validation):
    """Log ``val/gap_other`` and the rest of ``eval.image_use.summarise`` every ``every_steps`` optimizer steps.

    Noise and timesteps of the samples never change, and averaged weights are used where there is an average. Nothing of
    the training state is touched, and no number drawn from a generator that others use.

    A measurement is 3 forwards of ``num_samples`` samples and one of a piece, without a backward; a step is a forward
    and a backward, about twice the arithmetic, of the global batch. So its share of the time is about 1.5 num_samples /
    (global batch x every_steps): 1.2 % at the default. Measured on the tiny world: 1.1 % online, 1.6 % from a cache.
    """

    name: ClassVar[str] = "image_use"
    min_samples: ClassVar[int] = MIN_SAMPLES

    def __init__(
        self,
        *,
        every_steps: int = 250,
        num_samples: int = 128,
        batch_size: int = 16,
        shards: str | Sequence[str] | None = None,
    ) -> None:
        if batch_size < 2:
            raise ConfigError(
                f"callbacks.image_use.batch_size must be at least 2, got {batch_size}: each sample is given the image "
                "of another one of its piece."
            )
        super().__init__(every_steps=every_steps, num_samples=num_samples, batch_size=batch_size, shards=shards)
        self._probes: list[Probe] | None = None

    @property
    def metric_names(self) -> list[str]:
        """What it logs, but for the ratios of single sites."""
        if not self.every_steps:
            return []
        parts = ("", "_t0", "_t1", "_t2", "_t3")
        gaps = [f"val/{gap}{part}{ci}" for gap, part, ci in product(("gap_other", "gap_none"), parts, ("", "_ci"))]
        return [*(f"val/loss{part}" for part in parts), *gaps, "val/image_to_text"]

    @torch.no_grad()
    def measure(self, trainer: Trainer, module: AdapterTraining) -> dict[str, float]:
        """Probe this rank's share, once encoded, and put all ranks' numbers together."""
        if self._probes is None:
            self._probes = [self._probe(module, *piece) for piece in self.pieces(trainer, module)]
        numbered = torch.zeros(4, self.num_samples, dtype=torch.float64, device=module.device)
        names = [site.name for site in module.sites if not isinstance(site, LowRankSite)]
        ratios = torch.zeros(len(names), dtype=torch.float64, device=module.device)
        with module.averaged_weights():
            for probe in self._probes:
                losses = probe_losses(module.base, module.adapter, module.objective, probe, module.null_features)
                quarters = module.objective.quarters(probe.timesteps)
                numbered[:, probe.numbers] = torch.cat([losses, quarters[None]]).double()
            if trainer.is_global_zero or base_shards(trainer) > 1:
                of_sites = branch_ratios(module.base, module.adapter, module.sites, self._probes[0])
                if trainer.is_global_zero:
                    ratios += torch.stack([of_sites[name] for name in names])
        numbers, ratios = self.summed_over_ranks(trainer, numbered).cpu(), sum_over_ranks(ratios).cpu()
        metrics = {f"val/{name}": value for name, value in summarise(numbers[:3], numbers[3].long()).items()}
        metrics["val/image_to_text"] = ratios.mean().item()
        if trainer.is_global_zero:
            gaps = (f"{metrics[name]:.4f} +- {metrics[f'{name}_ci']:.4f}" for name in ("val/gap_other", "val/gap_none"))
            told = "image use at step %d: the loss rises by %s under another image, by %s under none"
            _log.info(told, trainer.global_step, *gaps)
        return metrics | {f"image_to_text/{name}": ratio for name, ratio in zip(names, ratios.tolist(), strict=True)}

    def _probe(self, module: AdapterTraining, start: int, batch: Batch) -> Probe:
        posterior, image_features = module.encode(batch)
        return make_probe(
            posterior,
            image_features,
            batch.captions,
            MicroConditioning(batch.original_sizes, batch.crop_top_lefts, batch.target_sizes),
            module.objective,
            numbers=torch.arange(start, start + len(batch)),
            num_samples=self.num_samples,
        )
