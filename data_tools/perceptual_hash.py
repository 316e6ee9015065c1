"""64 bits that stay nearly the same when a picture is encoded again, resized or slightly cropped.

Each says whether one of the 64 lowest frequencies of the grey picture is stronger than the median of them. Brightness,
contrast and hue do not matter; what is mirrored or turned is another picture.
"""

import numpy as np
from jaxtyping import UInt8
from numpy import ndarray
from PIL import Image

_SIZE = 32  # pixels; finer detail is what encoders and resizing change
DECODE_SIZE = 4 * _SIZE  # pixels; a JPEG decoded smaller than that has other bits, 1 of 64 as a rule
_MIN_LEVELS = 1.0  # of 255, what half of the frequencies must reach; below, most bits are rounding and JPEG noise


def _cosines() -> ndarray:
    """The orthonormal DCT-II as a matrix."""
    frequency, place = np.meshgrid(np.arange(_SIZE), np.arange(_SIZE), indexing="ij")
    basis = np.cos(np.pi * (place + 0.5) * frequency / _SIZE) * np.sqrt(2 / _SIZE)
    basis[0] /= np.sqrt(2)
    return basis


_DCT = _cosines()
_BY_FREQUENCY = np.argsort(np.add.outer(np.arange(_SIZE) ** 2, np.arange(_SIZE) ** 2), axis=None, kind="stable")
_LOWEST = _BY_FREQUENCY[1:65]  # the 0th is the mean brightness


def perceptual_hash(picture: UInt8[ndarray, "h w c"]) -> int | None:
    """Hash an RGB picture; None if it is too plain (one colour, a gradient) for its bits to mean anything."""
    # Box filtering, the cheaper way, changes 2 bits of a picture at half its size, and this 0.3.
    grey = Image.fromarray(picture).convert("L").resize((_SIZE, _SIZE), Image.Resampling.BILINEAR)
    strengths = (_DCT @ np.asarray(grey, np.float64) @ _DCT.T).reshape(-1)[_LOWEST]
    if np.median(np.abs(strengths)) < _MIN_LEVELS:
        return None
    return int.from_bytes(np.packbits(strengths > np.median(strengths)).tobytes(), "big")
