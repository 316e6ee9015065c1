"""Adapters with weights that are no longer the text's, so that equality means something."""

import pytest
import torch

from ipa_train.adapter import IPAdapter, LinearProjector, MLPProjector, Resampler
from ipa_train.bases.tiny import randomise

PROJECTORS = {"linear": LinearProjector, "plus": Resampler, "full": MLPProjector}


def random_adapter(base, image_encoder, variant, **options):
    """An adapter of this variant, not attached."""
    projector = PROJECTORS[variant]
    torch.manual_seed(0)
    projector = projector(
        feature_dim=image_encoder.feature_dim(projector.feature_kinds[0]), context_dim=base.context_dim, **options
    )
    return randomise(IPAdapter(projector=projector, sites=base.attention_sites()), seed=5)


@pytest.fixture
def make_adapter(base, image_encoder):
    """A function from variant to a random adapter for the tiny SD 1.5, not attached."""

    def make(variant, **options):
        return random_adapter(base, image_encoder, variant, **options)

    return make


@pytest.fixture(scope="session")
def models_of(tiny_models, tiny_sd21, tiny_sdxl):
    """Folders of base and image encoder, by the base's family."""
    return {"sd15": tiny_models, "sd21": tiny_sd21, "sdxl": tiny_sdxl}
