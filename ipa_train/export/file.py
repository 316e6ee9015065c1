"""Adapter files: written atomically with an account of themselves, read without ever unpickling."""

import json
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ipa_train.adapter import AttentionSite, IPAdapter
from ipa_train.errors import ConfigError, ExportError
from ipa_train.export.layouts import to_interchange
from ipa_train.runtime.files import atomic_write
from ipa_train.version import __version__

NAME = "ip_adapter"
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


def write_export(
    folder: Path,
    adapter: IPAdapter,
    sites: Sequence[AttentionSite],
    *,
    dtype: str = "fp32",
    metadata: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Write ``ip_adapter.safetensors`` and ``ip_adapter.bin`` into ``folder``; return their paths.

    ``metadata`` (plain values) goes into the safetensors header, each value as JSON.
    """
    return write_state(folder, to_interchange(adapter, sites), dtype=dtype, metadata=metadata or {})


def write_state(folder: Path, state: Mapping[str, Tensor], *, dtype: str, metadata: Mapping[str, Any]) -> list[Path]:
    """Write an interchange state in both layouts; see :func:`write_export`."""
    if dtype not in _DTYPES:
        raise ConfigError(f"dtype={dtype} is not a precision for exports; allowed: {', '.join(_DTYPES)}.")
    tensors = {name: weight.detach().to("cpu", _DTYPES[dtype]).contiguous() for name, weight in state.items()}
    header = {"format": "pt", "ipa_train_version": __version__}
    header |= {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
    # Loaders of .bin files take the two parts in this order only.
    nested: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for name, weight in tensors.items():
        part, _, rest = name.partition(".")
        nested[part][rest] = weight
    folder.mkdir(parents=True, exist_ok=True)
    safetensors, bin_ = folder / f"{NAME}.safetensors", folder / f"{NAME}.bin"
    try:
        with atomic_write(safetensors) as temporary:
            save_file(tensors, temporary, metadata=header)
        with atomic_write(bin_) as temporary, temporary.open("wb") as file:
            torch.save(nested, file)
    except (SafetensorError, RuntimeError) as error:
        # Both libraries wrap the system's error (disk full, say) in one of their own.
        raise OSError(str(error).splitlines()[0]) from error
    return [safetensors, bin_]


def read_adapter_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read an adapter in any interchange layout: the flat state and the header's metadata.

    Raises:
        ExportError: no such file, damaged, or something else than tensors in it.
    """
    if not path.is_file():
        raise ExportError(f"{path}: no such file; give an adapter's .safetensors or .bin.")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
        return _flatten(torch.load(path, map_location="cpu", weights_only=True), path), {}
    except pickle.UnpicklingError as error:
        raise ExportError(
            f"{path}: holds more than tensors, and is not unpickled; ask for a .safetensors file."
        ) from error
    except ExportError:
        raise
    except Exception as error:  # torch's reader stumbles over garbage with whatever comes to it, KeyError included
        reason = (str(error).splitlines() or ["unreadable"])[0]
        raise ExportError(f"{path}: damaged or no adapter file: {reason}") from error


def _flatten(content: object, path: Path) -> dict[str, Tensor]:
    """``{"image_proj": {...}, "ip_adapter": {...}}``, or flat keys, -> flat keys."""
    if not isinstance(content, dict):
        raise ExportError(f"{path}: holds a {type(content).__name__}, not the tensors of an adapter.")
    flat = {}
    for name, value in content.items():
        for rest, weight in value.items() if isinstance(value, dict) else [("", value)]:
            if isinstance(weight, Tensor):
                flat[f"{name}.{rest}" if rest else str(name)] = weight
    return flat
