"""Frozen models of released sizes, and smaller ones of their shapes, with random weights: nothing is downloaded."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    T5Config,
    T5EncoderModel,
)

from ipa_train.bases import Base, Flux, FrozenVAE, StableDiffusion, StableDiffusion3, StableDiffusionXL
from ipa_train.bases.tiny import tiny_t5_tokenizer, tiny_tokenizer
from ipa_train.conditioning import CLIPImageEncoder
from ipa_train.conditioning.pretrained import Pretrained

SD15_UNET: dict[str, Any] = {
    "sample_size": 64,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (320, 640, 1280, 1280),
    "attention_head_dim": 8,
    "cross_attention_dim": 768,
}
# A quarter of every width, so a sixteenth of the FLOPs of each part; widths of heads are the real ones.
SMALL_UNET = {
    **SD15_UNET,
    "block_out_channels": (80, 160, 320, 320),
    "norm_num_groups": 16,
    "attention_head_dim": 2,
    "cross_attention_dim": 192,
}
# To see that everything runs.
TINY_UNET = {
    **SD15_UNET,
    "block_out_channels": (32, 32, 64, 64),
    "norm_num_groups": 8,
    "attention_head_dim": 4,
    "cross_attention_dim": 64,
}
SDXL_UNET: dict[str, Any] = {
    "sample_size": 128,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "cross_attention_dim": 2048,
}
TINY_SDXL_UNET = {
    **SDXL_UNET,
    "block_out_channels": (32, 32, 64),
    "norm_num_groups": 8,
    "attention_head_dim": (2, 2, 4),
    "transformer_layers_per_block": (1, 1, 2),
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 64,
    "cross_attention_dim": 64 + 64,
}
SD35_MEDIUM: dict[str, Any] = {
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "pos_embed_max_size": 384,
    "qk_norm": "rms_norm",
    "dual_attention_layers": tuple(range(13)),
}
FLUX: dict[str, Any] = {"guidance_embeds": True}
TINY_FLUX = {
    **FLUX,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 64,
    "pooled_projection_dim": 64,
    "axes_dims_rope": (4, 4, 8),
}
VAE: dict[str, Any] = {
    "sample_size": 512,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
SMALL_VAE = {**VAE, "block_out_channels": (32, 64, 128, 128)}
TINY_VAE = {**VAE, "block_out_channels": (8, 8, 16, 16), "norm_num_groups": 4}
SD3_LATENTS: dict[str, Any] = {"latent_channels": 16, "scaling_factor": 1.5305, "shift_factor": 0.0609}
FLUX_LATENTS: dict[str, Any] = {"latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159}
_TOKENS = {"bos_token_id": 512, "eos_token_id": 513, "pad_token_id": 513}  # of the tokenizer that stands in for CLIP's
CLIP_L_TEXT: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
    "vocab_size": 49408,
    **_TOKENS,
}
SMALL_TEXT = {**CLIP_L_TEXT, "hidden_size": 192, "intermediate_size": 768, "num_attention_heads": 3}
TINY_TEXT = {
    **CLIP_L_TEXT,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "projection_dim": 64,
    "vocab_size": 514,
}
BIG_G_TEXT = {
    **CLIP_L_TEXT,
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
}
T5_XXL: dict[str, Any] = {
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}
TINY_T5 = {**T5_XXL, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "vocab_size": 128}
VIT_H: dict[str, Any] = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "projection_dim": 1024,
    "image_size": 224,
    "patch_size": 14,
    "hidden_act": "gelu",
}
BIG_G = {**VIT_H, "hidden_size": 1664, "intermediate_size": 8192, "num_hidden_layers": 48, "projection_dim": 1280}
SMALL_VISION = {
    **VIT_H,
    "hidden_size": 320,
    "intermediate_size": 1280,
    "num_attention_heads": 4,
    "projection_dim": 256,
}
TINY_VISION = {
    **VIT_H,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "projection_dim": 64,
    "image_size": 56,
}


def noise_schedule() -> DDIMScheduler:
    """That of Stable Diffusion 1.x and XL."""
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )


def _sd(unet: dict[str, Any], vae: dict[str, Any], text: dict[str, Any]) -> StableDiffusion:
    return StableDiffusion(
        unet=UNet2DConditionModel(**unet),
        vae=FrozenVAE(AutoencoderKL(**vae)),
        text_encoder=CLIPTextModel(CLIPTextConfig(**text)),
        tokenizer=tiny_tokenizer(),
        scheduler=noise_schedule(),
    )


def _sdxl(unet: dict[str, Any], vae: dict[str, Any], text: dict[str, Any], text_2: dict[str, Any]) -> StableDiffusionXL:
    return StableDiffusionXL(
        unet=UNet2DConditionModel(**unet),
        vae=FrozenVAE(AutoencoderKL(**{**vae, "scaling_factor": 0.13025})),
        text_encoder=CLIPTextModel(CLIPTextConfig(**text)),
        tokenizer=tiny_tokenizer(),
        text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**text_2)),
        tokenizer_2=tiny_tokenizer(),
        scheduler=noise_schedule(),
    )


def _sd3() -> StableDiffusion3:
    return StableDiffusion3(
        transformer=SD3Transformer2DModel(**SD35_MEDIUM),
        vae=FrozenVAE(AutoencoderKL(**VAE, **SD3_LATENTS)),
        text_encoder=CLIPTextModelWithProjection(CLIPTextConfig(**CLIP_L_TEXT)),
        tokenizer=tiny_tokenizer(),
        text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**BIG_G_TEXT)),
        tokenizer_2=tiny_tokenizer(),
        text_encoder_3=T5EncoderModel(T5Config(**T5_XXL)),
        tokenizer_3=tiny_t5_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def _flux(transformer: dict[str, Any], vae: dict[str, Any], text: dict[str, Any], t5: dict[str, Any]) -> Flux:
    return Flux(
        transformer=FluxTransformer2DModel(**transformer),
        vae=FrozenVAE(AutoencoderKL(**vae, **FLUX_LATENTS)),
        text_encoder=CLIPTextModel(CLIPTextConfig(**text)),
        tokenizer=tiny_tokenizer(),
        text_encoder_2=T5EncoderModel(T5Config(**t5)),
        tokenizer_2=tiny_t5_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    )


@dataclass(frozen=True)
class Size:
    """A base, the image encoder that goes with it, and the resolution it is trained at."""

    base: Callable[[], Base]
    vision: dict[str, Any]
    resolution: int
    """In pixels."""


SIZES = {
    "tiny": Size(partial(_sd, TINY_UNET, TINY_VAE, TINY_TEXT), TINY_VISION, 64),
    "tiny-sdxl": Size(partial(_sdxl, TINY_SDXL_UNET, TINY_VAE, TINY_TEXT, TINY_TEXT), TINY_VISION, 64),
    "tiny-flux": Size(partial(_flux, TINY_FLUX, TINY_VAE, TINY_TEXT, TINY_T5), TINY_VISION, 64),
    "small": Size(partial(_sd, SMALL_UNET, SMALL_VAE, SMALL_TEXT), SMALL_VISION, 256),
    "sd15": Size(partial(_sd, SD15_UNET, VAE, CLIP_L_TEXT), VIT_H, 512),
    "sdxl": Size(partial(_sdxl, SDXL_UNET, VAE, CLIP_L_TEXT, BIG_G_TEXT), BIG_G, 1024),
    "sd3": Size(_sd3, VIT_H, 1024),
    "flux": Size(partial(_flux, FLUX, VAE, CLIP_L_TEXT, T5_XXL), VIT_H, 1024),
}


def build(name: str, *, dtype: torch.dtype, device: torch.device | str = "cpu") -> tuple[Base, CLIPImageEncoder]:
    """A base and its image encoder, with the same random weights at every call, whatever the precision.

    They are drawn in bf16, so that fp32 and bf16 hold the same numbers.
    """
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            size = SIZES[name]
            base = size.base()
            vision = CLIPVisionModelWithProjection(CLIPVisionConfig(**size.vision))
    finally:
        torch.set_default_dtype(default)
    base.dtype = dtype
    for module in (base, vision):
        nn.Module.to(module, dtype)
    if isinstance(base, StableDiffusionXL):
        base.vae.float()  # as it is loaded: its activations overflow in half precision
    base.requires_grad_(False).eval()
    loaded = Pretrained(vision.eval(), path=name, subfolder="", precision=dtype)
    return base, CLIPImageEncoder(loaded, image_size=size.vision["image_size"], layer=-2)
