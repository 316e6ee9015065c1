"""Which blocks of a UNet follow the image prompt, as diffusers' pipelines are told."""

import re
from typing import Any, Literal

from ipa_train.adapter import blocks
from ipa_train.bases import Base
from ipa_train.errors import ConfigError

Layers = Literal["all", "style", "layout"]

_TRANSFORMER = re.compile(r"(down|up)_blocks\.(\d+)\.attentions\.(\d+)\.")


def layer_choices(base: Base) -> tuple[Layers, ...]:
    """Those that this base has the blocks for."""
    try:
        for layers in ("style", "layout"):
            layer_scale(base, layers, 1.0)
    except ConfigError:
        return ("all",)
    return ("all", "style", "layout")


def layer_scale(base: Base, layers: Layers, scale: float) -> float | dict[str, Any]:
    """``scale`` in these blocks and 0 in all others, in the words of ``set_ip_adapter_scale``.

    Raises:
        ConfigError: the base has no such blocks.
    """
    if layers == "all":
        return scale
    sites = base.attention_sites()
    scales = (blocks.style if layers == "style" else blocks.layout)(sites, scale)
    by_block: dict[str, dict[str, dict[str, float]]] = {"down": {}, "up": {}}
    for site in sites:
        if found := _TRANSFORMER.match(site.name):
            side, block, transformer = found.groups()
            by_block[side].setdefault(f"block_{block}", {})[transformer] = scales.get(site.name, 0.0)
    middle = max((value for name, value in scales.items() if name.startswith("mid_block.")), default=0.0)
    return {"mid": middle} | {
        side: {block: list(transformers.values()) for block, transformers in named.items()}
        for side, named in by_block.items()
    }
