"""Random changes of the image prompt alone, so that an adapter cannot copy pose, place and colours from it.

Training pairs an image prompt with the very picture it is to give; a face adapter then copies how the head is turned
and lit. Its authors' remedy is to augment the prompt and leave the target as it is (IP-Adapter, issue 393).
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from numpy import ndarray
from PIL import Image, ImageEnhance

from ipa_train.errors import ConfigError
from ipa_train.runtime.seeding import Draws

_ENHANCERS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)


class Change(NamedTuple):
    """What is done to one image prompt."""

    flip: bool
    degrees: float
    crop: tuple[float, float, float]
    """Side as a share of the whole square, and where in it: from (0, 0), the top left, to (1, 1)."""
    colours: tuple[float, float, float]
    """Factors of brightness, contrast and saturation."""

    def cut(self, picture: UInt8[ndarray, "h w c"]) -> UInt8[ndarray, "p q c"]:
        """A part of the picture's centre square."""
        side, down, right = self.crop
        if side >= 1.0:
            return picture
        square = centre_square(picture)
        part = max(1, round(len(square) * side))
        top, left = (int(place * (len(square) - part + 1)) for place in (down, right))
        return square[top : top + part, left : left + part]

    def recolour(self, picture: UInt8[ndarray, "h w 3"]) -> UInt8[ndarray, "h w 3"]:
        """Other brightness, contrast and saturation."""
        image = Image.fromarray(picture)
        for enhance, factor in zip(_ENHANCERS, self.colours, strict=True):
            image = image if factor == 1.0 else enhance(image).enhance(factor)
        return np.asarray(image)

    def rotate(self, picture: UInt8[ndarray, "h w 3"], fill: tuple[int, int, int]) -> UInt8[ndarray, "h w 3"]:
        """Turn about the centre; the corners that come empty are of colour ``fill``."""
        if not self.degrees:
            return picture
        return np.asarray(Image.fromarray(picture).rotate(self.degrees, Image.Resampling.BICUBIC, fillcolor=fill))


def centre_square(picture: UInt8[ndarray, "h w c"]) -> UInt8[ndarray, "p p c"]:
    """What an image encoder sees of a whole picture, before it is resized."""
    height, width = picture.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return picture[top : top + side, left : left + side]


@dataclass(frozen=True, kw_only=True)
class ReferenceAugmentation:
    """How far image prompts may be changed; as it stands, not at all.

    ``min_crop_rate`` is the least share of the area that is kept, ``colour_jitter`` how far brightness, contrast and
    saturation may each depart from 1.
    """

    flip_rate: float = 0.0
    max_rotation_degrees: float = 0.0
    min_crop_rate: float = 1.0
    colour_jitter: float = 0.0

    def __post_init__(self) -> None:
        ranges = {"flip_rate": (0, 1), "max_rotation_degrees": (0, 180), "colour_jitter": (0, 1)}
        for name, (low, high) in ranges.items():
            if not low <= getattr(self, name) <= high:
                raise ConfigError(
                    f"data.reference_augment.{name} must be from {low} to {high}, got {getattr(self, name)}."
                )
        if not 0.0 < self.min_crop_rate <= 1.0:
            raise ConfigError(
                f"data.reference_augment.min_crop_rate must be above 0 and at most 1, got {self.min_crop_rate}."
            )

    @property
    def is_on(self) -> bool:
        """Whether it changes anything."""
        return self != ReferenceAugmentation()

    def draw(self, draws: Draws) -> list[Change] | None:
        """The change of each sample of a batch, by its position; None if there is none."""
        if not self.is_on:
            return None
        return [self._change(*row) for row in draws.uniform("reference", (8,)).tolist()]

    def _change(self, flip: float, turn: float, area: float, down: float, right: float, *colours: float) -> Change:
        brightness, contrast, saturation = (1.0 + self.colour_jitter * (2.0 * draw - 1.0) for draw in colours)
        return Change(
            flip=flip < self.flip_rate,
            degrees=self.max_rotation_degrees * (2.0 * turn - 1.0),
            crop=((1.0 - (1.0 - self.min_crop_rate) * area) ** 0.5, down, right),
            colours=(brightness, contrast, saturation),
        )
