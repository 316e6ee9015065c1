"""Image encoders behind one call: image prompts or stored embeddings -> image features, and those of "no image"."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from ipa_train.adapter.projector import FeatureKind, NullImage


class ImageEncoder(nn.Module, ABC):
    """What makes the features that a projector reads. Frozen, and in eval mode whatever is asked of it."""

    image_size: int | None
    """Side in pixels of the square it sees; None if it looks at no picture."""
    embedding_shape: tuple[int, ...] | None
    """Shape of the embedding that each sample must hold (KEY.npy); None if it needs none."""

    @abstractmethod
    def feature_dim(self, kind: FeatureKind) -> int:
        """Width of the features of this kind.

        Raises:
            ConfigError: it has no features of this kind.
        """

    @abstractmethod
    def encode(
        self,
        image_prompts: UInt8[Tensor, "b c h w"] | None,
        kind: FeatureKind,
        *,
        embeddings: Float[Tensor, "b *s f"] | None = None,
    ) -> Float[Tensor, "b *_"]:
        """Features of RGB 0..255 pictures, or of stored embeddings: (b, f) pooled or (b, s, f) penultimate.

        Raises:
            ConfigError: no features of this kind, or what they are made from is not given.
        """

    def features(
        self,
        image_prompts: UInt8[Tensor, "b c h w"] | None,
        kinds: Sequence[FeatureKind],
        *,
        embeddings: Float[Tensor, "b *s f"] | None = None,
    ) -> tuple[Float[Tensor, "b *_"], ...]:
        """Features of each kind, as :meth:`encode` gives them."""
        return tuple(self.encode(image_prompts, kind, embeddings=embeddings) for kind in kinds)

    @abstractmethod
    def null_features(self, kind: FeatureKind, null: NullImage | None = None) -> Float[Tensor, "1 *s f"]:
        """Features of "no image"; by default those of diffusers' UNet pipelines.

        These are ``zero_features`` for pooled and ``zero_pixels`` for penultimate features.

        Raises:
            ConfigError: no features of this kind.
        """

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What an export says of it, in plain values that JSON holds: see ``docs/encoders.md``."""

    @property
    def dtype(self) -> torch.dtype:
        """Precision it runs in; fp32 where it has no weights."""
        return next((weight.dtype for weight in self.parameters()), torch.float32)

    def train(self, mode: bool = True) -> "ImageEncoder":
        """Stay in eval mode: the encoder is frozen."""
        return super().train(False)
