"""Image encoders, and dropping conditions."""

from ipa_train.conditioning.dropout import ConditionDropout, Dropped
from ipa_train.conditioning.image_encoder import CLIPImageEncoder

__all__ = ["CLIPImageEncoder", "ConditionDropout", "Dropped"]
