"""The sizes of released models, for what can be said on the meta device."""

from dataclasses import replace

import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel

from benchmarks.sizes import SD15_UNET, SD35_MEDIUM, SDXL_UNET
from ipa_train.bases.adapter_sites import BASELINES
from ipa_train.bases.flux import flux_attention_sites
from ipa_train.bases.sd3 import sd3_attention_sites
from ipa_train.bases.unet import unet_attention_sites, unet_low_rank_sites

SD21_UNET = {
    **SD15_UNET,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
    "cross_attention_dim": 1024,
}
SD35_LARGE = {
    "num_layers": 38,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
    "pos_embed_max_size": 192,
    "qk_norm": "rms_norm",
}
VIT_H = {"pooled": 1024, "penultimate": 1280}
BIG_G = {"pooled": 1280, "penultimate": 1664}
XL_PLUS = {"dim": 1280, "heads": 20}
WIDTHS = {
    "vit_l": {"pooled": 768, "penultimate": 1024},
    "vit_h": VIT_H,
    "big_g": BIG_G,
    "siglip_so400m": {"pooled": 1152, "penultimate": 1152},
    "siglip2_so400m": {"pooled": 1152, "penultimate": 1152},
    "dinov2_large": {"pooled": 1024, "penultimate": 1024},
    "dinov3_large": {"pooled": 1024, "penultimate": 1024},
    "stored": {"pooled": 512},
    "face": {"pooled": 512, "penultimate": 1280},
}
"""Of the features of each image encoder, by its config's name."""


def official_denoiser(base):
    """The model that a base runs, by the base's config; call it on the meta device."""
    assert torch.get_default_device().type == "meta"
    if base.startswith("flux"):
        return FluxTransformer2DModel(num_single_layers=0)  # these take no image tokens
    if base.startswith("sd3"):
        return SD3Transformer2DModel(**{"sd3": SD35_LARGE, "sd35_medium": SD35_MEDIUM}[base])
    return UNet2DConditionModel(**{"sd15": SD15_UNET, "sd21": SD21_UNET, "sdxl": SDXL_UNET}[base])


def official_sites(base, *, lora_rank=0, attention="decoupled"):
    """Where an adapter attaches to a base, and its LoRA; call it on the meta device."""
    model = official_denoiser(base)
    if base.startswith("flux"):
        return flux_attention_sites(model)
    if base.startswith("sd3"):
        return sd3_attention_sites(model)
    sites = unet_attention_sites(model)
    if attention != "decoupled":
        sites = [replace(site, branch=BASELINES[attention]) for site in sites]
    return sites + (unet_low_rank_sites(model, lora_rank) if lora_rank else [])
