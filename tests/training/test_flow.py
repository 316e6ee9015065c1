"""The same training step, on a base that predicts flow."""

import torch

from ipa_train.runtime.seeding import Draws
from tests.training.conftest import make_batch


def test_the_loss_is_that_of_the_velocity_on_a_straight_line(flux, make_module):
    module = make_module(base=flux)
    batch = make_batch(range(4))
    loss = module.training_step(batch, 0)
    loss.backward()
    assert all(p.grad is not None for p in module.adapter.parameters())
    # The image half starts at zero, so this is the base's own error in the velocity.
    latents = flux.vae.encode(batch.content.pixels)
    draws = Draws(0, batch.positions)
    posterior_noise, noise = draws.normal("noise", (2, 16, 4, 4)).unbind(1)
    x = latents.sample(posterior_noise)
    t = module.timesteps.draw(draws, base_shift=flux.timestep_shift((4, 4)))
    text = flux.encode_text(module.dropout.draw(draws).captions(batch.captions))
    mixed = (1 - t[:, None, None, None]) * x + t[:, None, None, None] * noise
    error = flux.predict(mixed, 1000 * t, text, None) - (noise - x)
    torch.testing.assert_close(loss, error.square().mean())
