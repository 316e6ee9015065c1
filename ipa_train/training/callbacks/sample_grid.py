"""Pictures during training: the image prompts, and what the adapter makes of them with and without a caption."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities.types import STEP_OUTPUT
from PIL import Image

from ipa_train.data.batch import Pictures
from ipa_train.errors import ConfigError
from ipa_train.eval.generate import generate, grid, to_pil
from ipa_train.runtime.files import atomic_write
from ipa_train.runtime.watchdog import unwatched
from ipa_train.training.strategies import base_shards


class SampleGrid(Callback):
    """Every ``every_steps`` optimizer steps write ``folder/step-N.png``; wandb and TensorBoard show it too.

    A row for each of ``scales``, the weight of the image prompt beside the caption (as a share of that in training; 0:
    the text alone), and one of the image prompt alone. The image prompts are the first ``num_images`` samples of the
    stream, always the same, with fixed seeds; averaged weights are used where there is an average. Rank 0 draws while
    the others wait, or help where each has a part of the base. 0 steps turns it off.
    """

    def __init__(
        self,
        *,
        folder: str,
        every_steps: int = 5000,
        num_images: int = 4,
        num_inference_steps: int = 30,
        guidance_scale: float = 7.5,
        scales: Sequence[float] = (0.0, 0.5, 1.0),
    ) -> None:
        if every_steps < 0:
            raise ConfigError(f"callbacks.sample_grid.every_steps must be at least 0 (off), got {every_steps}.")
        if num_images < 1:
            raise ConfigError(f"callbacks.sample_grid.num_images must be at least 1, got {num_images}.")
        if not all(scale >= 0 for scale in scales):
            raise ConfigError(f"callbacks.sample_grid.scales must be at least 0, got {list(scales)}.")
        self.scales = tuple(scales)
        self.folder, self.every_steps, self.num_images = Path(folder), every_steps, num_images
        self.num_inference_steps, self.guidance_scale = num_inference_steps, guidance_scale
        self._drawn_step = 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: object, batch_idx: int
    ) -> None:
        """Draw if this step is due."""
        step = trainer.global_step
        if not self.every_steps or step == self._drawn_step or step % self.every_steps:
            return
        self._drawn_step = step
        with unwatched():
            if trainer.is_global_zero or base_shards(trainer) > 1:
                picture = self._draw(trainer, pl_module)
            if trainer.is_global_zero:
                self._show(trainer, picture, step)

    def _draw(self, trainer: Trainer, module: LightningModule) -> Image.Image:
        batch = trainer.datamodule.first_batch(self.num_images).to(module.device)
        posterior, image_features = module.encode(batch)
        if isinstance(batch.content, Pictures):
            rows = [to_pil(batch.content.pixels), to_pil(batch.content.image_prompts)]
            labels = ["training pictures", "image prompts"]
        else:
            rows, labels = [to_pil(module.base.vae.decode(posterior.mean))], ["training pictures, from the cache"]
        height, width = batch.target_sizes[0].tolist()
        sweep = [(f"image prompt at scale {scale:g}, and caption", batch.captions, scale) for scale in self.scales]
        with module.averaged_weights():
            for label, captions, scale in (*sweep, ("image prompt alone", [""] * len(batch), 1.0)):
                labels.append(label)
                rows.append(
                    generate(
                        module.base,
                        module.adapter,
                        image_features,
                        module.null_features,
                        captions,
                        size=(height, width),
                        num_inference_steps=self.num_inference_steps,
                        guidance_scale=self.guidance_scale,
                        scale=scale,
                    )
                )
        return grid(rows, labels, cell=max(96, min(256, width)))

    def _show(self, trainer: Trainer, picture: Image.Image, step: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.folder / f"step-{step:08d}.png") as temporary:
            picture.save(temporary, format="PNG")
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_image("samples", [picture], step=step)
            elif isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image("samples", np.asarray(picture), step, dataformats="HWC")
