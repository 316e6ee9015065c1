"""Frozen text-to-image models behind one contract."""

from ipa_train.bases.base import Base, LatentPosterior, MicroConditioning, TextConditioning
from ipa_train.bases.sd import StableDiffusion

__all__ = ["Base", "LatentPosterior", "MicroConditioning", "StableDiffusion", "TextConditioning"]
