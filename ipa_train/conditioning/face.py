"""A face as two conditions at once, for FaceID-Plus: who it is (stored) and what it looks like (CLIP)."""

from typing import Any

from jaxtyping import Float, UInt8
from torch import Tensor

from ipa_train.adapter.projector import FeatureKind, NullImage
from ipa_train.conditioning.clip import CLIPImageEncoder
from ipa_train.conditioning.image_encoder import ImageEncoder
from ipa_train.conditioning.stored import StoredEmbeddings


class FaceImageEncoder(ImageEncoder):
    """Pooled features are the stored identity embedding, penultimate features CLIP's hidden states of the picture."""

    image_size: int
    embedding_shape: tuple[int, ...]

    def __init__(self, *, stored: StoredEmbeddings, clip: CLIPImageEncoder) -> None:
        super().__init__()
        self.stored, self.clip = stored, clip
        self.image_size, self.embedding_shape = clip.image_size, stored.embedding_shape
        self.eval()

    @classmethod
    def from_pretrained(
        cls,
        path: str,
        *,
        subfolder: str = "",
        dtype: str = "bfloat16",
        revision: str | None = None,
        dim: int = 512,
        name: str = "arcface",
        normalize: bool = False,
    ) -> "FaceImageEncoder":
        """Load the CLIP model from a local folder or hub id; the rest describes the stored embedding.

        Raises:
            ConfigError: as CLIPImageEncoder and StoredEmbeddings.
        """
        return cls(
            stored=StoredEmbeddings(dim=dim, name=name, normalize=normalize),
            clip=CLIPImageEncoder.from_pretrained(path, subfolder=subfolder, dtype=dtype, revision=revision),
        )

    def feature_dim(self, kind: FeatureKind) -> int:
        """Width of the identity embedding (pooled) or of CLIP's hidden states."""
        return self._part(kind).feature_dim(kind)

    def encode(
        self,
        image_prompts: UInt8[Tensor, "b c h w"] | None,
        kind: FeatureKind,
        *,
        embeddings: Float[Tensor, "b *s f"] | None = None,
    ) -> Float[Tensor, "b *_"]:
        """Features of one of the two."""
        return self._part(kind).encode(image_prompts, kind, embeddings=embeddings)

    def null_features(self, kind: FeatureKind, null: NullImage | None = None) -> Float[Tensor, "1 *s f"]:
        """Features of "no image" of one of the two."""
        return self._part(kind).null_features(kind, null)

    def identity(self) -> dict[str, Any]:
        """CLIP's, with what is stored; no loader computes the stored half from a picture."""
        embedding = self.stored.identity()["embedding"]
        return self.clip.identity() | {
            "encoder": type(self).__name__,
            "embedding": embedding,
            "diffusers_loader": [],
        }

    def _part(self, kind: FeatureKind) -> ImageEncoder:
        return self.stored if kind == "pooled" else self.clip
