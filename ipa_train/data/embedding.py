"""``KEY.npy``: an embedding that is stored with a sample and taken as it is, of a face, a palette, a sound."""

import io
import math

import numpy as np
from jaxtyping import Float32
from numpy import ndarray

from ipa_train.errors import DataError

_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
_DTYPES = ("float16", "float32")


def read_embedding(data: bytes, shape: tuple[int, ...] | None) -> Float32[ndarray, "*s f"]:
    """Read an array that ``numpy.save`` wrote; its header is checked before anything else is, and nothing is unpickled.

    Raises:
        DataError: no such array, or not of this ``shape`` (None: any (f,) or (s, f)), in fp16 or fp32, and finite
            throughout.
    """
    stream = io.BytesIO(data)
    try:
        found, _, dtype = _HEADERS[np.lib.format.read_magic(stream)](stream)
    except Exception as error:  # a damaged header makes NumPy raise nearly anything, errors of its tokenizer among them
        raise DataError("its embedding is no array of numpy.save") from error
    if dtype.name not in _DTYPES:
        raise DataError(f"its embedding is of {dtype.name}, not {' or '.join(_DTYPES)}")
    if shape is not None and found != shape:
        raise DataError(f"its embedding has shape {found}, but this run's image encoder takes {shape}")
    if len(found) not in (1, 2) or min(found) < 1:
        raise DataError(f"its embedding has shape {found}, which is neither (f,) nor (s, f)")
    if len(data) - stream.tell() != math.prod(found) * dtype.itemsize:
        raise DataError(f"its embedding of shape {found} is not as long as that: truncated?")
    values = np.load(io.BytesIO(data), allow_pickle=False).astype(np.float32)
    if not np.isfinite(values).all():
        raise DataError("its embedding is not finite")
    return values
