"""A training module on tiny models, and batches for it without a data loader."""

from functools import partial

import pytest
import torch

from ipa_train.adapter import LinearProjector
from ipa_train.conditioning import ConditionDropout
from ipa_train.data.batch import Batch, Pictures
from ipa_train.diffusion import Objective, UniformTimesteps
from ipa_train.training.module import AdapterTraining
from ipa_train.training.optim import LRSchedule


def make_batch(positions, *, size=32):
    """Pictures and captions that are a function of the positions alone."""
    rows = []
    for position in positions:
        generator = torch.Generator().manual_seed(int(position))
        rows.append(torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8, generator=generator))
    pixels, prompts = torch.stack(rows, dim=1)
    n = len(rows)
    return Batch(
        content=Pictures(pixels=pixels, separate_prompts=prompts),
        captions=[f"caption {int(p)}" for p in positions],
        positions=torch.as_tensor(positions),
        original_sizes=torch.full((n, 2), size),
        crop_top_lefts=torch.zeros(n, 2, dtype=torch.int64),
        target_sizes=torch.full((n, 2), size),
        keys=[f"00000/{int(p)}" for p in positions],
    )


@pytest.fixture
def make_module(base, image_encoder):
    """A function that builds the training module on tiny frozen models; options override the defaults."""

    def make(**options):
        defaults = {
            "base": base,
            "image_encoder": image_encoder,
            "projector": partial(LinearProjector),
            "objective": partial(Objective),
            "optimizer": partial(torch.optim.AdamW, lr=1e-3),
            "timesteps": UniformTimesteps(),
            "dropout": ConditionDropout(),
            "lr_schedule": LRSchedule(),
        }
        return AdapterTraining(**defaults | options)

    return make
