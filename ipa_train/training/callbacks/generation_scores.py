"""CLIP-I, CLIP-T and DINO similarity during training, of pictures drawn from a fixed set of image prompts."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from jaxtyping import UInt8
from lightning.pytorch import Trainer
from torch import Tensor

from ipa_train.data.batch import Batch, Pictures
from ipa_train.eval.generate import generate, to_tensor
from ipa_train.eval.metrics import SimilarityScores
from ipa_train.training.callbacks.validation import Validation
from ipa_train.training.module import AdapterTraining


class GenerationScores(Validation):
    """Log ``val/clip_i``, ``val/clip_t`` and ``val/dino`` (see ``SimilarityScores``) every ``every_steps`` steps.

    One picture is drawn for each of ``num_samples`` image prompts with their captions, with a seed of its own, from
    averaged weights where there is an average. Off unless there is a model to score by: ``clip`` or ``dino``, a folder
    or hub id. Between measurements the models lie on the host. From cached features there is no picture of the image
    prompt: the decoded training picture stands for it.
    """

    name: ClassVar[str] = "generation_scores"

    def __init__(
        self,
        *,
        clip: str | None = None,
        dino: str | None = None,
        dtype: str = "float32",
        every_steps: int = 5000,
        num_samples: int = 16,
        batch_size: int = 4,
        num_inference_steps: int = 30,
        guidance_scale: float = 7.5,
        shards: str | Sequence[str] | None = None,
    ) -> None:
        super().__init__(every_steps=every_steps, num_samples=num_samples, batch_size=batch_size, shards=shards)
        if clip is None and dino is None:
            self.every_steps = 0
        self.scores = SimilarityScores.from_pretrained(clip=clip, dino=dino, dtype=dtype)
        self.num_inference_steps, self.guidance_scale = num_inference_steps, guidance_scale

    @property
    def metric_names(self) -> list[str]:
        """Of the models that are there."""
        return [f"val/{name}" for name in self.scores.names] if self.every_steps else []

    @torch.no_grad()
    def measure(self, trainer: Trainer, module: AdapterTraining) -> dict[str, float]:
        """Draw and score this rank's share."""
        names = self.scores.names
        scored = torch.zeros(len(names), self.num_samples, dtype=torch.float64, device=module.device)
        scorer = self.scores.to(module.device)
        with module.averaged_weights():
            for start, batch in self.pieces(trainer, module):
                pictures, image_prompts = self._draw(module, batch, seed=start)
                scores = scorer(pictures, image_prompts, batch.captions)
                scored[:, start : start + len(batch)] = torch.stack([scores[name] for name in names]).double()
        self.scores.to("cpu")
        means = self.summed_over_ranks(trainer, scored).cpu().mean(dim=1)
        return {f"val/{name}": mean for name, mean in zip(names, means.tolist(), strict=True)}

    def _draw(
        self, module: AdapterTraining, batch: Batch, *, seed: int
    ) -> tuple[UInt8[Tensor, "b c h w"], UInt8[Tensor, "b c p q"]]:
        """What comes of the image prompts and captions, and the image prompts."""
        posterior, image_features = module.encode(batch)
        height, width = batch.target_sizes[0].tolist()
        drawn = generate(
            module.base,
            module.adapter,
            image_features,
            module.null_features,
            batch.captions,
            size=(height, width),
            seed=seed,
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
        )
        pictures = batch.content.image_prompts if isinstance(batch.content, Pictures) else None
        return to_tensor(drawn).to(module.device), (
            module.base.vae.decode(posterior.mean) if pictures is None else pictures
        )
