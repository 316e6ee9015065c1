"""Folders of diffusers pipelines, and complaints about them in one line."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from diffusers import DiffusionPipeline

from ipa_train.errors import ConfigError

# Which choice of base= takes a pipeline.
_CHOICES = {
    "StableDiffusionPipeline": "sd15 or base=sd21",
    "StableDiffusionXLPipeline": "sdxl",
    "StableDiffusion3Pipeline": "sd3",
    "FluxPipeline": "flux_dev or base=flux_schnell",
}


def pipeline_class(path: str, *, revision: str | None = None) -> str:
    """Name of the pipeline class of a folder or hub id, before gigabytes are read.

    Raises:
        ConfigError: no diffusers folder there.
    """
    folder = Path(path)
    if folder.exists() and not (folder / "model_index.json").is_file():
        raise ConfigError(
            f"base.path={path}: no model_index.json there; give the folder of a diffusers pipeline (with unet/ or "
            "transformer/, vae/, text_encoder/, tokenizer/, scheduler/), or a hub id such as "
            "stable-diffusion-v1-5/stable-diffusion-v1-5."
        )
    try:
        if folder.exists():
            index = json.loads((folder / "model_index.json").read_text())
        else:
            index = DiffusionPipeline.load_config(path, revision=revision)
        return str(index.get("_class_name"))
    except (OSError, ValueError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"base.path={path}: neither a local folder nor a hub id that can be reached: {reason}"
        ) from error


def require_pipeline_class(path: str, wanted: str, *, revision: str | None = None) -> None:
    """Refuse a folder of another family; variants of the pipeline (img2img and the like) hold the same models.

    Raises:
        ConfigError: names the choice that takes it.
    """
    found = pipeline_class(path, revision=revision)
    if family_of(found) == wanted:
        return
    choice = _CHOICES.get(family_of(found))
    advice = f"choose base={choice}" if choice else f"base={_CHOICES[wanted]} needs a {wanted}"
    raise ConfigError(f"base.path={path}: this is a {found}: {advice}.")


def family_of(name: str) -> str:
    """Name of the text-to-image pipeline whose models a pipeline of this name holds; empty where it is none of ours.

    The longest that it begins with: StableDiffusionXLInpaintPipeline is an SDXL.
    """
    stems = {known.removesuffix("Pipeline"): known for known in _CHOICES}
    # What follows must begin another word: Flux2Pipeline is no Flux.
    fitting = [stem for stem in stems if re.match(rf"{stem}[A-Z]", name)]
    return stems[max(fitting, key=len)] if fitting else ""


@contextmanager
def loading(path: str) -> Iterator[None]:
    """Turn what the libraries say of weights that cannot be loaded into one line."""
    try:
        yield
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"base.path={path}: cannot load this base: {reason}") from error
