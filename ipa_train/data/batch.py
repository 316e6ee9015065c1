"""The one typed batch that data hands to training, and the axis letters of the whole project.

Axis letters in shape annotations: ``b`` batch, ``c h w`` image or latent, ``l`` text length, ``n`` image tokens,
``d`` width, ``s`` encoder patches.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One rank's share of a (micro-)batch; identical whatever the number of ranks and workers that loaded it.

    Captions are raw strings, so that one set of shards serves every family of base models.
    """

    pixels: UInt8[Tensor, "b c h w"]
    """Training targets, RGB 0..255, resized and cropped to the training resolution."""
    image_prompts: UInt8[Tensor, "b c p q"]
    """What the image encoder sees: RGB 0..255 at the encoder's input size, from the uncropped original."""
    captions: list[str]
    positions: Int64[Tensor, "b"]
    """Place of each sample in the infinite stream; the key of every random draw made for it."""
    original_sizes: Int64[Tensor, "b 2"]
    """Height and width of the stored image, in pixels."""
    crop_top_lefts: Int64[Tensor, "b 2"]
    """Top and left of the crop, in pixels of the resized image (SDXL micro-conditioning)."""
    keys: list[str]
    """``shard/sample`` names, for messages that must name a sample."""

    @property
    def target_sizes(self) -> Int64[Tensor, "b 2"]:
        """Height and width of the training pixels."""
        return torch.tensor(self.pixels.shape[-2:], device=self.pixels.device).expand(len(self), 2)

    def __len__(self) -> int:
        return len(self.captions)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "Batch":
        """Return the batch with its tensors on ``device``."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        """Return the batch in page-locked memory; called by the DataLoader when ``pin_memory`` is on."""
        return self._map(torch.Tensor.pin_memory)

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        tensors: dict[str, Any] = {k: change(v) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **tensors)
