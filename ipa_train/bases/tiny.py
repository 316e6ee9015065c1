"""A random miniature of each family, saved in the layout of the real ones: for tests and dry runs, no download.

Block types, their number and so the order of attention sites equal the real models'; only widths shrink.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers import pre_tokenizers
from torch import nn
from transformers import (
    CLIPImageProcessorPil,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

_SD15: dict[str, Any] = {
    "sample_size": 8,
    "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (16, 32, 64, 64),
    "norm_num_groups": 8,
    "attention_head_dim": 8,
    "cross_attention_dim": 64,
}
_SD21 = {**_SD15, "attention_head_dim": (2, 4, 8, 8), "use_linear_projection": True, "cross_attention_dim": 128}
_SDXL: dict[str, Any] = {
    "sample_size": 8,
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (16, 32, 64),
    "norm_num_groups": 8,
    "attention_head_dim": (2, 4, 8),
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 48,
    "cross_attention_dim": 32 + 48,
}
_NOISE: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def randomise(model: nn.Module, *, seed: int) -> nn.Module:
    """Fill every weight with noise of a sane size: heads that start at zero would make comparisons vacuous."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim >= 2:
                weight.copy_(noise / max(weight[0].numel(), 1) ** 0.5)
            else:
                weight.copy_(0.1 * noise + (1.0 if name.endswith("weight") else 0.0))
    return model.eval()


def tiny_tokenizer() -> CLIPTokenizer:
    """A byte-level CLIP tokenizer with 514 entries and no merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    entries = [*alphabet, *(a + "</w>" for a in alphabet), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={entry: i for i, entry in enumerate(entries)}, merges=[], model_max_length=77)


def tiny_t5_tokenizer() -> T5Tokenizer:
    """A T5 tokenizer of single characters."""
    entries = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    return T5Tokenizer(vocab=[*entries, *((chr(c), -3.0) for c in range(33, 127))], extra_ids=0, model_max_length=32)


def tiny_pipeline(family: str = "sd15", *, seed: int = 0) -> DiffusionPipeline:
    """A complete random pipeline.

    ``sd15`` (epsilon, text of width 64), ``sd21`` (v-prediction, 128), ``sdxl`` (two text encoders, 80), ``sd3`` (joint
    attention of width 64, flow), ``sd35m`` (the same with a second attention in its first blocks) or ``flux`` (joint
    attention of width 32, text of width 64, flow).
    """
    return _FAMILIES[family](seed)


def tiny_vae(*, latent_channels: int = 4, seed: int = 1) -> AutoencoderKL:
    """A random autoencoder with 8 pixels per latent; with 16 channels as SD 3 and Flux have it."""
    extra: dict[str, Any] = {}
    if latent_channels != 4:
        extra = {
            "scaling_factor": 1.5305,
            "shift_factor": 0.0609,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
        }
    vae = AutoencoderKL(
        latent_channels=latent_channels,
        sample_size=64,
        norm_num_groups=4,
        layers_per_block=1,
        block_out_channels=(8, 8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        **extra,
    )
    return randomise(vae, seed=seed)


def _clip_text(width: int, *, seed: int, projection: bool = False, layers: int = 2) -> nn.Module:
    config = CLIPTextConfig(
        vocab_size=514,
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=77,
        bos_token_id=512,
        eos_token_id=513,
        pad_token_id=513,
    )
    return randomise((CLIPTextModelWithProjection if projection else CLIPTextModel)(config), seed=seed)


def _t5(width: int, *, seed: int) -> nn.Module:
    config = T5Config(
        vocab_size=128, d_model=width, d_kv=8, d_ff=64, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
    )
    return randomise(T5EncoderModel(config), seed=seed)


def _sd(config: dict[str, Any], prediction_type: str, seed: int) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=tiny_vae(seed=seed + 1),
        text_encoder=_clip_text(config["cross_attention_dim"], seed=seed + 2),
        tokenizer=tiny_tokenizer(),
        unet=randomise(UNet2DConditionModel(**config), seed=seed),
        scheduler=DDIMScheduler(**_NOISE, clip_sample=False, set_alpha_to_one=False, prediction_type=prediction_type),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sdxl(seed: int) -> StableDiffusionXLPipeline:
    return StableDiffusionXLPipeline(
        vae=tiny_vae(seed=seed + 1),
        text_encoder=_clip_text(32, seed=seed + 2, layers=3),
        text_encoder_2=_clip_text(48, seed=seed + 3, projection=True, layers=3),
        tokenizer=tiny_tokenizer(),
        tokenizer_2=tiny_tokenizer(),
        unet=randomise(UNet2DConditionModel(**_SDXL), seed=seed),
        scheduler=EulerDiscreteScheduler(**_NOISE),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )


def _sd3(dual_attention_layers: tuple[int, ...], seed: int) -> StableDiffusion3Pipeline:
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=64,
        caption_projection_dim=64,
        pooled_projection_dim=64,
        pos_embed_max_size=16,
        dual_attention_layers=dual_attention_layers,
        qk_norm="rms_norm",
    )
    return StableDiffusion3Pipeline(
        transformer=randomise(transformer, seed=seed),  # its position table is a buffer, and stays
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny_vae(latent_channels=16, seed=seed + 1),
        text_encoder=_clip_text(32, seed=seed + 2, projection=True),
        tokenizer=tiny_tokenizer(),
        text_encoder_2=_clip_text(32, seed=seed + 3, projection=True),
        tokenizer_2=tiny_tokenizer(),
        text_encoder_3=_t5(64, seed=seed + 4),
        tokenizer_3=tiny_t5_tokenizer(),
    )


def _flux(guidance_distilled: bool, seed: int) -> FluxPipeline:
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=64,
        pooled_projection_dim=32,
        guidance_embeds=guidance_distilled,
        axes_dims_rope=(4, 4, 8),
    )
    return FluxPipeline(
        transformer=randomise(transformer, seed=seed),
        scheduler=FlowMatchEulerDiscreteScheduler(
            shift=3.0 if guidance_distilled else 1.0, use_dynamic_shifting=guidance_distilled
        ),
        vae=tiny_vae(latent_channels=16, seed=seed + 1),
        text_encoder=_clip_text(32, seed=seed + 2),
        tokenizer=tiny_tokenizer(),
        text_encoder_2=_t5(64, seed=seed + 3),
        tokenizer_2=tiny_t5_tokenizer(),
    )


_FAMILIES: dict[str, Callable[[int], DiffusionPipeline]] = {
    "sd15": partial(_sd, _SD15, "epsilon"),
    "sd21": partial(_sd, _SD21, "v_prediction"),
    "sdxl": _sdxl,
    "sd3": partial(_sd3, ()),
    "sd35m": partial(_sd3, (0, 1)),
    "flux": partial(_flux, True),
    "schnell": partial(_flux, False),
}


def tiny_image_encoder(*, seed: int = 0) -> CLIPVisionModelWithProjection:
    """A random CLIP vision model: 32 px, 16 patches and a class token, width 40, projection 24."""
    config = CLIPVisionConfig(
        hidden_size=40,
        intermediate_size=64,
        projection_dim=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
    )
    return randomise(CLIPVisionModelWithProjection(config), seed=seed + 11)


def save_tiny_models(folder: Path, family: str = "sd15", *, seed: int = 0) -> tuple[Path, Path]:
    """Write a base and an image encoder under ``folder``; return their paths."""
    base, encoder = folder / family, folder / "image_encoder"
    tiny_pipeline(family, seed=seed).save_pretrained(base)
    tiny_image_encoder(seed=seed).save_pretrained(encoder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(encoder)
    return base, encoder
