"""A random miniature of each family, saved in the layout of the real ones: for tests and dry runs, no download.

Block types, their number and so the order of attention sites equal the real models'; only widths shrink.
"""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import pre_tokenizers
from torch import nn
from transformers import (
    CLIPImageProcessorPil,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
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
_UNETS: dict[str, dict[str, Any]] = {
    "sd15": _SD15,
    "sd21": {**_SD15, "attention_head_dim": (2, 4, 8, 8), "use_linear_projection": True, "cross_attention_dim": 128},
}


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


def tiny_pipeline(family: str = "sd15", *, seed: int = 0) -> StableDiffusionPipeline:
    """A complete random pipeline: ``sd15`` (epsilon, width 64) or ``sd21`` (v-prediction, width 128)."""
    config = _UNETS[family]
    width = config["cross_attention_dim"]
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=514,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=77,
            bos_token_id=512,
            eos_token_id=513,
            pad_token_id=513,
        )
    )
    vae = AutoencoderKL(
        latent_channels=4,
        sample_size=64,
        norm_num_groups=4,
        layers_per_block=1,
        block_out_channels=(8, 8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon" if family == "sd15" else "v_prediction",
    )
    return StableDiffusionPipeline(
        vae=randomise(vae, seed=seed + 1),
        text_encoder=randomise(text_encoder, seed=seed + 2),
        tokenizer=tiny_tokenizer(),
        unet=randomise(UNet2DConditionModel(**config), seed=seed),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


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
