"""The maths agrees with diffusers' schedulers and with its own identities."""

import pytest
import torch
from diffusers import DDPMScheduler

from ipa_train.diffusion import Objective, UniformTimesteps, min_snr_weights
from ipa_train.errors import ConfigError
from ipa_train.runtime.seeding import Draws

SCHEDULER = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
ALPHAS = SCHEDULER.alphas_cumprod


def objective(prediction_type="epsilon", **options):
    return Objective(prediction_type=prediction_type, alphas_cumprod=ALPHAS, **options)


def test_add_noise_and_targets_are_those_of_diffusers():
    latents, noise = torch.randn(2, 3, 4, 8, 8)
    timesteps = torch.tensor([0, 500, 999])
    expected = SCHEDULER.add_noise(latents, noise, timesteps)
    torch.testing.assert_close(objective().add_noise(latents, noise, timesteps), expected)
    assert torch.equal(objective().target(latents, noise, timesteps), noise)
    velocity = SCHEDULER.get_velocity(latents, noise, timesteps)
    torch.testing.assert_close(objective("v_prediction").target(latents, noise, timesteps), velocity)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_min_snr_weights_the_error_in_x0_by_min_of_snr_and_gamma(prediction_type):
    """The same error in x_0 must cost the same whichever quantity is predicted (arXiv 2303.09556, section 3.4)."""
    latents, noise = torch.randn(2, 5, 4, 8, 8)
    timesteps = torch.tensor([1, 100, 400, 700, 999])
    o = objective(prediction_type, min_snr_gamma=5.0)
    a = ALPHAS[timesteps].reshape(-1, 1, 1, 1)
    noisy = o.add_noise(latents, noise, timesteps)
    wrong_x0 = latents + 0.1
    wrong_noise = (noisy - a.sqrt() * wrong_x0) / (1 - a).sqrt()
    losses = o.losses(o.target(wrong_x0, wrong_noise, timesteps), o.target(latents, noise, timesteps), timesteps)
    snr = (a / (1 - a)).flatten()
    torch.testing.assert_close(losses, 0.1**2 * snr.clamp(max=5.0), rtol=1e-3, atol=1e-6)


def test_min_snr_needs_a_positive_gamma():
    with pytest.raises(ConfigError, match="min_snr_gamma must be above 0"):
        objective(min_snr_gamma=0.0)
    assert min_snr_weights(torch.tensor([0.5]), gamma=5.0, prediction_type="epsilon") == 1.0


def test_noise_offset_shifts_whole_channels():
    draws = Draws(0, torch.arange(400))
    plain = objective().draw_noise(draws, (4, 8, 8)).mean(dim=(2, 3)).std()
    shifted = objective(noise_offset=0.5).draw_noise(draws, (4, 8, 8)).mean(dim=(2, 3)).std()
    assert plain == pytest.approx(1 / 8, rel=0.1)
    assert shifted == pytest.approx((1 / 64 + 0.25) ** 0.5, rel=0.1)


def test_timesteps_cover_the_whole_range_uniformly():
    timesteps = UniformTimesteps().draw(Draws(0, torch.arange(100_000)), 1000)
    assert timesteps.min() == 0
    assert timesteps.max() == 999
    counts = torch.bincount(timesteps // 100, minlength=10).double()
    assert ((counts - 10_000) ** 2 / 10_000).sum() < 30, "chi-squared with 9 degrees of freedom"
