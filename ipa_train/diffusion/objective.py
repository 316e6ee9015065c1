"""What the denoiser is asked for: noising, target and per-sample loss."""

from typing import Literal, get_args

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from ipa_train.diffusion.weighting import min_snr_weights
from ipa_train.errors import ConfigError, did_you_mean
from ipa_train.runtime.seeding import Draws

PredictionType = Literal["epsilon", "v_prediction"]


class Objective:
    """Denoising score matching as in DDPM (arXiv 2006.11239) with a linear combination of x and noise as target.

    The base fixes ``prediction_type`` and ``alphas_cumprod``; the options are ``noise_offset`` (adds this much of one
    shared normal number per sample and channel to the noise, so that overall brightness is learnt too) and
    ``min_snr_gamma`` (arXiv 2303.09556; 5.0 is the paper's value). Both are off as in the IP-Adapter paper.
    """

    def __init__(
        self,
        *,
        prediction_type: PredictionType,
        alphas_cumprod: Float[Tensor, "t"],
        noise_offset: float = 0.0,
        min_snr_gamma: float | None = None,
    ) -> None:
        if prediction_type not in get_args(PredictionType):
            hint = did_you_mean(prediction_type, get_args(PredictionType))
            raise ConfigError(f"The base predicts {prediction_type!r}, which no objective here trains.{hint}")
        if noise_offset < 0:
            raise ConfigError(f"objective.noise_offset must be at least 0, got {noise_offset}.")
        if min_snr_gamma is not None and min_snr_gamma <= 0:
            raise ConfigError(f"objective.min_snr_gamma must be above 0 or null, got {min_snr_gamma}.")
        self.prediction_type = prediction_type
        self.alphas_cumprod = alphas_cumprod
        self.noise_offset = noise_offset
        self.min_snr_gamma = min_snr_gamma

    @property
    def num_timesteps(self) -> int:
        """Number of training timesteps."""
        return len(self.alphas_cumprod)

    def draw_noise(self, draws: Draws, shape: tuple[int, ...]) -> Float[Tensor, "b c h w"]:
        """Standard normal noise for latents of ``shape`` (c, h, w), with the offset where one is asked for."""
        noise = draws.normal("noise", shape)
        if self.noise_offset:
            noise = noise + self.noise_offset * draws.normal("noise_offset", (shape[0], 1, 1))
        return noise

    def add_noise(
        self, latents: Float[Tensor, "b c h w"], noise: Float[Tensor, "b c h w"], timesteps: Int64[Tensor, "b"]
    ) -> Float[Tensor, "b c h w"]:
        """x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise, with a_t the cumulative signal share."""
        signal, sigma = self._signal_and_noise(timesteps)
        return signal * latents + sigma * noise

    def target(
        self, latents: Float[Tensor, "b c h w"], noise: Float[Tensor, "b c h w"], timesteps: Int64[Tensor, "b"]
    ) -> Float[Tensor, "b c h w"]:
        """Return the noise (epsilon), or v = sqrt(a_t) noise - sqrt(1 - a_t) x_0 (arXiv 2202.00512, appendix D)."""
        if self.prediction_type == "epsilon":
            return noise
        signal, sigma = self._signal_and_noise(timesteps)
        return signal * noise - sigma * latents

    def losses(
        self, prediction: Float[Tensor, "b c h w"], target: Float[Tensor, "b c h w"], timesteps: Int64[Tensor, "b"]
    ) -> Float[Tensor, "b"]:
        """Weighted mean squared error of each sample, fp32."""
        losses = (prediction.float() - target).square().mean(dim=(1, 2, 3))
        if self.min_snr_gamma is not None:
            a = self._alphas(timesteps)
            losses = losses * min_snr_weights(a, gamma=self.min_snr_gamma, prediction_type=self.prediction_type)
        return losses

    def _alphas(self, timesteps: Int64[Tensor, "b"]) -> Float[Tensor, "b"]:
        self.alphas_cumprod = self.alphas_cumprod.to(timesteps.device)
        return self.alphas_cumprod[timesteps]

    def _signal_and_noise(self, timesteps: Int64[Tensor, "b"]) -> tuple[Tensor, Tensor]:
        a = self._alphas(timesteps)[:, None, None, None]
        return torch.sqrt(a), torch.sqrt(1.0 - a)
