"""Decoupled cross-attention: Z = Attn(Q, K, V) + scale * Attn(Q, K', V') (arXiv 2308.06721, eq. 5).

Q is shared; K, V come from the text tokens through the frozen weights, K', V' from the image tokens through ours.
"""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ipa_train.adapter.heads import merge_heads, split_heads
from ipa_train.adapter.projector import Projector
from ipa_train.adapter.sites import AttentionSite, ImageBranch, Processor


class ImageAttention(ImageBranch):
    """The image half of a UNet's cross-attention: two bias-free projections of the image tokens.

    Initialised as copies of the site's text projections when those are given: random or zero weights lose the warm
    start that the released adapters had.
    """

    bias: ClassVar[bool] = False
    """Whether the projections have biases, as some families' files do."""

    def __init__(self, *, hidden_dim: int, context_dim: int) -> None:
        super().__init__()
        self.to_k_ip = nn.Linear(context_dim, hidden_dim, bias=self.bias)
        self.to_v_ip = nn.Linear(context_dim, hidden_dim, bias=self.bias)

    @classmethod
    def for_site(cls, site: AttentionSite, projector: Projector) -> "ImageAttention":
        """A branch that starts from the site's text projections."""
        branch = cls(hidden_dim=site.hidden_dim, context_dim=site.context_dim)
        branch.copy_text_weights(site.module.to_k, site.module.to_v)
        return branch

    def processor(self, site: AttentionSite) -> Processor:
        """The site's cross-attention with this branch added."""
        return DecoupledCrossAttention(self)

    @torch.no_grad()
    def copy_text_weights(self, to_k: nn.Linear, to_v: nn.Linear) -> None:
        """Start from the text branch: K' = K and V' = V for equal tokens."""
        self.to_k_ip.weight.copy_(to_k.weight)
        self.to_v_ip.weight.copy_(to_v.weight)

    def forward(
        self, query: Float[Tensor, "b heads s e"], image_tokens: Float[Tensor, "b n d"]
    ) -> Float[Tensor, "b heads s e"]:
        """Attend from the shared queries to the image tokens, in the precision of the queries."""
        heads, tokens = query.shape[1], image_tokens.to(query.dtype)
        key, value = (split_heads(project(tokens, linear), heads) for linear in (self.to_k_ip, self.to_v_ip))
        return F.scaled_dot_product_attention(query, key, value)


def project(x: Float[Tensor, "b n c"], linear: nn.Linear) -> Float[Tensor, "b n d"]:
    """Apply fp32 master weights in the precision of ``x``, without autocast."""
    return F.linear(x, linear.weight.to(x.dtype), None if linear.bias is None else linear.bias.to(x.dtype))


class DecoupledCrossAttention:
    """The text cross-attention of a UNet site with the image half added; takes the place of its ``processor``."""

    def __init__(self, image_attention: ImageAttention) -> None:
        self.image_attention = image_attention
        self.scale = 1.0

    def __call__(
        self,
        attn: Any,
        hidden_states: Float[Tensor, "b s d"],
        encoder_hidden_states: Float[Tensor, "b l c"] | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        ip_hidden_states: Float[Tensor, "b n c"] | None = None,
    ) -> Float[Tensor, "b s d"]:
        """Run one attention; the argument names are the caller's (a diffusers ``Attention``)."""
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query = split_heads(attn.to_q(hidden_states), attn.heads)
        key = split_heads(attn.to_k(context), attn.heads)
        value = split_heads(attn.to_v(context), attn.heads)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask)
        if ip_hidden_states is not None and self.scale != 0.0:
            mixed = mixed + self.scale * self.image_attention(query, ip_hidden_states)
        to_out, dropout = attn.to_out
        return dropout(to_out(merge_heads(mixed)))
