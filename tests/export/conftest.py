"""Adapters with weights that are no longer the text's, so that equality means something."""

import pytest
import torch

from ipa_train.adapter import IPAdapter, LinearProjector, MLPProjector, Resampler
from ipa_train.bases.tiny import randomise

PROJECTORS = {"linear": LinearProjector, "plus": Resampler, "full": MLPProjector}


@pytest.fixture
def make_adapter(base, image_encoder):
    """A function from variant to a random adapter, not attached."""

    def make(variant, for_base=None, **options):
        projector = PROJECTORS[variant]
        b = for_base or base
        torch.manual_seed(0)
        projector = projector(
            feature_dim=image_encoder.feature_dim(projector.feature_kinds[0]), context_dim=b.context_dim, **options
        )
        return randomise(IPAdapter(projector=projector, sites=b.attention_sites()), seed=5)

    return make
