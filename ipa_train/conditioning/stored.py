"""Embeddings that were computed before: of faces, colour palettes, sounds, or whatever a sample's KEY.npy holds."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from ipa_train.adapter.projector import FeatureKind, NullImage
from ipa_train.conditioning.image_encoder import ImageEncoder
from ipa_train.errors import ConfigError


class StoredEmbeddings(ImageEncoder):
    """Passes the sample's embedding on: (dim,) as pooled, or (num_tokens, dim) as penultimate features.

    ``name`` says what made them; it is all that an export can be compared by. ``normalize`` scales each vector to unit
    length, as FaceID adapters have it (insightface's ``normed_embedding``). "No image" is zeros.
    """

    image_size = None
    embedding_shape: tuple[int, ...]
    zeros: Tensor

    def __init__(
        self, *, dim: int = 512, num_tokens: int | None = None, name: str = "arcface", normalize: bool = False
    ) -> None:
        super().__init__()
        for option, size in (("dim", dim), ("num_tokens", num_tokens)):
            if size is not None and size < 1:
                raise ConfigError(f"image_encoder.{option} must be at least 1, got {size}.")
        if not name:
            raise ConfigError("image_encoder.name is empty: say what made the embeddings, e.g. arcface.")
        self.name, self.normalize = name, normalize
        self.kind: FeatureKind = "pooled" if num_tokens is None else "penultimate"
        self.embedding_shape = (dim,) if num_tokens is None else (num_tokens, dim)
        self.register_buffer("zeros", torch.zeros(1, *self.embedding_shape), persistent=False)
        self.eval()

    def feature_dim(self, kind: FeatureKind) -> int:
        """Width of the embedding."""
        if kind != self.kind:
            has, needs = ("one vector", "a sequence") if self.kind == "pooled" else ("a sequence", "one vector")
            cure = "set num_tokens to its length" if self.kind == "pooled" else "set num_tokens=null"
            raise ConfigError(
                f"image_encoder: the stored embedding {self.name!r} is {has} of width {self.embedding_shape[-1]}, and "
                f"this adapter reads {needs} ({kind} features): choose another adapter, or {cure}."
            )
        return self.embedding_shape[-1]

    def encode(
        self,
        image_prompts: UInt8[Tensor, "b c h w"] | None,
        kind: FeatureKind,
        *,
        embeddings: Float[Tensor, "b *s f"] | None = None,
    ) -> Float[Tensor, "b *_"]:
        """The embeddings in fp32, and at unit length if so asked; pictures are not looked at."""
        self.feature_dim(kind)
        got = None if embeddings is None else tuple(embeddings.shape[1:])
        if embeddings is None or got != self.embedding_shape:
            raise ConfigError(
                f"the stored embedding {self.name!r} must have shape {self.embedding_shape} in every sample (KEY.npy), "
                f"got {'none' if got is None else got}."
            )
        return F.normalize(embeddings.float(), dim=-1) if self.normalize else embeddings.float()

    def null_features(self, kind: FeatureKind, null: NullImage | None = None) -> Float[Tensor, "1 *s f"]:
        """Zeros, whatever ``null`` is: there is no picture that could be grey or black."""
        self.feature_dim(kind)
        return self.zeros.clone()

    def identity(self) -> dict[str, Any]:
        """Its name and sizes; there are no weights to hash."""
        embedding = {"name": self.name, "shape": list(self.embedding_shape), "normalize": self.normalize}
        return {
            "name": self.name,
            "encoder": type(self).__name__,
            "class": None,
            "image_size": None,
            "preprocessing": None,
            "layer": None,
            "embedding": embedding,
            "diffusers_loader": [],
            "weights_sha256": None,
        }
