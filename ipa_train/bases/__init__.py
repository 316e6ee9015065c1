"""Frozen text-to-image models behind one contract."""

from ipa_train.bases.adapter_sites import adapter_sites
from ipa_train.bases.base import Base, MicroConditioning, TextConditioning
from ipa_train.bases.families import load_base
from ipa_train.bases.flux import Flux
from ipa_train.bases.sd import StableDiffusion
from ipa_train.bases.sd3 import StableDiffusion3
from ipa_train.bases.sdxl import StableDiffusionXL
from ipa_train.bases.unet import UNetBase
from ipa_train.bases.vae import FrozenVAE, LatentPosterior

__all__ = [
    "Base",
    "Flux",
    "FrozenVAE",
    "LatentPosterior",
    "MicroConditioning",
    "StableDiffusion",
    "StableDiffusion3",
    "StableDiffusionXL",
    "TextConditioning",
    "UNetBase",
    "adapter_sites",
    "load_base",
]
