"""The one typed batch that data hands to training, and the axis letters of the whole project.

Axis letters in shape annotations: ``b`` batch, ``c h w`` image or latent, ``l`` text length, ``n`` image tokens,
``d`` width, ``s`` encoder patches.
"""

from collections.abc import Callable
from dataclasses import dataclass, is_dataclass, replace
from typing import Any, TypeVar

import torch
from jaxtyping import Float16, Float32, Int64, UInt8
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """What the frozen encoders are to encode; RGB 0..255."""

    pixels: UInt8[Tensor, "b c h w"]
    """Training targets, resized and cropped to the training resolution; channels last in memory."""
    separate_prompts: UInt8[Tensor, "b c p q"] | None
    """None where the pixels hold all that the image encoder is to see: it resizes them itself."""
    embeddings: Float32[Tensor, "b *s f"] | None = None
    """Stored with the samples, for image encoders that take such; None where none does."""

    @property
    def image_prompts(self) -> UInt8[Tensor, "b c p q"]:
        """What the image encoder sees."""
        return self.pixels if self.separate_prompts is None else self.separate_prompts


@dataclass(frozen=True, kw_only=True)
class Features:
    """What the frozen encoders made of the pictures when they were cached."""

    latents_mean: Float16[Tensor, "b c h w"]
    latents_std: Float16[Tensor, "b c h w"] | None
    """None where the cache holds the means alone; they are then taken as the latents."""
    image_features: tuple[Float16[Tensor, "b ..."], ...]
    """(b, f) or (b, s, f), one for each kind that the adapter is given."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One rank's share of a (micro-)batch; identical whatever the number of ranks and workers that loaded it.

    Captions are raw strings, so that one set of shards serves every family of base models.
    """

    content: Pictures | Features
    captions: list[str]
    positions: Int64[Tensor, "b"]
    """Place of each sample in the infinite stream; the key of every random draw made for it. Always on the host."""
    original_sizes: Int64[Tensor, "b 2"]
    """Height and width of the stored image, in pixels."""
    crop_top_lefts: Int64[Tensor, "b 2"]
    """Top and left of the crop, in pixels of the resized image (SDXL micro-conditioning)."""
    target_sizes: Int64[Tensor, "b 2"]
    """Height and width of the training pixels."""
    keys: list[str]
    """``shard/sample`` names, for messages that must name a sample."""

    def __len__(self) -> int:
        return len(self.captions)

    @property
    def device(self) -> torch.device:
        """Where its tensors lie, but for the positions."""
        return self.target_sizes.device

    def to(self, device: torch.device | str) -> "Batch":
        """Return the batch with its tensors on ``device``; from pinned memory to CUDA without waiting for the copy."""
        to_cuda = torch.device(device).type == "cuda"
        moved = _map_tensors(self, lambda tensor: tensor.to(device, non_blocking=to_cuda))
        return replace(moved, positions=self.positions)

    def blank(self, num_samples: int) -> "Batch":
        """A batch of so many samples of this one's shapes, without data: on the meta device."""
        blank = _map_tensors(self, lambda tensor: torch.cat([tensor[:1].to("meta")] * num_samples))
        return replace(
            blank,
            captions=self.captions[:1] * num_samples,
            keys=self.keys[:1] * num_samples,
            positions=torch.arange(num_samples),
        )

    def record_stream(self, stream: torch.Stream) -> None:
        """Keep the memory of its tensors, which another CUDA stream allocated, until ``stream`` is done with them."""

        def record(tensor: Tensor) -> Tensor:
            if tensor.is_cuda:
                tensor.record_stream(stream)
            return tensor

        _map_tensors(self, record)

    def pin_memory(self) -> "Batch":
        """Return the batch in page-locked memory; called by the DataLoader when ``pin_memory`` is on."""
        return _map_tensors(self, torch.Tensor.pin_memory)


def _map_tensors(value: T, change: Callable[[Tensor], Tensor]) -> T:
    changed: dict[str, Any] = {}
    for name, part in vars(value).items():
        if isinstance(part, Tensor):
            changed[name] = change(part)
        elif isinstance(part, tuple):
            changed[name] = tuple(map(change, part))
        elif is_dataclass(part):
            changed[name] = _map_tensors(part, change)
    return replace(value, **changed)  # type: ignore[type-var]
