"""Stable Diffusion 1.x and 2.x."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from ipa_train.bases.base import TextConditioning
from ipa_train.bases.folders import loading, require_pipeline_class
from ipa_train.bases.tokens import token_ids
from ipa_train.bases.unet import UNetBase, ddim_scheduler
from ipa_train.bases.vae import FrozenVAE
from ipa_train.runtime.precision import to_dtype


class StableDiffusion(UNetBase):
    """A frozen Stable Diffusion 1.x / 2.x: epsilon or v-prediction, one CLIP text encoder, 16 cross-attentions."""

    pipeline_class = "StableDiffusionPipeline"

    def __init__(
        self,
        *,
        unet: UNet2DConditionModel,
        vae: FrozenVAE,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        scheduler: DDIMScheduler,
        path: str = "",
    ) -> None:
        super().__init__(unet=unet, vae=vae, scheduler=scheduler, path=path)
        self.text_encoder, self.tokenizer = text_encoder, tokenizer
        self.requires_grad_(False).eval()

    @classmethod
    def from_pretrained(
        cls,
        path: str,
        *,
        dtype: str = "bfloat16",
        vae_dtype: str | None = None,
        revision: str | None = None,
        variant: str | None = None,
    ) -> "StableDiffusion":
        """Load from a diffusers folder or hub id.

        Args:
            path: folder with ``model_index.json``, or hub id.
            dtype: precision of the frozen UNet and text encoder.
            vae_dtype: precision of the VAE; ``dtype`` unless given.
            revision: branch, tag or commit of a hub id.
            variant: ``fp16`` and the like, for folders that hold several sets of weights.

        Raises:
            ConfigError: no diffusers folder there, or one of another family.
        """
        require_pipeline_class(path, cls.pipeline_class, revision=revision)
        where: dict[str, Any] = {"revision": revision, "variant": variant}
        precision = to_dtype(dtype, option="base.dtype")
        with loading(path):
            return cls(
                unet=UNet2DConditionModel.from_pretrained(path, subfolder="unet", torch_dtype=precision, **where),
                vae=cls.load_vae(path, dtype=dtype, vae_dtype=vae_dtype, **where),
                text_encoder=CLIPTextModel.from_pretrained(path, subfolder="text_encoder", dtype=precision, **where),
                tokenizer=CLIPTokenizer.from_pretrained(path, subfolder="tokenizer", revision=revision),
                scheduler=ddim_scheduler(path, revision=revision),
                path=str(path),
            )

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str]) -> TextConditioning:
        """Tokenise to the encoder's full length and return its last hidden states."""
        tokens = token_ids(self.tokenizer, captions, device=self.text_encoder.device)
        return TextConditioning(self.text_encoder(tokens)[0])

    def pipeline(self) -> StableDiffusionPipeline:
        """A diffusers pipeline on these very weights."""
        return StableDiffusionPipeline(
            vae=self.vae.model,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            unet=self.unet,
            scheduler=self.ddim(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
