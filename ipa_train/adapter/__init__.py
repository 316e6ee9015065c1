"""The trainable part, in pure torch: projectors, image attention, and the adapter that joins them."""

from ipa_train.adapter.adapter import IPAdapter
from ipa_train.adapter.face import FacePlusProjector, FaceProjector
from ipa_train.adapter.projector import LinearProjector, MLPProjector, Projector, Resampler
from ipa_train.adapter.sites import AttentionSite, ImageBranch
from ipa_train.adapter.time_resampler import TimeResampler
from ipa_train.adapter.tokens import ImageTokens

__all__ = [
    "AttentionSite",
    "FacePlusProjector",
    "FaceProjector",
    "IPAdapter",
    "ImageBranch",
    "ImageTokens",
    "LinearProjector",
    "MLPProjector",
    "Projector",
    "Resampler",
    "TimeResampler",
]
