"""Two steps of SD 3: flow targets at logit-normal timesteps, through a projector that knows them."""

from functools import partial

import torch

from ipa_train.adapter import TimeResampler
from ipa_train.bases import StableDiffusion3
from ipa_train.diffusion import LogitNormalTimesteps
from tests.training.conftest import make_batch


def test_two_steps_move_every_weight_of_the_adapter_and_none_of_the_base(make_module, tiny_sd3):
    module = make_module(
        base=StableDiffusion3.from_pretrained(str(tiny_sd3)),
        projector=partial(TimeResampler, num_tokens=8, dim=64, heads=1),
        timesteps=LogitNormalTimesteps(),
    )
    assert not module.null_features[0].any()
    optimizer = module.make_optimizer(module.adapter.parameters())
    frozen = {name: weight.clone() for name, weight in module.base.state_dict().items()}
    before = {name: weight.clone() for name, weight in module.adapter.state_dict().items()}
    for step in range(2):
        loss = module.training_step(make_batch(range(4 * step, 4 * step + 4)), step)
        assert loss.isfinite()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for name, weight in module.adapter.state_dict().items():
        assert weight.isfinite().all(), name
        assert not torch.equal(weight, before[name]), name
    assert all(torch.equal(weight, frozen[name]) for name, weight in module.base.state_dict().items())
