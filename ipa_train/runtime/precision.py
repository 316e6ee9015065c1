"""Precisions by name."""

import torch

from ipa_train.errors import ConfigError, did_you_mean

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def to_dtype(name: str, *, option: str = "dtype") -> torch.dtype:
    """Return the torch dtype called ``name``; ``option`` is where the user gave it, for the message if there is none.

    Raises:
        ConfigError: none of float32, bfloat16 and float16.
    """
    if name not in _DTYPES:
        raise ConfigError(f"{option}={name!r} is not a precision.{did_you_mean(name, _DTYPES)}")
    return _DTYPES[name]
