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
from jaxtyping import UInt8
from numpy import ndarray
from PIL import Image, ImageOps

from ipa_train.errors import ConfigError, DataError

_FORMATS = ("JPEG", "PNG", "WEBP")
_EXIF_SEARCH_BYTES = 65_536
_EXIF_ORIENTATION = 0x0112
_LYING_ORIENTATIONS = (5, 6, 7, 8)  # of EXIF: height and width are exchanged when the picture is put upright


@dataclass(frozen=True)
class Placement:
    """Where the training pixels come from; (height, width) and (top, left) in pixels, as SDXL is told."""

    original_size: tuple[int, int]
    crop_top_left: tuple[int, int]
    """Of the training crop in the resized picture."""


class Decoder:
    """Decodes strictly: a truncated or malformed picture is an error, never a grey area in the training data."""

    def __init__(self, *, max_pixels: int = 50_000_000) -> None:
        if max_pixels < 1:
            raise ConfigError(f"data.max_pixels must be at least 1, got {max_pixels}.")
        self.max_pixels = max_pixels

    def __call__(
        self,
        data: bytes,
        *,
        pixels: UInt8[ndarray, "h w c"],
        image_prompt: UInt8[ndarray, "p q c"] | None = None,
        crop_at: tuple[float, float] | None = None,
        flip: bool = False,
    ) -> Placement:
        """Decode one stored image into the arrays ``pixels`` and ``image_prompt``, resized to cover them and cropped.

        ``crop_at`` places the training crop, from (0, 0), the top left, to (1, 1); None is the centre. ``flip`` mirrors
        both outputs, so that the prompt stays a picture of the target.

        Raises:
            DataError: not an RGB-convertible JPEG, PNG or WebP, damaged, or of more than ``max_pixels``.
        """
        picture = decode(data, max_pixels=self.max_pixels)
        if flip:
            picture = picture[:, ::-1]
        stored, size = picture.shape[:2], pixels.shape[:2]
        resized = covering_size(stored, size)
        if crop_at is None:  # torchvision rounds half to even here, and CLIPImageProcessor below rounds down
            corner = round((resized[0] - size[0]) / 2), round((resized[1] - size[1]) / 2)
        else:
            down, right = crop_at
            corner = int(down * (resized[0] - size[0] + 1)), int(right * (resized[1] - size[1] + 1))
        pillow = None if resized == stored and image_prompt is None else Image.fromarray(picture)
        if pillow is None or resized == stored:
            top, left = corner
            pixels[:] = picture[top : top + size[0], left : left + size[1]]
        else:
            pixels[:] = _resize_and_crop(pillow, resized, corner, size, Image.Resampling.BILINEAR)
        if pillow is not None and image_prompt is not None:
            size = image_prompt.shape[:2]
            resized = covering_size(stored, size)
            middle = (resized[0] - size[0]) // 2, (resized[1] - size[1]) // 2
            image_prompt[:] = _resize_and_crop(pillow, resized, middle, size, Image.Resampling.BICUBIC)
        return Placement(stored, corner)


def covering_size(stored: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """The smallest (height, width) of the stored shape that covers ``size``, rounded down as torchvision rounds.

    For a square ``size`` it is the shorter side that becomes ``size``.
    """
    (height, width), (rows, columns) = stored, size
    if width * rows <= height * columns:
        return max(rows, int(columns * height / width)), columns
    return rows, max(columns, int(rows * width / height))


def stored_size(data: bytes) -> tuple[int, int]:
    """Height and width of the upright picture that begins with ``data``; (0, 0) if they cannot be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if data[:2] == b"\xff\xd8" and b"Exif\0\0" not in data[:_EXIF_SEARCH_BYTES]:
                height, width, _, _ = simplejpeg.decode_jpeg_header(data)
                return height, width
            with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                exif = Image.Exif()
                exif.load(image.info.get("exif", b""))  # getexif() would decode a whole PNG to look behind its pixels
                lies = exif.get(_EXIF_ORIENTATION) in _LYING_ORIENTATIONS
                return (image.width, image.height) if lies else (image.height, image.width)
    except Exception:  # a header that cannot be read makes these raise nearly anything
        return 0, 0


def decode_image(data: bytes, *, max_pixels: int) -> Image.Image:
    """As :func:`decode`, as an image of Pillow."""
    return Image.fromarray(decode(data, max_pixels=max_pixels))


def decode(data: bytes, *, max_pixels: int, min_size: int = 0) -> UInt8[ndarray, "h w c"]:
    """Decode to an upright RGB picture; its size is checked before a pixel is decoded.

    A JPEG of 631 bytes may claim 30,000 x 30,000 pixels, which costs 12 s and 1.5 GB to find out.

    Where a thumbnail will do, a JPEG may come out up to 8 times smaller, but no side below ``min_size`` pixels; 0 keeps
    its size.

    Raises:
        DataError: not a JPEG, PNG or WebP, damaged, or of more than ``max_pixels``.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, of large sizes and odd EXIF blocks: both are judged here
            is_jpeg = data[:2] == b"\xff\xd8"
            return _decode_jpeg(data, max_pixels, min_size) if is_jpeg else _decode_other(data, max_pixels)
    except DataError:
        raise
    except Exception as error:  # damaged pictures make decoders raise nearly anything, struct.error among them
        raise DataError(
            f"cannot decode: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from error


def _decode_jpeg(data: bytes, max_pixels: int, min_size: int) -> ndarray:
    """Decode strictly, which Pillow does not: it fills damaged JPEG data with grey and says nothing."""
    height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    _check_size(height, width, max_pixels)
    if colours in ("CMYK", "YCCK"):
        simplejpeg.decode_jpeg(data, "CMYK", strict=True)  # only to be told of damage: Pillow knows the colours
        return _decode_other(data, max_pixels)
    picture = simplejpeg.decode_jpeg(data, "RGB", min_height=min_size, min_width=min_size, strict=True)
    if b"Exif\0\0" not in data[:_EXIF_SEARCH_BYTES]:
        return picture
    with Image.open(io.BytesIO(data), formats=_FORMATS) as header:
        image = Image.fromarray(picture)
        image.info["exif"] = header.info.get("exif", b"")
    return np.asarray(ImageOps.exif_transpose(image))


def _decode_other(data: bytes, max_pixels: int) -> ndarray:
    with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
        _check_size(image.height, image.width, max_pixels)
        image.load()
        return np.asarray(_to_rgb(ImageOps.exif_transpose(image)))


def _resize_and_crop(
    image: Image.Image,
    resized: tuple[int, int],
    corner: tuple[int, int],
    size: tuple[int, int],
    filter_: Image.Resampling,
) -> UInt8[ndarray, "h w c"]:
    """The rectangle of ``size`` at ``corner`` of the picture resized to ``resized``."""
    rows, columns = image.height / resized[0], image.width / resized[1]
    box = (corner[1] * columns, corner[0] * rows, (corner[1] + size[1]) * columns, (corner[0] + size[0]) * rows)
    box = (box[0], box[1], min(box[2], image.width), min(box[3], image.height))
    return np.asarray(image.resize((size[1], size[0]), filter_, box=box))


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
