"""Which blocks follow the image prompt: all, or those that carry its style or its composition.

InstantStyle (arXiv 2404.02733) found two transformers of SDXL's UNet that do: ``up_blocks.0.attentions.1`` for style
(colour, material, atmosphere) and ``down_blocks.2.attentions.1`` for the spatial layout. It names none for other bases.
"""

from collections.abc import Mapping
from typing import Any, Literal

from ipa_train.bases import Base, StableDiffusionXL

Layers = Literal["all", "style", "composition"]

# What diffusers' set_ip_adapter_scale takes: where nothing is said the scale is 0.
_FACTORS: Mapping[str, tuple[str, str, tuple[float, ...]]] = {
    "style": ("up", "block_0", (0.0, 1.0, 0.0)),
    "composition": ("down", "block_2", (0.0, 1.0)),
}


def layer_choices(base: Base) -> tuple[Layers, ...]:
    """Which of them this base has."""
    return ("all", "style", "composition") if isinstance(base, StableDiffusionXL) else ("all",)


def layer_scale(layers: Layers, scale: float) -> float | dict[str, Any]:
    """``scale`` in these blocks and 0 elsewhere, as ``AdapterPipeline.draw`` takes it."""
    if layers == "all":
        return scale
    side, block, factors = _FACTORS[layers]
    return {side: {block: [scale * factor for factor in factors]}}
