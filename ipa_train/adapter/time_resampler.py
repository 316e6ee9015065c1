"""The resampler of SD 3 adapters, which knows the timestep: coarse content early, detail late.

Layout of the file InstantX/SD3.5-Large-IP-Adapter, as diffusers reads it (``IPAdapterTimeImageProjection``).
"""

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Num
from torch import Tensor, nn

from ipa_train.adapter.projector import Resampler, ResamplerLayer
from ipa_train.adapter.tokens import ImageTokens
from ipa_train.errors import ConfigError


class TimeEmbedding(nn.Module):
    """Timesteps 0 to 1000 -> vectors of width ``dim``: sinusoids (cosines first), then an MLP."""

    num_sinusoids: ClassVar[int] = 320

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(self.num_sinusoids, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, timesteps: Num[Tensor, "b"]) -> Float[Tensor, "b t"]:
        """Embed the timesteps in fp32."""
        half = self.num_sinusoids // 2
        frequencies = torch.exp(-math.log(10_000) * torch.arange(half, device=timesteps.device) / half)
        angles = timesteps.float()[:, None] * frequencies
        return self.linear_2(F.silu(self.linear_1(torch.cat([angles.cos(), angles.sin()], dim=-1))))


class TimeResamplerLayer(ResamplerLayer):
    """A resampler layer whose two normalised inputs are shifted and scaled by the timestep (adaptive LayerNorm)."""

    def __init__(self, *, dim: int, heads: int, dim_head: int, ff_mult: int) -> None:
        super().__init__(dim=dim, heads=heads, dim_head=dim_head, ff_mult=ff_mult)
        self.modulation = nn.Linear(dim, 4 * dim)
        # As in DiT (arXiv 2212.09748): starts as the plain layer, and learns what the timestep is good for.
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(  # type: ignore[override]
        self, features: Float[Tensor, "b s d"], latents: Float[Tensor, "b n d"], time_embedding: Float[Tensor, "b d"]
    ) -> Float[Tensor, "b n d"]:
        """Return the refined latents."""
        shift, scale, shift_ff, scale_ff = self.modulation(F.silu(time_embedding))[:, None].chunk(4, dim=-1)
        latents = latents + self.attend(features, self.norm_latents(latents) * (1 + scale) + shift)
        return latents + self.feed_forward(self.norm_ff(latents) * (1 + scale_ff) + shift_ff)


class TimeResampler(Resampler):
    """Resampler of SD 3: (b, s, feature_dim) and timesteps -> (b, num_tokens, context_dim).

    The defaults are the released sizes. Depth, dim_head and ff_mult are fixed as in :class:`Resampler`.
    """

    variant = "time_resampler"
    layer_class: ClassVar[type[ResamplerLayer]] = TimeResamplerLayer

    def __init__(
        self, *, feature_dim: int, context_dim: int, num_tokens: int = 64, dim: int = 1280, heads: int = 20
    ) -> None:
        super().__init__(feature_dim=feature_dim, context_dim=context_dim, num_tokens=num_tokens, dim=dim, heads=heads)
        self.time_embedding = TimeEmbedding(dim)
        # Tokens start apart from each other: at the resampler's usual 1 / sqrt(dim) what they share drowns what they do
        # not (cosine 0.99 at the released sizes, against 0.2), and the image attention's start needs different keys.
        nn.init.normal_(self.latents)

    @property
    def time_dim(self) -> int:
        """Width of the time embedding."""
        return self.time_embedding.linear_2.out_features

    def tokens(self, *image_features: Float[Tensor, "b s f"], timesteps: Num[Tensor, "b"] | None) -> ImageTokens:
        """The image tokens for a denoiser at ``timesteps`` (0 to 1000).

        Raises:
            ConfigError: no timesteps given.
        """
        if timesteps is None:
            raise ConfigError("adapter: a time resampler makes other tokens at each timestep: give it `timesteps=`.")
        (features,) = image_features
        embedding = self.time_embedding(timesteps)
        projected = self.proj_in(features.float()) + embedding[:, None]
        return ImageTokens(self.resample(projected, embedding), embedding)

    def forward(
        self, image_features: Float[Tensor, "b s f"], timesteps: Num[Tensor, "b"] | None = None
    ) -> Float[Tensor, "b n d"]:
        """The states of :meth:`tokens` alone."""
        return self.tokens(image_features, timesteps=timesteps).states
