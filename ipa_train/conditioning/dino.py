"""DINOv2 (with and without registers) and DINOv3 vision transformers; diffusers' loader holds none of them."""

from typing import cast

from jaxtyping import Float
from torch import Tensor
from transformers import Dinov2Model, Dinov2WithRegistersModel, DINOv3ViTModel
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from ipa_train.adapter.projector import FeatureKind
from ipa_train.conditioning.pretrained import load_vision_model
from ipa_train.conditioning.vision_model import VisionModelEncoder
from ipa_train.errors import ConfigError

_CLASSES = {
    "dinov2": Dinov2Model,
    "dinov2_with_registers": Dinov2WithRegistersModel,
    "dinov3_vit": DINOv3ViTModel,
}


class DinoImageEncoder(VisionModelEncoder):
    """A frozen DINO: pooled is the class token after the last norm; hidden states are class, registers, patches."""

    pixel_mean, pixel_std, normalisation = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, "ImageNet mean and std"
    model: Dinov2Model | Dinov2WithRegistersModel | DINOv3ViTModel

    @classmethod
    def from_pretrained(
        cls,
        path: str,
        *,
        subfolder: str = "",
        dtype: str = "bfloat16",
        revision: str | None = None,
        layer: int = -2,
        image_size: int = 224,
    ) -> "DinoImageEncoder":
        """Load from a local folder or hub id; ``image_size`` is free, since positions are interpolated.

        Raises:
            ConfigError: nothing there to load, no DINO, no such layer, or an ``image_size`` that is not whole patches.
        """
        loaded = load_vision_model(path, _CLASSES, subfolder=subfolder, revision=revision, dtype=dtype)
        patch_size = loaded.model.config.patch_size
        if image_size < 1 or image_size % patch_size:
            raise ConfigError(
                f"image_encoder.image_size={image_size} must be a multiple of {patch_size}, the patch size of {path}."
            )
        return cls(loaded, image_size=image_size, layer=layer)

    def feature_dim(self, kind: FeatureKind) -> int:
        """Width of the hidden states, the class token among them."""
        return int(self.model.config.hidden_size)

    def _features(self, pixels: Float[Tensor, "b c h w"], kind: FeatureKind) -> Float[Tensor, "b *_"]:
        output = self.model(pixels.to(self.model.dtype), output_hidden_states=kind == "penultimate")
        return cast(Tensor, output.pooler_output if kind == "pooled" else output.hidden_states[self.layer])
