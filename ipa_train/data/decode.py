"""Bytes of one stored image -> the training pixels and the image prompt, both uint8.

The geometry, rounding included, is that of the tools the released adapters were trained with: ``Resize(shortest side,
bilinear)`` and ``CenterCrop`` for the pixels, ``CLIPImageProcessor`` (bicubic) on the uncropped picture for the image
prompt. Conversion to float and normalisation happen on the device.

A JPEG that was made smaller ahead of training (``ipa data reshard``) says in its comment what it was cut from, so that
SDXL is told the size and crop of the picture that was downloaded.
"""

import io
import re
import warnings
from dataclasses import dataclass

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from jaxtyping import UInt8
from numpy import ndarray
from PIL import Image, ImageOps, UnidentifiedImageError

from ipa_train.errors import ConfigError, DataError

MAX_PIXELS = 50_000_000
"""What training takes unless data.max_pixels says otherwise."""
MAX_PIXELS_OF_ONE = 200_000_000
"""Of a picture that a user names by itself."""
_FORMATS = ("JPEG", "PNG", "WEBP")
_EXIF_SEARCH_BYTES = 65_536
_EXIF_ORIENTATION = 0x0112
_LYING_ORIENTATIONS = (5, 6, 7, 8)  # of EXIF: height and width are exchanged when the picture is put upright
_COMMENT = "ipa-train original_size={}x{} crop_top_left={},{}"
_COMMENT_OF_JPEG = re.compile(rb"\xff\xfe.." + _COMMENT.format(*[r"(\d{1,8})"] * 4).encode(), re.DOTALL)
_COMMENT_SEARCH_BYTES = 1024


@dataclass(frozen=True)
class Placement:
    """Where the training pixels come from; (height, width) and (top, left) in pixels, as SDXL is told."""

    original_size: tuple[int, int]
    crop_top_left: tuple[int, int]
    """Of the training crop in the resized picture."""

    def comment(self) -> str:
        """For a JPEG of these very pixels: whoever decodes it is given this placement."""
        return _COMMENT.format(*self.original_size, *self.crop_top_left)


class Decoder:
    """Decodes strictly: a truncated or malformed picture is an error, never a grey area in the training data."""

    def __init__(self, *, max_pixels: int = MAX_PIXELS) -> None:
        if max_pixels < 1:
            raise ConfigError(f"data.max_pixels must be at least 1, got {max_pixels}.")
        self.max_pixels = max_pixels

    def __call__(
        self,
        data: bytes,
        *,
        pixels: UInt8[ndarray, "h w c"],
        crop_at: tuple[float, float] | None = None,
        flip: bool = False,
    ) -> tuple[Placement, UInt8[ndarray, "p q c"]]:
        """Decode one stored image into the array ``pixels``, resized to cover it and cropped; return it whole, too.

        ``crop_at`` places the training crop, from (0, 0), the top left, to (1, 1); None is the centre. ``flip`` mirrors
        the training crop.

        Raises:
            DataError: not an RGB-convertible JPEG, PNG or WebP, damaged, or of more than ``max_pixels``: as it is
                stored, or resized, if it is a long strip.
        """
        picture = decode(data, max_pixels=self.max_pixels)
        stored, size = picture.shape[:2], pixels.shape[:2]
        resized = covering_size(stored, size)
        _check_size(*resized, self.max_pixels, "would, resized, have")
        if crop_at is None:  # torchvision rounds half to even here, and CLIPImageProcessor rounds down
            corner = round((resized[0] - size[0]) / 2), round((resized[1] - size[1]) / 2)
        else:
            down, right = crop_at
            corner = int(down * (resized[0] - size[0] + 1)), int(right * (resized[1] - size[1] + 1))
        _fill(pixels, picture, resized, corner, flip=flip, mode="bilinear")
        return _place_in_original(data, stored, resized, corner), picture


def fill_image_prompt(
    out: UInt8[ndarray, "p q c"], picture: UInt8[ndarray, "h w c"], *, flip: bool, max_pixels: int
) -> None:
    """Fill ``out`` with a picture as CLIPImageProcessor resizes and crops it, mirrored if ``flip``.

    Raises:
        DataError: it is a long strip, and would, resized, have more than ``max_pixels``.
    """
    size = out.shape[:2]
    resized = covering_size(picture.shape[:2], size)
    _check_size(*resized, max_pixels, "would, resized for the image encoder, have")
    middle = (resized[0] - size[0]) // 2, (resized[1] - size[1]) // 2
    _fill(out, picture, resized, middle, flip=flip, mode="bicubic")


def _place_in_original(
    data: bytes, stored: tuple[int, int], resized: tuple[int, int], corner: tuple[int, int]
) -> Placement:
    """The placement, seen from what the stored picture was cut from, if it says so."""
    found = _COMMENT_OF_JPEG.search(data, 0, _COMMENT_SEARCH_BYTES)
    if not found:
        return Placement(stored, corner)
    height, width, top, left = map(int, found.groups())
    before = round(top * resized[0] / stored[0]), round(left * resized[1] / stored[1])
    return Placement((height, width), (before[0] + corner[0], before[1] + corner[1]))


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
    except UnidentifiedImageError as error:
        raise DataError("cannot decode: it is no JPEG, PNG or WebP") from error
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
    return np.array(ImageOps.exif_transpose(image))


def _decode_other(data: bytes, max_pixels: int) -> ndarray:
    with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
        _check_size(image.height, image.width, max_pixels)
        image.load()
        return np.array(_to_rgb(ImageOps.exif_transpose(image)))


def _fill(
    out: UInt8[ndarray, "h w c"],
    picture: ndarray,
    resized: tuple[int, int],
    corner: tuple[int, int],
    *,
    flip: bool,
    mode: str,
) -> None:
    """Fill ``out`` with what lies at ``corner`` of the picture that is resized, and then perhaps mirrored."""
    if resized != picture.shape[:2]:
        # On bytes torch computes what Pillow does, in the same fixed-point numbers (the results differ by one level in
        # a few of 1,000 values), but with vector instructions: 2 to 4 times as fast.
        image = torch.from_numpy(picture).permute(2, 0, 1)[None]
        picture = F.interpolate(image, resized, mode=mode, antialias=True)[0].permute(1, 2, 0).numpy()
    if flip:
        picture = picture[:, ::-1]
    (top, left), (height, width) = corner, out.shape[:2]
    out[:] = picture[top : top + height, left : left + width]


def _check_size(height: int, width: int, max_pixels: int, verb: str = "claims") -> None:
    if height * width > max_pixels:
        raise DataError(f"{verb} {width} x {height} pixels, above data.max_pixels={max_pixels}")


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
