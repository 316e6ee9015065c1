"""Loading a frozen vision model of the family that was asked for, whole, or saying in one line why not."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedModel

from ipa_train.errors import ConfigError
from ipa_train.runtime.precision import to_dtype

_CHOICES = {
    "clip": "vit_h",
    "clip_vision_model": "vit_h",
    "siglip": "siglip_so400m",
    "siglip_vision_model": "siglip_so400m",
    "siglip2": "siglip2_so400m",
    "siglip2_vision_model": "siglip2_so400m",
    "dinov2": "dinov2_large",
    "dinov2_with_registers": "dinov2_large",
    "dinov3_vit": "dinov3_large",
}
"""For each model_type that some encoder takes, what to choose as ``image_encoder``."""


@dataclass(frozen=True)
class Pretrained:
    """A model as it is stored, where it came from, and the precision in which it is to run."""

    model: Any
    path: str
    subfolder: str
    precision: torch.dtype


def load_vision_model(
    path: str,
    classes: Mapping[str, type[PreTrainedModel]],
    *,
    subfolder: str,
    revision: str | None,
    dtype: str,
) -> Pretrained:
    """Load from a local folder or hub id; ``classes`` are the models that will do, by their ``model_type``.

    Raises:
        ConfigError: nothing there to load, a model of another type, or one with weights missing.
    """
    where = f"image_encoder.path={path}" + (f" (subfolder {subfolder})" if subfolder else "")
    precision = to_dtype(dtype, option="image_encoder.dtype")
    try:
        config = AutoConfig.from_pretrained(path, subfolder=subfolder, revision=revision)
        _require_type(config, classes, where)
        model, report = classes[config.model_type].from_pretrained(
            path, subfolder=subfolder, dtype="auto", revision=revision, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        if isinstance(error, ConfigError):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"{where}: cannot load an image encoder: {reason} Give a folder that holds config.json and "
            f"model.safetensors of {_in_words(classes)}, or its hub id."
        ) from error
    if missing := sorted(report["missing_keys"]):
        raise ConfigError(f"{where}: {len(missing)} weights are missing, e.g. {', '.join(missing[:3])}.")
    return Pretrained(model, str(path), subfolder, precision)


def _require_type(config: Any, classes: Mapping[str, type[PreTrainedModel]], where: str) -> None:
    found = config.model_type
    if found not in classes:
        choice = _CHOICES.get(found)
        advice = f"choose image_encoder={choice} for it, or " if choice else ""
        raise ConfigError(f"{where}: this is a {found!r} model; {advice}give a folder with {_in_words(classes)}.")
    if found == "clip_vision_model" and "WithProjection" not in str(config.architectures):
        raise ConfigError(
            f"{where}: {config.architectures} has no projection, so it gives no pooled embedding and diffusers "
            "cannot load it as an image encoder; give a CLIPVisionModelWithProjection."
        )


def _in_words(classes: Mapping[str, type[PreTrainedModel]]) -> str:
    return f"a {' or '.join(dict.fromkeys(model.__name__ for model in classes.values()))}"
