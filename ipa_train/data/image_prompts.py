"""What the image encoder sees of a sample: its picture or a picture of its own, masked and augmented or as it is.

The steps, each left out where it is not asked for: a square around what the mask keeps; a random part of it; resizing
and centre crop as of any image prompt, and mirroring; other colours; grey in place of what the mask does not keep;
turning.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import UInt8
from numpy import ndarray

from ipa_train.data.augmentation import Change, ReferenceAugmentation, centre_square
from ipa_train.data.decode import MAX_PIXELS, decode, fill_image_prompt
from ipa_train.data.embedding import read_embedding
from ipa_train.data.scan import Extra
from ipa_train.errors import ConfigError, DataError, did_you_mean

# The mean of CLIP's and, to a level, of ImageNet's pictures: encoders that normalise by it are given zeros, which is
# what they are given for "no image" too.
GREY = (123, 117, 104)
_SOURCES, _MASKS = ("picture", "reference"), ("none", "background", "crop")
_KEPT = 128
_PNG_OF_GREY_LEVELS = b"\x89PNG\r\n\x1a\n", b"\0"


@dataclass(frozen=True, kw_only=True)
class ImagePrompts:
    """How image prompts are made.

    ``size`` is the image encoder's, in pixels; None makes none: the encoder sees no pictures, or the device makes them
    of the training pixels. ``embedding_shape`` is that of the stored embedding which training is given besides.
    """

    size: int | None
    source: str = "picture"
    mask: str = "none"
    mask_margin: float = 0.1
    augment: ReferenceAugmentation = field(default_factory=ReferenceAugmentation)
    embedding_shape: tuple[int, ...] | None = None
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        if self.size is not None and self.size < 1:
            raise ConfigError(f"data.image_prompt_size must be at least 1, got {self.size}.")
        choices = {"image_prompt": (self.source, _SOURCES), "reference_mask": (self.mask, _MASKS)}
        for name, (value, allowed) in choices.items():
            if value not in allowed:
                raise ConfigError(f"data.{name}={value!r} is no choice.{did_you_mean(value, allowed)}")
        if not 0.0 <= self.mask_margin <= 10.0:
            raise ConfigError(f"data.reference_mask_margin must be from 0 to 10, got {self.mask_margin}.")
        if self.embedding_shape is not None and not (
            len(self.embedding_shape) in (1, 2) and min(self.embedding_shape) >= 1
        ):
            raise ConfigError(f"data.embedding_shape must be (f,) or (s, f), got {self.embedding_shape}.")
        if self.size is None and not self.are_pictures:
            raise ConfigError(
                "data.image_prompt, data.reference_mask and data.reference_augment have no effect here: the image "
                "encoder of this run sees no pictures; leave them as they are by default."
            )

    @property
    def extras(self) -> tuple[Extra, ...]:
        """What a sample must hold besides its picture and caption."""
        needed: dict[Extra, bool] = {
            "reference": self.source == "reference",
            "mask": self.mask != "none",
            "embedding": self.embedding_shape is not None,
        }
        return tuple(extra for extra, is_needed in needed.items() if is_needed)

    @property
    def are_pictures(self) -> bool:
        """Whether the prompts are the samples' own pictures, whole and as they are."""
        return self.source == "picture" and self.mask == "none" and not self.augment.is_on

    @property
    def description(self) -> dict[str, Any]:
        """What cached features depend on, by the names of the options."""
        return {
            "image_prompt": self.source,
            "reference_mask": self.mask,
            "reference_mask_margin": self.mask_margin if self.mask == "crop" else 0.0,
            "embedding_shape": None if self.embedding_shape is None else list(self.embedding_shape),
        }

    @property
    def masks_pictures(self) -> bool:
        """Whether masks are taken for those of the pictures; where there are references, they are of these."""
        return self.mask != "none" and self.source == "picture"

    def require_fixed(self) -> None:
        """Raise ConfigError if no cache could hold them."""
        if self.augment.is_on:
            raise ConfigError(
                "data.reference_augment: features of prompts that change with each look cannot be cached; train from "
                "the pictures, or set data.reference_augment=null."
            )

    def fill(
        self,
        out: UInt8[ndarray, "p q c"],
        picture: UInt8[ndarray, "h w c"],
        extras: Mapping[Extra, bytes],
        *,
        flip: bool,
        change: Change | None,
    ) -> None:
        """Make one prompt, of the sample's decoded ``picture`` or of what it holds besides.

        ``flip`` is that of the training pixels: a prompt that is a picture of its own, or is changed at random, does
        not follow it.

        Raises:
            DataError: the reference or mask is damaged, or the mask does not fit, or keeps nothing.
        """
        if self.source == "reference":
            picture, flip = _decode(extras["reference"], "reference", self.max_pixels), False
        kept = None if self.mask == "none" else decode_mask(extras["mask"], picture.shape[:2], self.max_pixels)
        if self.mask == "crop" and kept is not None:
            picture, kept = picture[_square(kept, self.mask_margin)], None
        if kept is not None and centre_square(kept).max() < _KEPT:
            raise DataError("its mask keeps nothing of the centre square, which is what the image encoder sees")
        if change is not None:
            flip = change.flip
            # A part that shows nothing of what is kept would be grey alone, which means "no image".
            if kept is None or change.cut(kept).max() >= _KEPT:
                picture, kept = change.cut(picture), None if kept is None else change.cut(kept)
        fill_image_prompt(out, picture, flip=flip, max_pixels=self.max_pixels)
        if change is not None:
            out[:] = change.recolour(out)
        if kept is not None:
            share = np.empty((*out.shape[:2], 1), np.uint8)
            fill_image_prompt(share, kept, flip=flip, max_pixels=self.max_pixels)
            grey = np.array(GREY, np.float32)
            out[:] = np.rint(grey + (out - grey) * (share / np.float32(255)))
        if change is not None:
            out[:] = change.rotate(out, GREY)


