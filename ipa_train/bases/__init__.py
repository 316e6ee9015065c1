"""Frozen text-to-image models behind one contract."""

from ipa_train.bases.base import Base, MicroConditioning, TextConditioning
from ipa_train.bases.families import load_base
from ipa_train.bases.sd import StableDiffusion
from ipa_train.bases.sdxl import StableDiffusionXL
from ipa_train.bases.vae import FrozenVAE, LatentPosterior

__all__ = [
    "Base",
    "FrozenVAE",
    "LatentPosterior",
    "MicroConditioning",
    "StableDiffusion",
    "StableDiffusionXL",
    "TextConditioning",
    "load_base",
]
