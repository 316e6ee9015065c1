"""What attaches to a base, by the options of an adapter's config."""

from dataclasses import replace
from typing import Literal

from ipa_train.adapter.attention import ImageAttention
from ipa_train.adapter.baselines import ConcatenatedAttention, ImageOnlyAttention
from ipa_train.adapter.sites import AttentionSite, ImageBranch
from ipa_train.bases.base import Base
from ipa_train.errors import ConfigError

Attention = Literal["decoupled", "concatenated", "image_only"]
"""``decoupled``: keys and values of the image's own, the IP-Adapter. ``concatenated``: the paper's "simple adapter".
``image_only``: image tokens in place of the text."""

BASELINES: dict[str, type[ImageBranch]] = {"concatenated": ConcatenatedAttention, "image_only": ImageOnlyAttention}
"""The branches of the paper's baselines."""


def adapter_sites(base: Base, *, attention: Attention = "decoupled", lora_rank: int = 0) -> list[AttentionSite]:
    """The sites of an adapter on ``base``: its cross-attentions, then every attention again where there is a LoRA.

    Args:
        base: the base to extend.
        attention: how image tokens enter.
        lora_rank: rank of low-rank updates of every attention; 0 for none.

    Raises:
        ConfigError: what the base cannot have.
    """
    if lora_rank < 0:
        raise ConfigError(f"adapter.sites.lora_rank must be at least 0 (none), got {lora_rank}.")
    sites = base.attention_sites()
    if attention in BASELINES:
        if any(site.branch is not ImageAttention for site in sites):
            raise ConfigError(
                f"adapter.sites.attention={attention} needs the cross-attention of a UNet, and {base.pipeline_class} "
                "has none; choose decoupled."
            )
        sites = [replace(site, branch=BASELINES[attention]) for site in sites]
    return sites + (base.low_rank_sites(lora_rank) if lora_rank else [])
