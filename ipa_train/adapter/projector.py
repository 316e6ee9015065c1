"""Projectors: image features -> image tokens in the width of the text tokens.

Three released variants (layouts and sizes in arXiv 2308.06721 and the files of h94/IP-Adapter): linear ("base", one
pooled embedding -> 4 tokens), resampler ("plus", 257 hidden states -> 16 tokens) and MLP ("full", one token for each
hidden state). They run in fp32: activations of up to 12,000 in the resampler overflow fp16 (IP-Adapter issue 434), and
their cost is below 1 % of a training step.
"""

from typing import ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Num
from torch import Tensor, nn

from ipa_train.adapter.heads import merge_heads, split_heads
from ipa_train.adapter.tokens import ImageTokens
from ipa_train.errors import ConfigError

FeatureKind = Literal["pooled", "penultimate"]
"""``pooled``: one projected embedding per image. ``penultimate``: the hidden states before the encoder's last layer."""

NullImage = Literal["zero_features", "zero_pixels", "black_image"]
"""What stands for "no image"; every loader has its own at inference, and training must have that one.

``zero_features``: zeros in place of the features (pooled features in UNets, any in SD 3). ``zero_pixels``: an all-zero
*normalised* picture, mean grey, encoded (penultimate features in UNets). ``black_image``: a black RGB picture,
normalised and encoded as any other (Flux; and ComfyUI for penultimate features).
"""


class Projector(nn.Module):
    """What all projectors share: which features they read, how many tokens they give, and their sizes."""

    variant: ClassVar[str]
    feature_kinds: ClassVar[tuple[FeatureKind, ...]]
    """The image features that ``forward`` takes, in its order."""

    def __init__(self, *, feature_dim: int, context_dim: int) -> None:
        super().__init__()
        for name, size in (("feature_dim", feature_dim), ("context_dim", context_dim)):
            if size < 1:
                raise ConfigError(f"adapter: {name} must be at least 1, got {size}.")
        self.feature_dim = feature_dim
        self.context_dim = context_dim

    def tokens(self, *image_features: Float[Tensor, "b *_"], timesteps: Num[Tensor, "b"] | None) -> ImageTokens:
        """The image tokens of a batch; most projectors make the same of a picture at every timestep."""
        return ImageTokens(cast(Tensor, self(*image_features)))


class LinearProjector(Projector):
    """One linear layer and a LayerNorm: (b, feature_dim) -> (b, num_tokens, context_dim)."""

    variant = "linear"
    feature_kinds: ClassVar[tuple[FeatureKind, ...]] = ("pooled",)

    def __init__(self, *, feature_dim: int, context_dim: int, num_tokens: int = 4) -> None:
        super().__init__(feature_dim=feature_dim, context_dim=context_dim)
        if num_tokens < 1:
            raise ConfigError(f"adapter.projector.num_tokens must be at least 1, got {num_tokens}.")
        self.num_tokens = num_tokens
        self.proj = nn.Linear(feature_dim, num_tokens * context_dim)
        self.norm = nn.LayerNorm(context_dim)

    def forward(self, image_features: Float[Tensor, "b f"]) -> Float[Tensor, "b n d"]:
        """Project one embedding per image to ``num_tokens`` tokens."""
        return self.norm(self.proj(image_features.float()).unflatten(-1, (self.num_tokens, self.context_dim)))


class MLPProjector(Projector):
    """A two-layer MLP on every hidden state: (b, s, feature_dim) -> (b, s, context_dim)."""

    variant = "full"
    feature_kinds: ClassVar[tuple[FeatureKind, ...]] = ("penultimate",)

    def __init__(self, *, feature_dim: int, context_dim: int) -> None:
        super().__init__(feature_dim=feature_dim, context_dim=context_dim)
        self.hidden = nn.Linear(feature_dim, feature_dim)
        self.proj = nn.Linear(feature_dim, context_dim)
        self.norm = nn.LayerNorm(context_dim)

    def forward(self, image_features: Float[Tensor, "b s f"]) -> Float[Tensor, "b s d"]:
        """Project each hidden state to one token."""
        return self.norm(self.proj(F.gelu(self.hidden(image_features.float()))))


