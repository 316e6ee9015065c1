"""Image attention of SD 3: scale * Attn(Q', [K', K_ip], [V, V_ip]), added to the latents' share of the joint attention.

Q', K' and V are the latents' own through the frozen weights, the first two normalised anew: unlike in UNets, the added
attention runs over the latents as well as over the image tokens. Layout of InstantX/SD3.5-Large-IP-Adapter, as
diffusers reads it (``SD3IPAdapterJointAttnProcessor2_0``).
"""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ipa_train.adapter.heads import merge_heads, split_heads
from ipa_train.adapter.projector import Projector
from ipa_train.adapter.sites import AttentionSite, ImageBranch
from ipa_train.adapter.time_resampler import TimeResampler
from ipa_train.errors import ConfigError

_EPS = 1e-6


class AdaptiveNorm(nn.Module):
    """LayerNorm whose shift and scale follow the timestep."""

    def __init__(self, *, dim: int, time_dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(time_dim, 2 * dim)

    def forward(self, tokens: Float[Tensor, "b n d"], time_embedding: Float[Tensor, "b t"]) -> Float[Tensor, "b n d"]:
        """Normalise in the precision of the tokens."""
        dtype = tokens.dtype
        weight, bias = self.linear.weight.to(dtype), self.linear.bias.to(dtype)
        shift, scale = F.linear(F.silu(time_embedding.to(dtype)), weight, bias)[:, None].chunk(2, dim=-1)
        return F.layer_norm(tokens, tokens.shape[-1:], eps=_EPS) * (1 + scale) + shift


class HeadNorm(nn.Module):
    """RMSNorm over the width of a head."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(head_dim))

    def forward(self, x: Float[Tensor, "b heads s e"]) -> Float[Tensor, "b heads s e"]:
        """Normalise in the precision of ``x``."""
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), _EPS)


class JointImageAttention(ImageBranch):
    """The image half of one of SD 3's attentions."""

    takes_time: ClassVar[bool] = True
    sink_gain: ClassVar[float] = 6.0
    """How sharply queries choose among image keys at the start of training."""

    def __init__(self, *, hidden_dim: int, context_dim: int, time_dim: int, head_dim: int) -> None:
        super().__init__()
        self.norm_ip = AdaptiveNorm(dim=context_dim, time_dim=time_dim)
        self.to_k_ip = nn.Linear(context_dim, hidden_dim, bias=False)
        self.to_v_ip = nn.Linear(context_dim, hidden_dim, bias=False)
        self.norm_q, self.norm_k, self.norm_ip_k = (HeadNorm(head_dim) for _ in range(3))

    @classmethod
    def for_site(cls, site: AttentionSite, projector: Projector) -> "JointImageAttention":
        """A branch with the weights training starts from.

        Raises:
            ConfigError: a projector that does not know the timestep.
        """
        if not isinstance(projector, TimeResampler):
            raise ConfigError(
                f"adapter: SD 3's attention wants tokens that know the timestep, and a {type(projector).__name__} "
                "gives others: choose adapter=sd3."
            )
        branch = cls(
            hidden_dim=site.hidden_dim,
            context_dim=site.context_dim,
            time_dim=projector.time_dim,
            head_dim=site.hidden_dim // site.module.heads,
        )
        branch.start_near_the_base()
        return branch

    def processor(self, site: AttentionSite) -> "JointAttention":
        """The site's joint attention with this branch added."""
        return JointAttention(self)

    @torch.no_grad()
    def start_near_the_base(self) -> None:
        """Make the added attention almost nothing, though the latents' own values are in it whatever our weights are.

        All latents get the logit 0 and image keys large ones, so that nearly all attention falls to image tokens, and
        their values are zero. What is left is a small share of the latents' mean. Copies of the base's weights, the
        start of UNets, would instead repeat the latents' attention to themselves at every site.
        """
        self.norm_k.weight.zero_()
        self.norm_ip_k.weight.fill_(self.sink_gain)
        self.to_v_ip.weight.zero_()
        self.norm_ip.linear.weight.zero_()
        self.norm_ip.linear.bias.zero_()

    def forward(
        self,
        query: Float[Tensor, "b heads s e"],
        key: Float[Tensor, "b heads s e"],
        value: Float[Tensor, "b heads s e"],
        image_tokens: Float[Tensor, "b n c"],
        time_embedding: Float[Tensor, "b t"],
    ) -> Float[Tensor, "b heads s e"]:
        """Attend from the latents, as the frozen weights project them, to themselves and to the image tokens."""
        dtype, heads = query.dtype, query.shape[1]
        tokens = self.norm_ip(image_tokens.to(dtype), time_embedding)
        image_key = split_heads(F.linear(tokens, self.to_k_ip.weight.to(dtype)), heads)
        image_value = split_heads(F.linear(tokens, self.to_v_ip.weight.to(dtype)), heads)
        return F.scaled_dot_product_attention(
            self.norm_q(query),
            torch.cat([self.norm_k(key), self.norm_ip_k(image_key)], dim=2),
            torch.cat([value, image_value], dim=2),
        )


class JointAttention:
    """SD 3's attention of latents and text with the image half added; takes the place of its ``processor``."""

    trained_scale: ClassVar[float] = 0.5
    """What diffusers sets when it loads a file, so that files work there as they were trained."""

    def __init__(self, image_attention: JointImageAttention) -> None:
        self.image_attention = image_attention
        self.scale = self.trained_scale

    def __call__(
        self,
        attn: Any,
        hidden_states: Float[Tensor, "b s d"],
        encoder_hidden_states: Float[Tensor, "b l d"] | None = None,
        attention_mask: Tensor | None = None,
        ip_hidden_states: Float[Tensor, "b n c"] | None = None,
        temb: Float[Tensor, "b t"] | None = None,
    ) -> Float[Tensor, "b s d"] | tuple[Float[Tensor, "b s d"], Float[Tensor, "b l d"]]:
        """Run one attention; the argument names are the caller's (a diffusers ``Attention``)."""
        own = _project(hidden_states, attn.heads, attn.to_q, attn.to_k, attn.to_v)
        query, key, value = _normalise(*own, attn.norm_q, attn.norm_k)
        num_latents = hidden_states.shape[1]
        if encoder_hidden_states is not None:
            text = _project(encoder_hidden_states, attn.heads, attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            text = _normalise(*text, attn.norm_added_q, attn.norm_added_k)
            query, key, value = (torch.cat(pair, dim=2) for pair in zip((query, key, value), text, strict=True))
        mixed = F.scaled_dot_product_attention(query, key, value)
        latents = mixed[:, :, :num_latents]
        if ip_hidden_states is not None and self.scale != 0.0:
            latents = latents + self.scale * self.image_attention(*own, ip_hidden_states, temb)
        to_out, dropout = attn.to_out
        out = dropout(to_out(merge_heads(latents)))
        if encoder_hidden_states is None:
            return out
        text_out = merge_heads(mixed[:, :, num_latents:])
        return out, text_out if attn.context_pre_only else attn.to_add_out(text_out)


def _project(
    states: Float[Tensor, "b s d"], heads: int, to_q: nn.Module, to_k: nn.Module, to_v: nn.Module
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value by heads."""
    return split_heads(to_q(states), heads), split_heads(to_k(states), heads), split_heads(to_v(states), heads)


def _normalise(
    query: Tensor, key: Tensor, value: Tensor, norm_q: nn.Module | None, norm_k: nn.Module | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise queries and keys in models that do so: SD 3.5, and not SD 3."""
    return query if norm_q is None else norm_q(query), key if norm_k is None else norm_k(key), value
