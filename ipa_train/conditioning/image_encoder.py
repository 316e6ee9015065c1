"""Image encoders behind one call: RGB image prompts -> image features, and the features of "no image"."""

from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from transformers import AutoConfig, CLIPVisionModelWithProjection
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from ipa_train.adapter.projector import FeatureKind, NullImage
from ipa_train.errors import ConfigError
from ipa_train.runtime.identity import weights_sha256
from ipa_train.runtime.precision import to_dtype


class CLIPImageEncoder(nn.Module):
    """A frozen CLIP vision model, read as diffusers reads it at inference.

    Normalisation is CLIP's, whatever a ``preprocessor_config.json`` beside the weights says, since
    ``load_ip_adapter`` does not read that file either; resizing and cropping are done where images are decoded.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: CLIPVisionModelWithProjection, *, path: str) -> None:
        super().__init__()
        self.model = model.requires_grad_(False)
        self.path = path
        self.image_size: int = model.config.image_size
        self.register_buffer("mean", torch.tensor(OPENAI_CLIP_MEAN).reshape(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(OPENAI_CLIP_STD).reshape(1, 3, 1, 1), persistent=False)
        self.eval()

    @classmethod
    def from_pretrained(
        cls, path: str, *, subfolder: str = "", dtype: str = "bfloat16", revision: str | None = None
    ) -> "CLIPImageEncoder":
        """Load from a local folder or hub id.

        Raises:
            ConfigError: nothing there to load, or not a CLIP vision model with a projection.
        """
        where = f"image_encoder.path={path}" + (f" (subfolder {subfolder})" if subfolder else "")
        precision = to_dtype(dtype, option="image_encoder.dtype")
        try:
            config = AutoConfig.from_pretrained(path, subfolder=subfolder, revision=revision)
            if config.model_type not in ("clip_vision_model", "clip"):
                raise ConfigError(
                    f"{where}: this is a {config.model_type!r} model; give a folder with a CLIP vision model "
                    "(config.json with model_type clip_vision_model), e.g. models/image_encoder of h94/IP-Adapter."
                )
            if config.model_type == "clip_vision_model" and "WithProjection" not in str(config.architectures):
                raise ConfigError(
                    f"{where}: {config.architectures} has no projection, so it gives no pooled embedding and diffusers "
                    "cannot load it as an image encoder; give a CLIPVisionModelWithProjection."
                )
            model, report = CLIPVisionModelWithProjection.from_pretrained(
                path, subfolder=subfolder, dtype="auto", revision=revision, output_loading_info=True
            )
        except (OSError, ValueError, KeyError) as error:
            if isinstance(error, ConfigError):
                raise
            reason = str(error).strip().splitlines()[0]
            raise ConfigError(
                f"{where}: cannot load an image encoder: {reason} Give a folder that holds config.json and "
                "model.safetensors of a CLIP vision model, or its hub id."
            ) from error
        if report["missing_keys"]:
            some = ", ".join(sorted(report["missing_keys"])[:3])
            raise ConfigError(f"{where}: {len(report['missing_keys'])} weights are missing, e.g. {some}.")
        encoder = cls(model, path=str(path))
        _ = encoder._weights_sha256  # of the weights as they are stored, before they are rounded
        encoder.model.to(precision)
        return encoder

    def feature_dim(self, kind: FeatureKind) -> int:
        """Width of the features of this kind."""
        config = self.model.config
        return int(config.projection_dim if kind == "pooled" else config.hidden_size)

    @torch.no_grad()
    def encode(self, image_prompts: UInt8[Tensor, "b c h w"], kind: FeatureKind) -> Float[Tensor, "b *s f"]:
        """Features of RGB 0..255 images: (b, f) pooled or (b, s, f) penultimate.

        Pictures of another size than ``image_size`` square are resized and cropped as CLIP's own processor does it, to
        within 0.2 of 255 levels on average.
        """
        pixels = image_prompts.float()
        if pixels.shape[-2:] != (self.image_size, self.image_size):
            pixels = resize_and_crop(pixels, self.image_size)
        return self._features((pixels / 255.0 - self.mean) / self.std, kind)

    @torch.no_grad()
    def null_features(self, kind: FeatureKind, null: NullImage | None = None) -> Float[Tensor, "1 *s f"]:
        """Features of "no image"; by default as diffusers has them at inference in UNets."""
        null = null or ("zero_features" if kind == "pooled" else "zero_pixels")
        pixels = torch.zeros(1, 3, self.image_size, self.image_size, device=self.mean.device)
        if null == "black_image":
            pixels = (pixels - self.mean) / self.std
        features = self._features(pixels, kind)
        return torch.zeros_like(features) if null == "zero_features" else features

    def _features(self, pixels: Float[Tensor, "b c h w"], kind: FeatureKind) -> Float[Tensor, "b *s f"]:
        pixels = pixels.to(self.model.dtype)
        if kind == "pooled":
            return cast(Tensor, self.model(pixels).image_embeds)
        return cast(Tensor, self.model(pixels, output_hidden_states=True).hidden_states[-2])

    def identity(self) -> dict[str, Any]:
        """What an export says about its encoder: where it came from, sizes, preprocessing, hash of the weights."""
        name = Path(self.path).name if Path(self.path).is_dir() else self.path
        return {
            "name": name,
            "image_size": self.image_size,
            "preprocessing": "shortest side bicubic, centre crop, CLIP mean and std",
            "projection_dim": self.model.config.projection_dim,
            "hidden_size": self.model.config.hidden_size,
            "weights_sha256": self._weights_sha256,
        }

    @cached_property
    def _weights_sha256(self) -> str:
        return weights_sha256(self.model)

    def train(self, mode: bool = True) -> "CLIPImageEncoder":
        """Stay in eval mode: the encoder is frozen."""
        return super().train(False)


def resize_and_crop(pixels: Float[Tensor, "b c h w"], size: int) -> Float[Tensor, "b c p q"]:
    """The centre square of RGB 0..255 pictures, resized to ``size`` (bicubic, antialiased) and rounded to levels."""
    height, width = pixels.shape[-2:]
    edge = min(height, width)
    top, left = (height - edge) // 2, (width - edge) // 2
    square = pixels[..., top : top + edge, left : left + edge]
    resized = F.interpolate(square, (size, size), mode="bicubic", antialias=True, align_corners=False)
    return resized.round().clamp(0.0, 255.0)
