"""What a projector makes of image features, and ``Base.predict`` takes as its argument."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class ImageTokens:
    """Image tokens of a batch, fp32."""

    states: Float[Tensor, "b n d"]
    time_embedding: Float[Tensor, "b t"] | None = None
    """Of the timestep they are made for, where the projector knows it (SD 3)."""

    @staticmethod
    def cat(parts: Sequence["ImageTokens"]) -> "ImageTokens":
        """Join batches."""
        embeddings = [part.time_embedding for part in parts if part.time_embedding is not None]
        return ImageTokens(torch.cat([part.states for part in parts]), torch.cat(embeddings) if embeddings else None)
