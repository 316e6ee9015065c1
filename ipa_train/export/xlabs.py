"""XLabs' names for Flux adapters <-> the interchange names; diffusers reads both.

The tensors are the same: ``ip_adapter_proj_model.*`` is the projector, and
``double_blocks.N.processor.ip_adapter_double_stream_{k,v}_proj.*`` are the two projections of block N.
"""

import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

from torch import Tensor

from ipa_train.errors import ExportError

T = TypeVar("T")

_PROJECTOR = r"((?:proj|norm)\.(?:weight|bias))"
_FROM = {
    rf"ip_adapter_proj_model\.{_PROJECTOR}": r"image_proj.\1",
    r"double_blocks\.(\d+)\.processor\.ip_adapter_double_stream_([kv])_proj\.(weight|bias)": (
        r"ip_adapter.\1.to_\2_ip.\3"
    ),
}
_TO = {
    rf"image_proj\.{_PROJECTOR}": r"ip_adapter_proj_model.\1",
    r"ip_adapter\.(\d+)\.to_([kv])_ip\.(weight|bias)": (
        r"double_blocks.\1.processor.ip_adapter_double_stream_\2_proj.\3"
    ),
}


def is_xlabs(names: Iterable[str]) -> bool:
    """Whether these are the tensors of an adapter in XLabs' layout."""
    return any(name.startswith("ip_adapter_proj_model.") for name in names)


def from_xlabs(state: Mapping[str, T]) -> dict[str, T]:
    """The flat interchange state of a file in XLabs' layout, or whatever stands under its names.

    Raises:
        ExportError: a tensor that has no place in it.
    """
    return {_renamed(name, _FROM): weight for name, weight in state.items()}


def to_xlabs(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A flat interchange state in XLabs' layout.

    Raises:
        ExportError: the adapter has no place in it: only linear ones of Flux have.
    """
    renamed = {_renamed(name, _TO): weight for name, weight in state.items()}
    for name in state:
        # A UNet's sites have names that would do, but no biases.
        if name.endswith("_ip.weight") and name.removesuffix("weight") + "bias" not in state:
            raise ExportError(f"{name} has no bias beside it, as XLabs' layout, which is for Flux, wants one.")
    return renamed


def _renamed(name: str, table: Mapping[str, str]) -> str:
    for pattern, new in table.items():
        if match := re.fullmatch(pattern, name):
            return match.expand(new)
    raise ExportError(f"{name} has no place in XLabs' layout of linear adapters of Flux.")