class ResamplerLayer(nn.Module):
    """Learned queries attend to the features and to themselves, then a feed-forward layer; no biases."""

    def __init__(self, *, dim: int, heads: int, dim_head: int, ff_mult: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_features = nn.LayerNorm(dim)
        self.norm_latents = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_kv = nn.Linear(dim, 2 * heads * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False)
        self.norm_ff = nn.LayerNorm(dim)
        self.ff_in = nn.Linear(dim, ff_mult * dim, bias=False)
        self.ff_out = nn.Linear(ff_mult * dim, dim, bias=False)

    def forward(self, features: Float[Tensor, "b s d"], latents: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """Return the refined latents."""
        latents = latents + self.attend(features, self.norm_latents(latents))
        return latents + self.feed_forward(self.norm_ff(latents))

    def attend(self, features: Float[Tensor, "b s d"], queries: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """What normalised latents draw from the features and from each other."""
        key, value = self.to_kv(torch.cat([self.norm_features(features), queries], dim=1)).chunk(2, dim=-1)
        query, key, value = (split_heads(x, self.heads) for x in (self.to_q(queries), key, value))
        return self.to_out(merge_heads(F.scaled_dot_product_attention(query, key, value)))

    def feed_forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """Two linear layers with a GELU between them."""
        return self.ff_out(F.gelu(self.ff_in(x)))


class Resampler(Projector):
    """Perceiver resampler of the "plus" variants: (b, s, feature_dim) -> (b, num_tokens, context_dim).

    ``dim`` and ``heads`` default to what the released SD 1.5 files have, and Tencent's classes and ComfyUI expect of
    any base but SDXL: the text width, and 12 heads. Loaders hard-code depth 4, ff_mult 4 and dim_head 64 (another
    dim_head loads silently with the wrong number of heads), so these are no options.
    """

    variant = "plus"
    feature_kinds: ClassVar[tuple[FeatureKind, ...]] = ("penultimate",)
    depth: ClassVar[int] = 4
    dim_head: ClassVar[int] = 64
    layer_class: ClassVar[type[ResamplerLayer]] = ResamplerLayer
    ff_mult: ClassVar[int] = 4

    def __init__(
        self,
        *,
        feature_dim: int,
        context_dim: int,
        num_tokens: int = 16,
        dim: int | None = None,
        heads: int = 12,
    ) -> None:
        super().__init__(feature_dim=feature_dim, context_dim=context_dim)
        dim = context_dim if dim is None else dim
        for name, size in (("num_tokens", num_tokens), ("dim", dim), ("heads", heads)):
            if size < 1:
                raise ConfigError(f"adapter.projector.{name} must be at least 1, got {size}.")
        self.num_tokens = num_tokens
        self.latents = nn.Parameter(torch.randn(1, num_tokens, dim) / dim**0.5)
        self.proj_in = nn.Linear(feature_dim, dim)
        self.layers = nn.ModuleList(
            self.layer_class(dim=dim, heads=heads, dim_head=self.dim_head, ff_mult=self.ff_mult)
            for _ in range(self.depth)
        )
        self.proj_out = nn.Linear(dim, context_dim)
        self.norm_out = nn.LayerNorm(context_dim)

    def forward(self, image_features: Float[Tensor, "b s f"]) -> Float[Tensor, "b n d"]:
        """Resample the hidden states of an image to ``num_tokens`` tokens."""
        return self.resample(self.proj_in(image_features.float()))

    def resample(self, features: Float[Tensor, "b s d"], *conditions: Float[Tensor, "b d"]) -> Float[Tensor, "b n c"]:
        """Run the layers on projected features; ``conditions`` are what the layers take beside them."""
        latents = self.latents.expand(len(features), -1, -1)
        for layer in self.layers:
            latents = layer(features, latents, *conditions)
        return self.norm_out(self.proj_out(latents))
