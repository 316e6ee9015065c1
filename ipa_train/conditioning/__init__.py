"""Image encoders, and dropping conditions."""

from ipa_train.conditioning.clip import CLIPImageEncoder
from ipa_train.conditioning.dino import DinoImageEncoder
from ipa_train.conditioning.dropout import ConditionDropout, Dropped
from ipa_train.conditioning.face import FaceImageEncoder
from ipa_train.conditioning.image_encoder import ImageEncoder
from ipa_train.conditioning.siglip import SiglipImageEncoder
from ipa_train.conditioning.stored import StoredEmbeddings

__all__ = [
    "CLIPImageEncoder",
    "ConditionDropout",
    "DinoImageEncoder",
    "Dropped",
    "FaceImageEncoder",
    "ImageEncoder",
    "SiglipImageEncoder",
    "StoredEmbeddings",
]