def check_extras(extras: Mapping[Extra, bytes], size: tuple[int, int], max_pixels: int) -> None:
    """Decode all that a sample holds beside its picture, which has this (height, width).

    Raises:
        DataError: training would refuse some of it, whatever the options.
    """
    if "reference" in extras:
        height, width, _ = _decode(extras["reference"], "reference", max_pixels).shape
        size = height, width
    if "mask" in extras:
        decode_mask(extras["mask"], size, max_pixels)
    if "embedding" in extras:
        read_embedding(extras["embedding"], None)


def decode_mask(data: bytes, size: tuple[int, int], max_pixels: int) -> UInt8[ndarray, "h w 1"]:
    """Decode a mask for a picture of this (height, width): a PNG of grey levels, white where the picture is kept.

    Raises:
        DataError: it is damaged, in colour or with transparency, of another size, or keeps nothing.
    """
    signature, grey_levels = _PNG_OF_GREY_LEVELS
    is_transparent = b"tRNS" in data.partition(b"IDAT")[0]
    if not data.startswith(signature) or data[25:26] != grey_levels or is_transparent:
        raise DataError("its mask is not a PNG of grey levels alone")
    mask = _decode(data, "mask", max_pixels)[..., :1]
    if mask.shape[:2] != size:
        (height, width), (rows, columns) = mask.shape[:2], size
        raise DataError(f"its mask has {width} x {height} pixels, the picture it is for {columns} x {rows}")
    if mask.max() < _KEPT:
        raise DataError(f"its mask keeps nothing: no level is above {_KEPT - 1}")
    return mask


def _decode(data: bytes, what: str, max_pixels: int) -> UInt8[ndarray, "h w c"]:
    try:
        return decode(data, max_pixels=max_pixels)
    except DataError as error:
        raise DataError(f"its {what}: {error}") from error


def _square(kept: UInt8[ndarray, "h w 1"], margin: float) -> tuple[slice, slice]:
    """The square around what is kept, with a ``margin`` on each side in parts of its length; inside the picture.

    At most as large as the picture is wide or high: like CLIP's own crop, it then shows the middle.
    """
    bounds = [np.flatnonzero((kept[..., 0] >= _KEPT).any(axis=axis))[[0, -1]] + [0, 1] for axis in (1, 0)]
    longest = max(int(end - start) for start, end in bounds)
    side = min(round(longest * (1.0 + 2.0 * margin)), *kept.shape[:2])
    starts = [
        min(max(0, int(start + end - side) // 2), length - side)
        for (start, end), length in zip(bounds, kept.shape[:2], strict=True)
    ]
    top, left = starts
    return slice(top, top + side), slice(left, left + side)
