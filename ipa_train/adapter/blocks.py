"""Blocks of a UNet that carry one thing alone: weights for ``IPAdapter.scales``.

After InstantStyle (arXiv 2404.02733), found in SDXL; for SD 1.x and 2.x its authors call them experimental. The same in
diffusers: ``set_ip_adapter_scale({"up": {"block_0": [0, 1, 0]}})`` is SDXL's style.
"""

from collections.abc import Sequence

from ipa_train.adapter.sites import AttentionSite
from ipa_train.errors import ConfigError


def style(sites: Sequence[AttentionSite], scale: float = 1.0) -> dict[str, float]:
    """Colour, material and mood of the image prompt, not what it shows.

    Raises:
        ConfigError: no UNet of Stable Diffusion, as for :func:`layout`.
    """
    return in_blocks(sites, ["up_blocks.0.attentions.1"] if _is_sdxl(sites) else ["up_blocks.1"], scale)


def layout(sites: Sequence[AttentionSite], scale: float = 1.0) -> dict[str, float]:
    """Where things stand in the image prompt, not how they look; for both, join it with :func:`style`."""
    return in_blocks(
        sites, ["down_blocks.2.attentions.1"] if _is_sdxl(sites) else ["down_blocks.2", "mid_block"], scale
    )


def in_blocks(sites: Sequence[AttentionSite], blocks: Sequence[str], scale: float = 1.0) -> dict[str, float]:
    """``scale`` for the sites within these blocks (module paths such as ``up_blocks.0``), no entry for the rest.

    Raises:
        ConfigError: a block without any site.
    """
    scales: dict[str, float] = {}
    for block in blocks:
        names = [site.name for site in sites if f"{site.name}.".startswith(f"{block}.")]
        if not names:
            raise ConfigError(f"No attention of this base that takes image tokens lies in {block!r}.")
        scales |= dict.fromkeys(names, scale)
    return scales


def _is_sdxl(sites: Sequence[AttentionSite]) -> bool:
    # The first up block of SD 1.x and 2.x has no attention.
    return any(site.name.startswith("up_blocks.0.") for site in sites)
