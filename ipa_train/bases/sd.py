"""Stable Diffusion 1.x and 2.x."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from jaxtyping import Float, Int64
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from ipa_train.adapter.sites import AttentionSite
from ipa_train.bases.base import Base, MicroConditioning, TextConditioning
from ipa_train.bases.vae import FrozenVAE
from ipa_train.errors import ConfigError
from ipa_train.runtime.precision import to_dtype

_PIPELINE = "StableDiffusionPipeline"


def unet_attention_sites(unet: UNet2DConditionModel) -> list[AttentionSite]:
    """The text cross-attentions of a diffusers UNet, in the order of interchange files.

    That order is ``unet.attn_processors``: down blocks, up blocks, the middle block *last*; self-attentions take the
    even numbers and cross-attentions the odd ones. It must be read before any adapter is loaded into the UNet.
    """
    sites = []
    for index, name in enumerate(unet.attn_processors):
        path = name.removesuffix(".processor")
        if path.endswith("attn1"):
            continue
        module = unet.get_submodule(path)
        hidden_dim, context_dim = module.to_k.weight.shape
        sites.append(AttentionSite(path, index, hidden_dim, context_dim, module))
    return sites


class StableDiffusion(Base):
    """A frozen Stable Diffusion 1.x / 2.x: epsilon or v-prediction, one CLIP text encoder."""

    def __init__(
        self,
        *,
        unet: UNet2DConditionModel,
        vae: FrozenVAE,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        scheduler: DDIMScheduler,
        path: str = "",
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.unet, self.vae, self.text_encoder = unet, vae, text_encoder
        self.tokenizer, self.scheduler, self.path = tokenizer, scheduler, path
        self.requires_grad_(False).eval()
        if gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        self.prediction_type = scheduler.config.prediction_type
        self.alphas_cumprod = scheduler.alphas_cumprod.float()
        self.context_dim = unet.config.cross_attention_dim
        self.dtype = unet.dtype

    @classmethod
    def from_pretrained(
        cls,
        path: str,
        *,
        dtype: str = "bfloat16",
        vae_dtype: str | None = None,
        revision: str | None = None,
        variant: str | None = None,
        gradient_checkpointing: bool = False,
    ) -> "StableDiffusion":
        """Load from a diffusers folder or hub id.

        Args:
            path: folder with ``model_index.json``, or hub id.
            dtype: precision of the frozen UNet and text encoder.
            vae_dtype: precision of the VAE; ``dtype`` unless given.
            revision: branch, tag or commit of a hub id.
            variant: ``fp16`` and the like, for folders that hold several sets of weights.
            gradient_checkpointing: recompute activations in the backward: less memory, about 38 % more FLOPs.

        Raises:
            ConfigError: no diffusers folder there, or one of another family.
        """
        check_pipeline_class(path, revision)
        where: dict[str, Any] = {"revision": revision, "variant": variant}
        precision = to_dtype(dtype, option="base.dtype")
        try:
            unet = UNet2DConditionModel.from_pretrained(path, subfolder="unet", torch_dtype=precision, **where)
            text_encoder = CLIPTextModel.from_pretrained(path, subfolder="text_encoder", dtype=precision, **where)
            tokenizer = CLIPTokenizer.from_pretrained(path, subfolder="tokenizer", revision=revision)
            scheduler = DDIMScheduler.from_pretrained(path, subfolder="scheduler", revision=revision)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ConfigError(f"base.path={path}: cannot load this base: {reason}") from error
        return cls(
            unet=unet,
            vae=FrozenVAE.from_pretrained(path, dtype=vae_dtype or dtype, **where),
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            scheduler=scheduler,
            path=str(path),
            gradient_checkpointing=gradient_checkpointing,
        )

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str]) -> TextConditioning:
        """Tokenise to the encoder's full length and return its last hidden states."""
        tokens = self.tokenizer(
            list(captions),
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        return TextConditioning(self.text_encoder(tokens.input_ids.to(self.text_encoder.device))[0])

    def attention_sites(self) -> list[AttentionSite]:
        """The 16 cross-attentions of SD 1.x / 2.x."""
        return unet_attention_sites(self.unet)

    def predict(
        self,
        noisy_latents: Float[Tensor, "b c h w"],
        timesteps: Int64[Tensor, "b"],
        text: TextConditioning,
        image_tokens: Float[Tensor, "b n d"] | None,
        micro: MicroConditioning | None = None,
    ) -> Float[Tensor, "b c h w"]:
        """One UNet forward; ``micro`` is not used by this family."""
        # The UNet hands these arguments to every attention; this name is the one that self-attentions, which have no
        # use for it, ignore without a warning at each call.
        extra = None if image_tokens is None else {"ip_hidden_states": image_tokens.to(self.dtype)}
        prediction = self.unet(
            noisy_latents.to(self.dtype), timesteps, text.context.to(self.dtype), cross_attention_kwargs=extra
        )
        return cast(Tensor, prediction.sample.float())

    def pipeline(self) -> StableDiffusionPipeline:
        """A diffusers pipeline on these very weights, adapter included while one is attached."""
        return StableDiffusionPipeline(
            vae=self.vae.model,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            unet=self.unet,
            scheduler=DDIMScheduler.from_config(self.scheduler.config),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )


def check_pipeline_class(path: str, revision: str | None) -> None:
    """Refuse a folder that is no diffusers pipeline, or one of another family, before gigabytes are read."""
    folder = Path(path)
    if folder.exists() and not (folder / "model_index.json").is_file():
        raise ConfigError(
            f"base.path={path}: no model_index.json there; give the folder of a diffusers pipeline (with unet/, vae/, "
            "text_encoder/, tokenizer/, scheduler/), or a hub id such as stable-diffusion-v1-5/stable-diffusion-v1-5."
        )
    try:
        if folder.exists():
            index = json.loads((folder / "model_index.json").read_text())
        else:
            index = DiffusionPipeline.load_config(path, revision=revision)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"base.path={path}: neither a local folder nor a hub id that can be reached: {reason}"
        ) from error
    if not str(index.get("_class_name", "")).startswith(_PIPELINE) or "XL" in index["_class_name"]:
        raise ConfigError(
            f"base.path={path}: this is a {index.get('_class_name')}, but base=sd15 and base=sd21 need a {_PIPELINE}."
        )
