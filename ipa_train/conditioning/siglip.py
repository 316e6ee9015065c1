"""SigLIP and SigLIP 2 vision models."""

from math import isqrt
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import Siglip2VisionModel, SiglipVisionModel

from ipa_train.adapter.projector import FeatureKind
from ipa_train.conditioning.pretrained import load_vision_model
from ipa_train.conditioning.vision_model import VisionModelEncoder
from ipa_train.errors import ConfigError

_CLASSES = {
    "siglip_vision_model": SiglipVisionModel,
    "siglip": SiglipVisionModel,
    "siglip2_vision_model": Siglip2VisionModel,
    "siglip2": Siglip2VisionModel,
}


class SiglipImageEncoder(VisionModelEncoder):
    """A frozen SigLIP vision model; pooled features are those of its attention-pooling head.

    Published SigLIP 2 models of one fixed size are of the first class (model_type siglip); Siglip2VisionModel is that
    of the NaFlex models, which take any grid of patches and are given the largest square one they were made for.
    """

    pixel_mean, pixel_std, normalisation = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "mean and std 0.5"
    model: SiglipVisionModel | Siglip2VisionModel

    @classmethod
    def from_pretrained(
        cls, path: str, *, subfolder: str = "", dtype: str = "bfloat16", revision: str | None = None, layer: int = -2
    ) -> "SiglipImageEncoder":
        """Load from a local folder or hub id: a vision model, or a whole SigLIP.

        Raises:
            ConfigError: nothing there to load, no SigLIP, or no such layer.
        """
        loaded = load_vision_model(path, _CLASSES, subfolder=subfolder, revision=revision, dtype=dtype)
        return cls(loaded, image_size=_image_size(loaded.model.config), layer=layer)

    @property
    def diffusers_loader(self) -> tuple[str, ...]:
        """SD 3's loader makes a SiglipVisionModel and reads layer -2, and neither of them differently."""
        return ("sd3",) if isinstance(self.model, SiglipVisionModel) and self.layer == -2 else ()

    def feature_dim(self, kind: FeatureKind) -> int:
        """Width of the hidden states; that of the head is the same."""
        if kind == "pooled" and not self.model.config.vision_use_head:
            raise ConfigError(
                f"image_encoder.path={self.path}: this SigLIP has no pooling head, so it gives no pooled features; "
                "choose an adapter that reads hidden states, such as adapter=plus."
            )
        return int(self.model.config.hidden_size)

    def _features(self, pixels: Float[Tensor, "b c h w"], kind: FeatureKind) -> Float[Tensor, "b *_"]:
        inputs: dict[str, Any] = {"pixel_values": pixels.to(self.model.dtype)}
        if isinstance(self.model, Siglip2VisionModel):
            inputs = _patches(inputs["pixel_values"], self.model.config.patch_size)
        output = self.model(**inputs, output_hidden_states=kind == "penultimate")
        return cast(Tensor, output.pooler_output if kind == "pooled" else output.hidden_states[self.layer])


def _image_size(config: Any) -> int:
    if hasattr(config, "num_patches"):
        return isqrt(config.num_patches) * int(config.patch_size)
    return int(config.image_size)


def _patches(pixels: Float[Tensor, "b c h w"], size: int) -> dict[str, Tensor]:
    """The pictures as NaFlex models take them: flat patches, row by row, none of them padding."""
    (count, _, height, width), device = pixels.shape, pixels.device
    grid = (height // size, width // size)
    patches = pixels.reshape(count, -1, grid[0], size, grid[1], size).permute(0, 2, 4, 3, 5, 1)
    return {
        "pixel_values": patches.flatten(3).flatten(1, 2),
        "pixel_attention_mask": torch.ones(count, grid[0] * grid[1], dtype=torch.int64, device=device),
        "spatial_shapes": torch.tensor([grid] * count, device=device),
    }
