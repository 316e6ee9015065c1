"""Bytes of one stored image -> the training pixels and the image prompt, both uint8.

Resizing and cropping are one pass over the crop's own region. The geometry, rounding included, is that of the tools the
released adapters were trained with: ``Resize(shortest side, bilinear)`` and ``CenterCrop`` for the pixels,
``CLIPImageProcessor`` (bicubic) on the uncropped picture for the image prompt. Conversion to float and normalisation
happen on the device.
"""

import io
import warnings
from dataclasses import dataclass

import numpy as np
import simplejpeg
import torch
from jaxtyping import UInt8
from numpy import ndarray
from PIL import Image, ImageOps
from torch import Tensor

from ipa_train.errors import ConfigError, DataError, did_you_mean
from ipa_train.runtime.seeding import Draws

_CROPS = ("center", "random")
_FORMATS = ("JPEG", "PNG", "WEBP")
_EXIF_SEARCH_BYTES = 65_536


@dataclass(frozen=True)
class Decoded:
    """One picture, ready to be stacked into a batch."""

    pixels: UInt8[Tensor, "c h w"]
    image_prompt: UInt8[Tensor, "c p q"]
    original_size: tuple[int, int]
    """Height and width of the stored picture."""
    crop_top_left: tuple[int, int]
    """Of the training crop, in pixels of the resized picture."""


class Decoder:
    """Decodes strictly: a truncated or malformed picture is an error, never a grey area in the training data."""

    def __init__(
        self,
        *,
        resolution: int,
        image_prompt_size: int = 224,
        crop: str = "center",
        flip_rate: float = 0.0,
        max_pixels: int = 50_000_000,
        seed: int = 0,
    ) -> None:
        if resolution < 8 or resolution % 8:
            near = max(8, round(resolution / 8) * 8)
            raise ConfigError(f"data.resolution={resolution} must be a multiple of 8 (latents are); try {near}.")
        if crop not in _CROPS:
            raise ConfigError(f"data.crop={crop!r} is not a crop.{did_you_mean(crop, _CROPS)}")
        for name, value in (("image_prompt_size", image_prompt_size), ("max_pixels", max_pixels)):
            if value < 1:
                raise ConfigError(f"data.{name} must be at least 1, got {value}.")
        if not 0.0 <= flip_rate <= 1.0:
            raise ConfigError(f"data.flip_rate must be between 0 and 1, got {flip_rate}.")
        self.resolution, self.image_prompt_size = resolution, image_prompt_size
        self.crop, self.flip_rate, self.max_pixels, self.seed = crop, flip_rate, max_pixels, seed

    def __call__(self, data: bytes, position: int) -> Decoded:
        """Decode one stored image; the random crop and flip are keyed by its position in the stream.

        Raises:
            DataError: not an RGB-convertible JPEG, PNG or WebP, damaged, or of more than ``max_pixels``.
        """
        draws = Draws(self.seed, torch.tensor([position]))
        image = decode_image(data, max_pixels=self.max_pixels)
        if self.flip_rate and draws.uniform("flip").item() < self.flip_rate:
            image = ImageOps.mirror(image)  # both outputs, so that the prompt stays a picture of the target
        size = self.resolution
        height, width = resized_size(image, size)
        if self.crop == "center":
            # torchvision rounds half to even here, and CLIPImageProcessor below rounds down.
            top, left = round((height - size) / 2), round((width - size) / 2)
        else:
            down, right = draws.uniform("crop", (2,))[0].tolist()
            top, left = int(down * (height - size + 1)), int(right * (width - size + 1))
        prompt_size = self.image_prompt_size
        prompt_height, prompt_width = resized_size(image, prompt_size)
        prompt_corner = (prompt_height - prompt_size) // 2, (prompt_width - prompt_size) // 2
        return Decoded(
            pixels=resize_and_crop(image, size, (top, left), Image.Resampling.BILINEAR),
            image_prompt=resize_and_crop(image, prompt_size, prompt_corner, Image.Resampling.BICUBIC),
            original_size=(image.height, image.width),
            crop_top_left=(top, left),
        )


def decode_image(data: bytes, *, max_pixels: int) -> Image.Image:
    """Decode to an upright RGB picture; its size is checked before a pixel is decoded.

    A JPEG of 631 bytes may claim 30,000 x 30,000 pixels, which costs 12 s and 1.5 GB to find out.

    Raises:
        DataError: not a JPEG, PNG or WebP, damaged, or of more than ``max_pixels``.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, of large sizes and odd EXIF blocks: both are judged here
            return _decode_jpeg(data, max_pixels) if data[:2] == b"\xff\xd8" else _decode_other(data, max_pixels)
    except DataError:
        raise
    except Exception as error:  # damaged pictures make decoders raise nearly anything, struct.error among them
        raise DataError(
            f"cannot decode: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from error


def _decode_jpeg(data: bytes, max_pixels: int) -> Image.Image:
    """Decode strictly, which Pillow does not: it fills damaged JPEG data with grey and says nothing."""
    height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    _check_size(height, width, max_pixels)
    if colours in ("CMYK", "YCCK"):
        simplejpeg.decode_jpeg(data, "CMYK", strict=True)  # only to be told of damage: Pillow knows the colours
        return _decode_other(data, max_pixels)
    image = Image.fromarray(simplejpeg.decode_jpeg(data, "RGB", strict=True))
    if b"Exif\0\0" not in data[:_EXIF_SEARCH_BYTES]:
        return image
    with Image.open(io.BytesIO(data), formats=_FORMATS) as header:
        image.info["exif"] = header.info.get("exif", b"")
    return ImageOps.exif_transpose(image)


def _decode_other(data: bytes, max_pixels: int) -> Image.Image:
    with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
        _check_size(image.height, image.width, max_pixels)
        image.load()
        return _to_rgb(ImageOps.exif_transpose(image))


def resized_size(image: Image.Image, shortest: int) -> tuple[int, int]:
    """Height and width after the shorter side became ``shortest``, rounded down as the reference tools do."""
    if image.width <= image.height:
        return int(shortest * image.height / image.width), shortest
    return shortest, int(shortest * image.width / image.height)


def resize_and_crop(
    image: Image.Image, size: int, corner: tuple[int, int], filter_: Image.Resampling
) -> UInt8[Tensor, "c h w"]:
    """The square of ``size`` at ``corner`` (top, left) of the picture resized to a shorter side of ``size``."""
    height, width = resized_size(image, size)
    top, left = corner
    if (height, width) == (image.height, image.width):  # stored at the training size
        return _to_tensor(image.crop((left, top, left + size, top + size)))
    rows, columns = image.height / height, image.width / width
    box = (left * columns, top * rows, (left + size) * columns, (top + size) * rows)
    box = (box[0], box[1], min(box[2], image.width), min(box[3], image.height))
    return _to_tensor(image.resize((size, size), filter_, box=box))


def _to_tensor(image: Image.Image) -> UInt8[Tensor, "c h w"]:
    channels_first: ndarray = np.asarray(image).transpose(2, 0, 1)
    return torch.from_numpy(np.ascontiguousarray(channels_first))


def _check_size(height: int, width: int, max_pixels: int) -> None:
    if height * width > max_pixels:
        raise DataError(f"claims {width} x {height} pixels, above data.max_pixels={max_pixels}")


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode.

    Grey of 16 bits is scaled, where Pillow would clip nearly all of it to white; transparency is laid on white, which
    is what its author saw on a page.
    """
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")
