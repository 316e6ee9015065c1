"""CLIP vision models: ViT-L/14, and OpenCLIP's ViT-H/14 and bigG/14 of the released adapters."""

from typing import cast

from jaxtyping import Float
from torch import Tensor
from transformers import CLIPVisionModelWithProjection
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from ipa_train.adapter.projector import FeatureKind
from ipa_train.conditioning.pretrained import load_vision_model
from ipa_train.conditioning.vision_model import VisionModelEncoder

_CLASSES = {"clip_vision_model": CLIPVisionModelWithProjection, "clip": CLIPVisionModelWithProjection}


class CLIPImageEncoder(VisionModelEncoder):
    """A frozen CLIP vision model, read as diffusers reads it at inference: layer -2, and CLIP's own normalisation."""

    pixel_mean, pixel_std, normalisation = OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, "CLIP mean and std"
    model: CLIPVisionModelWithProjection

    @classmethod
    def from_pretrained(
        cls, path: str, *, subfolder: str = "", dtype: str = "bfloat16", revision: str | None = None
    ) -> "CLIPImageEncoder":
        """Load from a local folder or hub id: a vision model with a projection, or a whole CLIP.

        Raises:
            ConfigError: nothing there to load, or not a CLIP vision model with a projection.
        """
        loaded = load_vision_model(path, _CLASSES, subfolder=subfolder, revision=revision, dtype=dtype)
        return cls(loaded, image_size=loaded.model.config.image_size, layer=-2)

    @property
    def diffusers_loader(self) -> tuple[str, ...]:
        """The loaders of UNets and of Flux make a CLIPVisionModelWithProjection."""
        return "unet", "flux"

    def feature_dim(self, kind: FeatureKind) -> int:
        """Width of the projection (pooled) or of the hidden states."""
        config = self.model.config
        return int(config.projection_dim if kind == "pooled" else config.hidden_size)

    def _features(self, pixels: Float[Tensor, "b c h w"], kind: FeatureKind) -> Float[Tensor, "b *_"]:
        pixels = pixels.to(self.model.dtype)
        if kind == "pooled":
            return cast(Tensor, self.model(pixels).image_embeds)
        return cast(Tensor, self.model(pixels, output_hidden_states=True).hidden_states[self.layer])
