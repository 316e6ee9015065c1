"""Which class a folder's pipeline belongs to, for commands that are given nothing but the folder."""

from typing import Any

from ipa_train.bases.base import Base
from ipa_train.bases.flux import Flux
from ipa_train.bases.folders import family_of, pipeline_class
from ipa_train.bases.sd import StableDiffusion
from ipa_train.bases.sd3 import StableDiffusion3
from ipa_train.bases.sdxl import StableDiffusionXL
from ipa_train.errors import ConfigError

FAMILIES: tuple[type[Base], ...] = (StableDiffusion, StableDiffusionXL, StableDiffusion3, Flux)


def load_base(path: str, **options: Any) -> Base:
    """Load whichever family is there, by its own ``from_pretrained``.

    Raises:
        ConfigError: none of them.
    """
    found = pipeline_class(path, revision=options.get("revision"))
    for family in FAMILIES:
        if family.pipeline_class == family_of(found):
            return family.from_pretrained(path, **options)  # type: ignore[attr-defined]
    known = ", ".join(family.pipeline_class for family in FAMILIES)
    raise ConfigError(f"base.path={path}: a {found} is none of the bases known here: {known}.")
