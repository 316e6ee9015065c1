"""The maths agrees with diffusers' schedulers and with its own identities."""

import math

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from ipa_train.diffusion import (
    LogitNormalTimesteps,
    Objective,
    RectifiedFlow,
    UniformTimesteps,
    VariancePreserving,
    min_snr_weights,
)
from ipa_train.errors import ConfigError
from ipa_train.runtime.seeding import Draws

SCHEDULER = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
ALPHAS = SCHEDULER.alphas_cumprod


def objective(base_prediction="epsilon", **options):
    schedule = RectifiedFlow() if base_prediction == "flow" else VariancePreserving(ALPHAS)
    return Objective(base_prediction=base_prediction, schedule=schedule, **options)


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
    assert min_snr_weights(torch.tensor([0.6]), torch.tensor([0.6]), gamma=5.0, prediction_type="epsilon") == 1.0


def test_noise_offset_shifts_whole_channels():
    draws = Draws(0, torch.arange(400))
    plain = objective().draw_noise(draws, (4, 8, 8))[1].mean(dim=(2, 3)).std()
    shifted = objective(noise_offset=0.5).draw_noise(draws, (4, 8, 8))[1].mean(dim=(2, 3)).std()
    assert plain == pytest.approx(1 / 8, rel=0.1)
    assert shifted == pytest.approx((1 / 64 + 0.25) ** 0.5, rel=0.1)


def test_timesteps_cover_the_whole_range_uniformly():
    timesteps = VariancePreserving(ALPHAS).timesteps(UniformTimesteps().draw(Draws(0, torch.arange(100_000))))
    assert timesteps.min() == 0
    assert timesteps.max() == 999
    counts = torch.bincount(timesteps // 100, minlength=10).double()
    assert ((counts - 10_000) ** 2 / 10_000).sum() < 30, "chi-squared with 9 degrees of freedom"


def test_flow_matching_is_that_of_diffusers():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    latents, noise = torch.randn(2, 3, 16, 8, 8)
    timesteps = scheduler.timesteps[[0, 500, 999]]
    noisy = objective("flow").add_noise(latents, noise, timesteps)
    torch.testing.assert_close(noisy, scheduler.scale_noise(latents, timesteps, noise))
    # A whole step along the velocity that is asked for ends at the latents.
    scheduler.set_timesteps(1)
    target = objective("flow").target(latents, noise, timesteps)
    end = scheduler.step(target, scheduler.timesteps[0], noise, return_dict=False)[0]
    torch.testing.assert_close(end, latents)


def test_shifted_timesteps_are_those_of_diffusers():
    u = UniformTimesteps().draw(Draws(0, torch.arange(1000)))
    shifted = UniformTimesteps(shift=3.0).draw(Draws(0, torch.arange(1000)))
    by_base = UniformTimesteps().draw(Draws(0, torch.arange(1000)), base_shift=3.0)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    torch.testing.assert_close(shifted, scheduler.time_shift(math.log(3.0), 1.0, u))
    assert torch.equal(shifted, by_base)


def test_logit_normal_timesteps_prefer_the_middle():
    u = LogitNormalTimesteps().draw(Draws(0, torch.arange(100_000)))
    counts = torch.histc(u, 5, 0.0, 1.0) / 100_000
    expected = torch.distributions.Normal(0.0, 1.0).cdf(torch.logit(torch.tensor([0.2, 0.4, 0.6, 0.8]))).diff()
    torch.testing.assert_close(counts[1:4], expected, atol=0.01, rtol=0.0)
    assert (LogitNormalTimesteps(mean=1.0).draw(Draws(0, torch.arange(1000))) > 0.5).float().mean() > 0.8


def test_zero_terminal_snr_is_that_of_diffusers_and_ends_in_noise_alone():
    rescaled = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", rescale_betas_zero_snr=True
    )
    o = objective("v_prediction", zero_terminal_snr=True, min_snr_gamma=5.0)
    latents, noise = torch.randn(2, 3, 4, 8, 8)
    timesteps = torch.tensor([0, 500, 999])
    noisy = o.add_noise(latents, noise, timesteps)
    torch.testing.assert_close(noisy, rescaled.add_noise(latents, noise, timesteps), atol=1e-4, rtol=1e-3)
    assert torch.equal(noisy[2], noise[2])
    assert o.losses(noise, latents, timesteps).isfinite().all()


@pytest.mark.parametrize(
    ("prediction_type", "options", "message"),
    [
        ("epsilon", {"prediction_type": "v_prediction"}, "objective.prediction_type=v_prediction.*predicts epsilon"),
        ("epsilon", {"zero_terminal_snr": True}, "zero_terminal_snr needs a base that predicts v_prediction"),
        ("flow", {"zero_terminal_snr": True}, "zero_terminal_snr needs a base that predicts v_prediction"),
        ("flow", {"min_snr_gamma": 5.0}, "min_snr_gamma is for epsilon and v"),
        ("epsilon", {"noise_offset": -0.1}, "noise_offset must be at least 0"),
    ],
)
def test_a_mismatch_with_the_base_is_refused(prediction_type, options, message):
    with pytest.raises(ConfigError, match=message):
        objective(prediction_type, **options)


def test_timestep_options_out_of_range_are_refused():
    with pytest.raises(ConfigError, match=r"timesteps\.shift must be above 0"):
        UniformTimesteps(shift=0.0)
    with pytest.raises(ConfigError, match=r"timesteps\.std must be above 0"):
        LogitNormalTimesteps(std=0.0)
