"""The contract of a base: all that a new family of frozen text-to-image models has to write.

Image tokens are an argument of :meth:`Base.predict`, never state kept on a module: activation checkpointing recomputes
the forward after such state is gone, and then returns wrong gradients without an error.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from ipa_train.adapter.sites import AttentionSite
from ipa_train.bases.vae import FrozenVAE
from ipa_train.diffusion.objective import PredictionType


@dataclass(frozen=True)
class TextConditioning:
    """Encoded captions."""

    context: Float[Tensor, "b l d"]
    """Token states that cross-attention reads."""
    pooled: Float[Tensor, "b p"] | None = None
    """One vector per caption, for families that use it."""

    def where(self, keep: Tensor, other: "TextConditioning") -> "TextConditioning":
        """Rows of ``self`` where ``keep`` (bool, shape b), else the rows of ``other`` (broadcast from one row)."""
        pooled = None
        if self.pooled is not None and other.pooled is not None:
            pooled = torch.where(keep[:, None], self.pooled, other.pooled)
        return TextConditioning(torch.where(keep[:, None, None], self.context, other.context), pooled)


@dataclass(frozen=True)
class MicroConditioning:
    """What SDXL is told of a picture's making, in pixels (height, width); other families ignore it."""

    original_sizes: Int64[Tensor, "b 2"]
    crop_top_lefts: Int64[Tensor, "b 2"]
    target_sizes: Int64[Tensor, "b 2"]


class Base(nn.Module, ABC):
    """A frozen text-to-image model. Its weights never require gradients and it always stays in eval mode."""

    prediction_type: PredictionType
    alphas_cumprod: Float[Tensor, "t"]
    """Cumulative signal share of each of the training timesteps, fp32."""
    context_dim: int
    """Width of the text tokens."""
    vae: FrozenVAE
    """What makes latents of pictures."""
    path: str
    """Folder or hub id it was loaded from."""
    dtype: torch.dtype
    """Precision of the denoiser."""

    @abstractmethod
    def encode_text(self, captions: Sequence[str]) -> TextConditioning:
        """Tokenise and encode; the empty caption is the "no text" condition."""

    @abstractmethod
    def attention_sites(self) -> list[AttentionSite]:
        """The cross-attentions an adapter extends, in the order of interchange files."""

    @abstractmethod
    def predict(
        self,
        noisy_latents: Float[Tensor, "b c h w"],
        timesteps: Int64[Tensor, "b"],
        text: TextConditioning,
        image_tokens: Float[Tensor, "b n d"] | None,
        micro: MicroConditioning | None = None,
    ) -> Float[Tensor, "b c h w"]:
        """One denoiser forward, returned in fp32; ``image_tokens=None`` is the base model alone."""

    def train(self, mode: bool = True) -> "Base":
        """Stay in eval mode: a frozen model has no training behaviour (dropout, batch statistics)."""
        return super().train(False)
