"""Projectors of the face adapters: the embedding of a face recognition model -> image tokens.

Layouts and sizes are those of the files of h94/IP-Adapter-FaceID. Like all projectors they run in fp32.
"""

from typing import ClassVar

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ipa_train.adapter.projector import FeatureKind, Projector, Resampler, ResamplerLayer
from ipa_train.errors import ConfigError


class FaceProjector(Projector):
    """A two-layer MLP and a LayerNorm on one embedding per face: (b, feature_dim) -> (b, num_tokens, context_dim).

    FaceID has 4 tokens, FaceID-Portrait 16.
    """

    variant = "faceid"
    feature_kinds: ClassVar[tuple[FeatureKind, ...]] = ("pooled",)

    def __init__(self, *, feature_dim: int, context_dim: int, num_tokens: int = 4) -> None:
        super().__init__(feature_dim=feature_dim, context_dim=context_dim)
        if num_tokens < 1:
            raise ConfigError(f"adapter.projector.num_tokens must be at least 1, got {num_tokens}.")
        self.num_tokens = num_tokens
        self.hidden = nn.Linear(feature_dim, 2 * feature_dim)
        self.proj = nn.Linear(2 * feature_dim, num_tokens * context_dim)
        self.norm = nn.LayerNorm(context_dim)

    def forward(self, image_features: Float[Tensor, "b f"]) -> Float[Tensor, "b n d"]:
        """Project one embedding per face to ``num_tokens`` tokens."""
        tokens = self.proj(F.gelu(self.hidden(image_features.float())))
        return self.norm(tokens.unflatten(-1, (self.num_tokens, self.context_dim)))


class FacePlusProjector(Projector):
    """The tokens of a face embedding look at CLIP's hidden states of the face through a resampler (FaceID-Plus).

    ``feature_dim`` is the width of the face embedding, ``hidden_dim`` that of the hidden states. With ``shortcut``
    (V2) the result is added to the tokens of the embedding alone; the weights have the same names and shapes in both,
    so a file does not tell, and whoever loads it must set the same. Loaders know 4 tokens only.
    """

    variant = "faceid_plus"
    feature_kinds: ClassVar[tuple[FeatureKind, ...]] = ("pooled", "penultimate")
    num_tokens: ClassVar[int] = 4

    def __init__(self, *, feature_dim: int, hidden_dim: int, context_dim: int, shortcut: bool = False) -> None:
        super().__init__(feature_dim=feature_dim, context_dim=context_dim)
        if hidden_dim < 1:
            raise ConfigError(f"adapter: hidden_dim must be at least 1, got {hidden_dim}.")
        self.hidden_dim, self.shortcut = hidden_dim, shortcut
        self.identity = FaceProjector(feature_dim=feature_dim, context_dim=context_dim, num_tokens=self.num_tokens)
        self.proj_in = nn.Linear(hidden_dim, context_dim)
        heads = max(1, context_dim // Resampler.dim_head)
        self.layers = nn.ModuleList(
            ResamplerLayer(dim=context_dim, heads=heads, dim_head=Resampler.dim_head, ff_mult=Resampler.ff_mult)
            for _ in range(Resampler.depth)
        )
        self.proj_out = nn.Linear(context_dim, context_dim)
        self.norm_out = nn.LayerNorm(context_dim)

    def forward(
        self, face_features: Float[Tensor, "b f"], hidden_states: Float[Tensor, "b s h"]
    ) -> Float[Tensor, "b n d"]:
        """Refine the tokens of one embedding per face by the hidden states of its picture."""
        identity = latents = self.identity(face_features)
        features = self.proj_in(hidden_states.float())
        for layer in self.layers:
            latents = layer(features, latents)
        tokens = self.norm_out(self.proj_out(latents))
        return identity + tokens if self.shortcut else tokens
