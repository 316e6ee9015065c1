"""Low-rank updates (LoRA, arXiv 2106.09685) of the q, k, v and out layers of an attention, as face adapters have them.

They belong to the image prompt: without image tokens, and at scale 0, they are off and the base is kept bit for bit. At
every other scale they act in full, as in diffusers and in Tencent's code, whose own scale of the image half leaves them
on even at 0: there it takes ``pipe.set_adapters("faceid_0", 0.0)`` or ``lora_scale=0`` to be rid of them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ipa_train.adapter.projector import Projector
from ipa_train.adapter.sites import AttentionSite, ImageBranch


@dataclass(frozen=True)
class LowRankSite(AttentionSite):
    """An attention whose layers get low-rank updates."""

    rank: int = 128
    """That of the released files."""


class LowRankLayer(nn.Module):
    """What is added to the output of one linear layer: ``up(down(x))``; nothing at the start, as ``up`` is zero."""

    def __init__(self, layer: nn.Linear, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(layer.in_features, rank, bias=False)
        self.up = nn.Linear(rank, layer.out_features, bias=False)
        nn.init.normal_(self.down.weight, std=1 / rank)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Float[Tensor, "b s d"]) -> Float[Tensor, "b s e"]:
        """The update, in the precision of ``x``."""
        return F.linear(F.linear(x, self.down.weight.to(x.dtype)), self.up.weight.to(x.dtype))


class LowRankUpdate(ImageBranch):
    """The updates of one attention's four layers."""

    def __init__(self, attention: Any, rank: int) -> None:
        super().__init__()
        self.to_q_lora = LowRankLayer(attention.to_q, rank)
        self.to_k_lora = LowRankLayer(attention.to_k, rank)
        self.to_v_lora = LowRankLayer(attention.to_v, rank)
        self.to_out_lora = LowRankLayer(attention.to_out[0], rank)

    @classmethod
    def for_site(cls, site: AttentionSite, projector: Projector) -> "LowRankUpdate":
        """Updates of the sizes of the site's layers, that change nothing yet."""
        return cls(site.module, cast(LowRankSite, site).rank)

    def processor(self, site: AttentionSite) -> "LowRankAttention":
        """The site's attention, as it is by then, on updated layers."""
        return LowRankAttention(self, site.module)


class UpdatedLayers:
    """An attention as its processor sees it, with the four layers updated and all else its own."""

    def __init__(self, attention: Any, update: LowRankUpdate) -> None:
        self._attention = attention
        self.to_q = _sum(attention.to_q, update.to_q_lora)
        self.to_k = _sum(attention.to_k, update.to_k_lora)
        self.to_v = _sum(attention.to_v, update.to_v_lora)
        self.to_out = (_sum(attention.to_out[0], update.to_out_lora), *attention.to_out[1:])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._attention, name)


class LowRankAttention:
    """Runs the processor that it takes the place of, on updated layers wherever there are image tokens."""

    def __init__(self, update: LowRankUpdate, attention: Any) -> None:
        self.processor = attention.processor
        self.updated = UpdatedLayers(attention, update)
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
        layers = attn if ip_hidden_states is None or self.scale == 0.0 else self.updated
        return cast(
            Tensor,
            self.processor(
                layers,
                hidden_states,
                encoder_hidden_states,
                attention_mask,
                temb,
                ip_hidden_states=ip_hidden_states,
            ),
        )


def _sum(layer: nn.Linear, update: LowRankLayer) -> Callable[[Tensor], Tensor]:
    return lambda x: cast(Tensor, layer(x) + update(x))
