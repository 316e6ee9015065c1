"""Stable Diffusion XL."""

import copy
from collections.abc import Sequence
from typing import Any, cast

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from ipa_train.bases.base import MicroConditioning, TextConditioning
from ipa_train.bases.folders import loading, require_pipeline_class
from ipa_train.bases.tokens import token_ids
from ipa_train.bases.unet import UNetBase, ddim_scheduler
from ipa_train.bases.vae import FrozenVAE
from ipa_train.errors import ConfigError
from ipa_train.runtime.precision import to_dtype


class StableDiffusionXL(UNetBase):
    """A frozen SDXL: two CLIP text encoders, 70 cross-attentions, told the size and crop of each picture."""

    pipeline_class = "StableDiffusionXLPipeline"

    def __init__(
        self,
        *,
        unet: UNet2DConditionModel,
        vae: FrozenVAE,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        text_encoder_2: CLIPTextModelWithProjection,
        tokenizer_2: CLIPTokenizer,
        scheduler: DDIMScheduler,
        zero_null_text: bool = True,
        path: str = "",
    ) -> None:
        super().__init__(unet=unet, vae=vae, scheduler=scheduler, path=path)
        self.text_encoder, self.tokenizer = text_encoder, tokenizer
        self.text_encoder_2, self.tokenizer_2 = text_encoder_2, tokenizer_2
        self.zero_null_text = zero_null_text
        self.requires_grad_(False).eval()

    @classmethod
    def from_pretrained(
        cls,
        path: str,
        *,
        vae_path: str | None = None,
        dtype: str = "bfloat16",
        vae_dtype: str | None = None,
        revision: str | None = None,
        variant: str | None = None,
    ) -> "StableDiffusionXL":
        """Load from a diffusers folder or hub id.

        Args:
            path: folder with ``model_index.json``, or hub id.
            vae_path: folder or hub id of another VAE with SDXL's latents, such as madebyollin/sdxl-vae-fp16-fix, which
                runs in half precision.
            dtype: precision of the frozen UNet and text encoders.
            vae_dtype: precision of the VAE. Unless given, float32 for the folder's own, whose activations overflow in
                fp16, and ``dtype`` for that of ``vae_path``.
            revision: branch, tag or commit of a hub id.
            variant: ``fp16`` and the like, for folders that hold several sets of weights.

        Raises:
            ConfigError: no diffusers folder there, or one of another family.
        """
        require_pipeline_class(path, cls.pipeline_class, revision=revision)
        where: dict[str, Any] = {"revision": revision, "variant": variant}
        precision = to_dtype(dtype, option="base.dtype")
        with loading(path):
            index = StableDiffusionXLPipeline.load_config(path, revision=revision)
            return cls(
                unet=UNet2DConditionModel.from_pretrained(path, subfolder="unet", torch_dtype=precision, **where),
                vae=cls.load_vae(path, vae_path=vae_path, dtype=dtype, vae_dtype=vae_dtype, **where),
                text_encoder=CLIPTextModel.from_pretrained(path, subfolder="text_encoder", dtype=precision, **where),
                tokenizer=CLIPTokenizer.from_pretrained(path, subfolder="tokenizer", revision=revision),
                text_encoder_2=CLIPTextModelWithProjection.from_pretrained(
                    path, subfolder="text_encoder_2", dtype=precision, **where
                ),
                tokenizer_2=CLIPTokenizer.from_pretrained(path, subfolder="tokenizer_2", revision=revision),
                scheduler=ddim_scheduler(path, revision=revision),
                zero_null_text=index.get("force_zeros_for_empty_prompt", True),
                path=str(path),
            )

    @classmethod
    def load_vae(
        cls,
        path: str,
        *,
        vae_path: str | None = None,
        dtype: str = "bfloat16",
        vae_dtype: str | None = None,
        revision: str | None = None,
        variant: str | None = None,
        **_: Any,
    ) -> FrozenVAE:
        """Load the autoencoder alone, by the options of ``from_pretrained``.

        Raises:
            ConfigError: nothing there to load, or at ``vae_path`` the VAE of another family.
        """
        if vae_path is not None:
            vae = FrozenVAE.from_pretrained(vae_path, alone=True, dtype=vae_dtype or dtype)
            with loading(path):
                own = AutoencoderKL.load_config(path, subfolder="vae", revision=revision)
            for name in ("latent_channels", "scaling_factor"):
                found = vae.model.config[name]
                if found != (wanted := own.get(name, found)):
                    raise ConfigError(
                        f"base.vae_path={vae_path}: its {name} is {found}, and that of the base's own VAE {wanted}: "
                        "give one that makes the same latents."
                    )
            return vae
        return FrozenVAE.from_pretrained(path, dtype=vae_dtype or "float32", revision=revision, variant=variant)

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str]) -> TextConditioning:
        """Both encoders' states before their last layer, side by side, and the second one's pooled projection."""
        states = []
        for tokenizer, encoder in ((self.tokenizer, self.text_encoder), (self.tokenizer_2, self.text_encoder_2)):
            tokens = token_ids(tokenizer, captions, device=encoder.device)
            encoded = encoder(tokens, output_hidden_states=True)
            states.append(encoded.hidden_states[-2])
        return TextConditioning(torch.cat(states, dim=-1), encoded.text_embeds)

    def null_text(self, count: int) -> TextConditioning:
        """Zeros where the folder says ``force_zeros_for_empty_prompt`` (SDXL does), else the empty caption.

        At inference alone: the caption that training drops is "" tokenised.
        """
        text = self.encode_text([""] * count)
        if not self.zero_null_text:
            return text
        return TextConditioning(torch.zeros_like(text.context), torch.zeros_like(cast(Tensor, text.pooled)))

    def added_conditions(
        self, text: TextConditioning, micro: MicroConditioning | None, size: tuple[int, int]
    ) -> dict[str, Tensor]:
        """The pooled caption, and six numbers: original size, crop corner, target size."""
        pooled = cast(Tensor, text.pooled)
        micro = micro or MicroConditioning.uncropped(size, len(pooled), pooled.device)
        numbers = torch.cat([micro.original_sizes, micro.crop_top_lefts, micro.target_sizes], dim=1)
        return {"text_embeds": pooled.to(self.dtype), "time_ids": numbers.float()}

    def pipeline(self) -> StableDiffusionXLPipeline:
        """A diffusers pipeline on these very weights, but for a VAE of another precision: it decodes in the UNet's."""
        vae = self.vae.model
        if vae.dtype != self.dtype:
            vae = copy.deepcopy(vae)
            nn.Module.to(vae, self.dtype)
        return StableDiffusionXLPipeline(
            vae=vae,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            text_encoder_2=self.text_encoder_2,
            tokenizer_2=self.tokenizer_2,
            unet=self.unet,
            scheduler=self.ddim(),
            force_zeros_for_empty_prompt=self.zero_null_text,
            add_watermarker=False,
        )
