"""What all encoders that look at pictures share: pixels, normalisation, "no image" and identity."""

from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from ipa_train.adapter.projector import FeatureKind, NullImage
from ipa_train.conditioning.image_encoder import ImageEncoder
from ipa_train.conditioning.pretrained import Pretrained
from ipa_train.errors import ConfigError
from ipa_train.runtime.identity import weights_sha256


class VisionModelEncoder(ImageEncoder):
    """A frozen vision transformer of the transformers library.

    Normalisation is the family's, whatever a ``preprocessor_config.json`` beside the weights says; resizing and
    cropping are done where images are decoded, alike for all families.
    """

    pixel_mean: ClassVar[Sequence[float]]
    pixel_std: ClassVar[Sequence[float]]
    normalisation: ClassVar[str]
    """``pixel_mean`` and ``pixel_std`` in words."""
    image_size: int
    embedding_shape = None
    mean: Tensor
    std: Tensor

    def __init__(self, loaded: Pretrained, *, image_size: int, layer: int) -> None:
        super().__init__()
        model = loaded.model
        count = int(model.config.num_hidden_layers)
        if not -count - 1 <= layer <= -1:
            raise ConfigError(
                f"image_encoder.layer must be from -1, the last of {count} layers, to {-count - 1}, what goes into the "
                f"first one; got {layer}."
            )
        self.model: nn.Module = model.requires_grad_(False)
        self.path, self.subfolder = loaded.path, loaded.subfolder
        self.image_size, self.layer = image_size, layer
        for name, levels in (("mean", self.pixel_mean), ("std", self.pixel_std)):
            self.register_buffer(name, torch.tensor(levels).reshape(1, 3, 1, 1), persistent=False)
        self.eval()
        _ = self._weights_sha256  # of the weights as they are stored, before they are rounded
        self.model.to(loaded.precision)

    @property
    def diffusers_loader(self) -> tuple[str, ...]:
        """Families of bases (unet, flux, sd3) whose ``load_ip_adapter`` can hold this encoder; for most, none."""
        return ()

    @torch.no_grad()
    def encode(
        self,
        image_prompts: UInt8[Tensor, "b c h w"] | None,
        kind: FeatureKind,
        *,
        embeddings: Float[Tensor, "b *s f"] | None = None,
    ) -> Float[Tensor, "b *_"]:
        """Features of RGB 0..255 images: (b, f) pooled or (b, s, f) penultimate.

        Pictures of another size than ``image_size`` square are resized and cropped as CLIP's own processor does it, to
        within 0.25 of 255 levels on average.
        """
        self.feature_dim(kind)
        if image_prompts is None:
            raise ConfigError(
                f"{type(self).__name__} looks at pictures, and none are given: choose data that has them."
            )
        pixels = image_prompts.float()
        if pixels.shape[-2:] != (self.image_size, self.image_size):
            pixels = resize_and_crop(pixels, self.image_size)
        return self._features((pixels / 255.0 - self.mean) / self.std, kind)

    @torch.no_grad()
    def null_features(self, kind: FeatureKind, null: NullImage | None = None) -> Float[Tensor, "1 *s f"]:
        """Features of "no image"."""
        null = null or ("zero_features" if kind == "pooled" else "zero_pixels")
        shape = (1, 3, self.image_size, self.image_size)
        if null == "black_image":
            return self.encode(torch.zeros(shape, dtype=torch.uint8, device=self.mean.device), kind)
        self.feature_dim(kind)
        features = self._features(torch.zeros(shape, device=self.mean.device), kind)
        return torch.zeros_like(features) if null == "zero_features" else features

    @abstractmethod
    def _features(self, pixels: Float[Tensor, "b c h w"], kind: FeatureKind) -> Float[Tensor, "b *_"]:
        """Features of normalised pictures."""

    def identity(self) -> dict[str, Any]:
        """Where it came from, which layer of what it is, what it sees, and a hash of its weights."""
        config: Any = self.model.config
        return {
            "name": Path(self.path).name if Path(self.path).is_dir() else self.path,
            "subfolder": self.subfolder,
            "encoder": type(self).__name__,
            "class": type(self.model).__name__,
            "image_size": self.image_size,
            "preprocessing": f"shortest side bicubic, centre crop, {self.normalisation}",
            "projection_dim": getattr(config, "projection_dim", None),
            "hidden_size": config.hidden_size,
            "layer": self.layer,
            "embedding": None,
            "diffusers_loader": list(self.diffusers_loader),
            "weights_sha256": self._weights_sha256,
        }

    @cached_property
    def _weights_sha256(self) -> str:
        return weights_sha256(self.model)


def resize_and_crop(pixels: Float[Tensor, "b c h w"], size: int) -> Float[Tensor, "b c p q"]:
    """RGB 0..255 pictures with the shorter side at ``size`` (bicubic, antialiased), their centre, rounded to levels."""
    shorter = min(pixels.shape[-2:])
    height, width = (int(size * side / shorter) for side in pixels.shape[-2:])
    resized = F.interpolate(pixels, (height, width), mode="bicubic", antialias=True, align_corners=False)
    top, left = (height - size) // 2, (width - size) // 2
    return resized[..., top : top + size, left : left + size].round().clamp(0.0, 255.0)
