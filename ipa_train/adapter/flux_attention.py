"""The image half of Flux's joint attentions, as FLUX IP-Adapters of XLabs and diffusers have it.

Queries of the image stream, before rotary positions, attend to the image tokens; the block adds the result to its
image stream beside what its own attention and feed-forward layer gave.
"""

from typing import Any, ClassVar, cast

from jaxtyping import Float
from torch import Tensor, nn

from ipa_train.adapter.attention import ImageAttention
from ipa_train.adapter.heads import merge_heads, split_heads
from ipa_train.adapter.projector import LinearProjector, Projector
from ipa_train.adapter.sites import AttentionSite, Processor
from ipa_train.errors import ConfigError


class FluxImageAttention(ImageAttention):
    """Two projections of the image tokens, with biases.

    All zero at the start, as XLabs trained theirs: there are no text projections of this width to start from (Flux's
    text enters its blocks in the width of the image stream), and the output goes into the stream without a gate, where
    random values would harm the base. At the first step only V has a gradient; V then tells tokens apart, and from the
    second step on K and the projector have theirs. K's bias is there for the files' sake: it shifts all of a query's
    scores alike, which softmax does not notice.
    """

    bias: ClassVar[bool] = True

    @classmethod
    def for_site(cls, site: AttentionSite, projector: Projector) -> "FluxImageAttention":
        """A branch that adds nothing yet.

        Raises:
            ConfigError: a projector that Flux adapters do not have.
        """
        if not isinstance(projector, LinearProjector):
            raise ConfigError(
                f"adapter: loaders know Flux adapters with a linear projector alone, and this is a "
                f"{type(projector).__name__}: choose adapter=linear."
            )
        branch = cls(hidden_dim=site.hidden_dim, context_dim=site.context_dim)
        for weight in branch.parameters():
            nn.init.zeros_(weight)
        return branch

    def processor(self, site: AttentionSite) -> Processor:
        """The site's attention, and this branch beside it."""
        return FluxDecoupledAttention(self, site.module.processor)


class FluxDecoupledAttention:
    """A joint attention with the image half beside it; takes the place of its ``processor``.

    The base's own processor does its part unchanged, with whatever attention kernel it is set to. The price is that
    queries are computed twice; with that the whole image half is 2 % of a forward (counted, at 512 and 1024 pixels).
    """

    def __init__(self, image_attention: FluxImageAttention, base_processor: Any) -> None:
        self.image_attention, self.base_processor = image_attention, base_processor
        self.scale = 1.0

    def __call__(
        self,
        attn: Any,
        hidden_states: Float[Tensor, "b s d"],
        encoder_hidden_states: Float[Tensor, "b l d"],
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        ip_hidden_states: Float[Tensor, "b n c"] | None = None,
    ) -> tuple[Tensor, ...]:
        """Image stream, text stream and, where there are image tokens, what they add to the image stream.

        The argument names are the caller's (a diffusers ``FluxAttention``), and so is the order of the results.
        """
        streams = self.base_processor(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        if ip_hidden_states is None or self.scale == 0.0:
            return cast(tuple[Tensor, ...], streams)
        query = attn.norm_q(split_heads(attn.to_q(hidden_states), attn.heads))
        return (*streams, self.scale * merge_heads(self.image_attention(query, ip_hidden_states)))
