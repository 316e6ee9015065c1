"""What the paper compares decoupled attention with (arXiv 2308.06721, 4.4): image tokens in the text's own attention.

These have no weights: image tokens go through the base's own keys and values, beside those of the text or in their
place. No loader knows such adapters.
"""

from abc import abstractmethod
from typing import Any, ClassVar, cast

import torch
from jaxtyping import Float
from torch import Tensor

from ipa_train.adapter.projector import Projector
from ipa_train.adapter.sites import AttentionSite, ImageBranch


class TextAttention(ImageBranch):
    """The text cross-attention of a UNet's site, over a context into which image tokens have come."""

    @classmethod
    def for_site(cls, site: AttentionSite, projector: Projector) -> "TextAttention":
        """Nothing to fit."""
        return cls()

    def processor(self, site: AttentionSite) -> "TextCrossAttention":
        """The site's own attention over another context."""
        return TextCrossAttention(self, site.module.processor)

    @abstractmethod
    def context(self, text: Float[Tensor, "b l c"], image_tokens: Float[Tensor, "b n c"]) -> Float[Tensor, "b m c"]:
        """What keys and values are made of."""


class ConcatenatedAttention(TextAttention):
    """The "simple adapter": image tokens stand behind the text tokens, in one softmax."""

    unexportable: ClassVar[str | None] = (
        "it concatenates image tokens to the text's in one attention (attention=concatenated, a baseline), and loaders "
        "know separate keys and values for the image only"
    )

    def context(self, text: Float[Tensor, "b l c"], image_tokens: Float[Tensor, "b n c"]) -> Float[Tensor, "b m c"]:
        """Text tokens, then image tokens."""
        return torch.cat([text, image_tokens], dim=1)


class ImageOnlyAttention(TextAttention):
    """Image tokens in place of the text, as in SD Image Variations."""

    unexportable: ClassVar[str | None] = (
        "it gives the denoiser image tokens in place of the text (attention=image_only, a baseline), and "
        "loaders know image tokens beside the text only"
    )

    def context(self, text: Float[Tensor, "b l c"], image_tokens: Float[Tensor, "b n c"]) -> Float[Tensor, "b m c"]:
        """The image tokens."""
        return image_tokens


class TextCrossAttention:
    """Hands the site's own processor the branch's context; image tokens count in full, except at scale 0."""

    def __init__(self, branch: TextAttention, processor: Any) -> None:
        self.branch, self.processor = branch, processor
        self.scale = 1.0

    def __call__(
        self,
        attn: Any,
        hidden_states: Float[Tensor, "b s d"],
        encoder_hidden_states: Float[Tensor, "b l c"],
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        ip_hidden_states: Float[Tensor, "b n c"] | None = None,
    ) -> Float[Tensor, "b s d"]:
        """Run one attention; the argument names are the caller's (a diffusers ``Attention``)."""
        context = encoder_hidden_states
        if ip_hidden_states is not None and self.scale != 0.0:
            context = self.branch.context(context, ip_hidden_states)
        return cast(Tensor, self.processor(attn, hidden_states, context, attention_mask, temb))
