"""Adapter files: written atomically with an account of themselves, read without ever unpickling."""

import json
import logging
import pickle
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ipa_train.adapter import AttentionSite, IPAdapter
from ipa_train.errors import ConfigError, ExportError
from ipa_train.export.dumps import interchange_to_dump, is_training_dump
from ipa_train.export.layouts import to_interchange
from ipa_train.export.xlabs import from_xlabs, is_xlabs, to_xlabs
from ipa_train.runtime.files import atomic_write
from ipa_train.version import __version__

NO_EXPORT = "no_export.txt"
"""Stands in a checkpoint in place of its export, and says why there is none."""
NAME = "ip_adapter"
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_log = logging.getLogger(__name__)


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

    Raises:
        ExportError: weights that are not finite in ``dtype``.
        OSError: the folder cannot be written.
    """
    return write_state(folder, to_interchange(adapter, sites), dtype=dtype, metadata=metadata or {})


def write_state(
    folder: Path, state: Mapping[str, Tensor], *, dtype: str, metadata: Mapping[str, Any], layout: str = "interchange"
) -> list[Path]:
    """Write an interchange state as both kinds of file, see :func:`write_export`; or as XLabs' one."""
    if dtype not in _DTYPES:
        raise ConfigError(f"dtype={dtype} is not a precision for exports; allowed: {', '.join(_DTYPES)}.")
    tensors = {name: _portable(name, weight, dtype) for name, weight in state.items()}
    header = {"format": "pt", "ipa_train_version": __version__}
    header |= {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
    folder.mkdir(parents=True, exist_ok=True)
    safetensors, bin_ = folder / f"{NAME}.safetensors", folder / f"{NAME}.bin"
    try:
        with atomic_write(safetensors) as temporary:
            save_file(to_xlabs(tensors) if layout == "xlabs" else tensors, temporary, metadata=header)
        if layout == "xlabs":
            return [safetensors]
        with atomic_write(bin_) as temporary, temporary.open("wb") as file:
            torch.save(nested(tensors), file)
    except (SafetensorError, RuntimeError) as error:
        # Both libraries wrap the system's error (disk full, say) in one of their own.
        raise OSError(str(error).splitlines()[0]) from error
    return [safetensors, bin_]


def nested(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """An interchange state as .bin files have it: in two parts, which some loaders take in this order only."""
    parts: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for name, weight in state.items():
        part, _, rest = name.partition(".")
        parts[part][rest] = weight
    return parts


def _portable(name: str, weight: Tensor, dtype: str) -> Tensor:
    # A copy: of a slice of a larger buffer (sharded training), torch.save would write the whole buffer.
    tensor = weight.detach().to("cpu", _DTYPES[dtype], copy=True).contiguous()
    if not tensor.isfinite().all():
        if weight.isfinite().all():
            largest = weight.abs().max().item()
            raise ExportError(f"{name} reaches {largest:.3g}, and {dtype} ends at 65504: export it in fp32.")
        raise ExportError(f"{name} is not finite: training has diverged; go back to an earlier step.")
    return tensor


def read_adapter_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read an adapter in any interchange layout, or out of a training dump: flat state, and the header's metadata.

    Raises:
        ExportError: no such file, damaged, or something else than tensors in it.
    """
    if not path.is_file():
        raise ExportError(f"{path}: no such file; give an adapter's .safetensors or .bin.")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                places = _find(file.keys(), path)
                return {name: file.get_tensor(place) for name, place in places.items()}, dict(file.metadata() or {})
        # Mapped, so that only what is used is read: dumps hold whole denoisers. torch's older files cannot be.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        flat = _flatten(content, path)
        return {name: flat[place] for name, place in _find(flat, path).items()}, {}
    except pickle.UnpicklingError as error:
        raise ExportError(
            f"{path}: holds more than tensors, and is not unpickled, or is none of torch's; ask for a .safetensors."
        ) from error
    except ExportError:
        raise
    except Exception as error:  # torch's reader stumbles over garbage with whatever comes to it, KeyError included
        reason = (str(error).splitlines() or ["unreadable"])[0]
        raise ExportError(f"{path}: damaged or no adapter file: {reason}") from error


def face_plus_v2(path: Path, metadata: Mapping[str, str]) -> bool | None:
    """Whether a FaceID-Plus adapter is a V2; None, and a warning, where neither its metadata nor its name says so.

    The tensors of both have the same names and shapes; loaders go by the names of the released files.
    """
    if (said := metadata.get("shortcut")) in ("true", "false"):
        return said == "true"
    if match := re.search(r"faceid-?_?plus(v2)?", path.name.lower()):
        return match[1] is not None
    _log.warning(
        "%s: does not say whether it is a FaceID-Plus or a PlusV2; rename it to faceid-plus... or faceid-plusv2...",
        path,
    )
    return None


def _find(names: Iterable[str], path: Path) -> dict[str, str]:
    """Interchange name -> name in the file, of every tensor that is to be read."""
    names = list(names)
    if is_xlabs(names):
        try:
            return from_xlabs({name: name for name in names})
        except ExportError as error:
            raise ExportError(f"{path}: {error}") from error
    if any(name.startswith("adapter_modules.") for name in names) and not is_training_dump(names):
        _advise(path, "a file with adapter_modules in place of ip_adapter")
        return {re.sub("^adapter_modules", NAME, name): name for name in names}
    if not is_training_dump(names):
        return {name: name for name in names}
    places = interchange_to_dump(names)
    _advise(path, f"a dump of a whole training, {len(places)} of its {len(names)} tensors are the adapter")
    return places


def _flatten(content: object, path: Path) -> dict[str, Tensor]:
    """``{"image_proj": {...}, "ip_adapter": {...}}``, or flat keys, -> flat keys."""
    if not isinstance(content, dict):
        raise ExportError(f"{path}: holds a {type(content).__name__}, not the tensors of an adapter.")
    flat = dict(_tensors(content))
    if any(isinstance(value, Tensor) for value in content.values()) and not (is_training_dump(flat) or is_xlabs(flat)):
        _advise(path, "a .bin without the two parts image_proj and ip_adapter")
    return flat


def _tensors(content: Mapping[Any, object], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for name, value in content.items():
        if isinstance(value, Tensor):
            yield f"{prefix}{name}", value
        elif isinstance(value, dict):
            yield from _tensors(value, f"{prefix}{name}.")


def _advise(path: Path, layout: str) -> None:
    _log.warning("%s: %s; other loaders want what `ipa export %s --out FOLDER` makes of it", path, layout, path)
