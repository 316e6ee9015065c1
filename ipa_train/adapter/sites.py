"""Where image attention attaches: one entry for each text cross-attention of a denoiser."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class AttentionSite:
    """One cross-attention of the frozen denoiser that the adapter extends."""

    name: str
    """Module path in the denoiser, e.g. ``down_blocks.0.attentions.0.transformer_blocks.0.attn2``."""
    index: int
    """The site's number in interchange files: its place among all attentions of the denoiser (1, 3, 5, ...)."""
    hidden_dim: int
    """Width of the keys and values (heads x head width)."""
    context_dim: int
    """Width of the text tokens, and so of the image tokens."""
    module: Any
    """The attention module: has ``to_q, to_k, to_v, to_out, heads`` and takes another ``processor``."""
