"""How noise is mixed into latents over the timesteps: x_t = signal x_0 + noise_level noise."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Num
from torch import Tensor

PredictionType = Literal["epsilon", "v_prediction", "flow"]


class NoiseSchedule(ABC):
    """The mixing rule that a base was trained with."""

    prediction_types: ClassVar[Sequence[PredictionType]]
    """What denoisers with this rule may predict."""
    num_timesteps: int

    @abstractmethod
    def timesteps(self, u: Float[Tensor, "b"]) -> Num[Tensor, "b"]:
        """The denoiser's timestep at the share ``u`` (0 to 1) of the way from latents to noise."""

    @abstractmethod
    def signal_and_noise(self, timesteps: Num[Tensor, "b"]) -> tuple[Float[Tensor, "b"], Float[Tensor, "b"]]:
        """The factors of x_0 and of the noise."""


class VariancePreserving(NoiseSchedule):
    """Of DDPM (arXiv 2006.11239): signal = sqrt(a_t), noise = sqrt(1 - a_t), at whole timesteps."""

    prediction_types = ("epsilon", "v_prediction")

    def __init__(self, alphas_cumprod: Float[Tensor, "t"]) -> None:
        self.alphas_cumprod = alphas_cumprod.float()
        self.num_timesteps = len(alphas_cumprod)

    def timesteps(self, u: Float[Tensor, "b"]) -> Num[Tensor, "b"]:
        """Whole numbers from 0 to num_timesteps - 1."""
        return (u.double() * self.num_timesteps).long().clamp(max=self.num_timesteps - 1)

    def signal_and_noise(self, timesteps: Num[Tensor, "b"]) -> tuple[Float[Tensor, "b"], Float[Tensor, "b"]]:
        """Square roots of the cumulative signal share and of the rest."""
        self.alphas_cumprod = self.alphas_cumprod.to(timesteps.device)
        a = self.alphas_cumprod[timesteps]
        return torch.sqrt(a), torch.sqrt(1.0 - a)

    @property
    def zero_terminal_snr(self) -> bool:
        """Whether the last timestep is noise alone."""
        return not self.alphas_cumprod[-1]

    def with_zero_terminal_snr(self) -> "VariancePreserving":
        """Rescaled so that the last timestep holds no signal at all (arXiv 2305.08891, algorithm 1)."""
        roots = torch.sqrt(self.alphas_cumprod.double())
        shifted = (roots - roots[-1]) * (roots[0] / (roots[0] - roots[-1]))
        return VariancePreserving(shifted.square())


class RectifiedFlow(NoiseSchedule):
    """A straight line from latents to noise (arXiv 2209.03003): signal = 1 - t, noise = t, any t from 0 to 1.

    SD 3 and Flux are told t times 1000.
    """

    prediction_types = ("flow",)
    num_timesteps = 1000

    def timesteps(self, u: Float[Tensor, "b"]) -> Num[Tensor, "b"]:
        """Any number from 0 to 1000."""
        return u * self.num_timesteps

    def signal_and_noise(self, timesteps: Num[Tensor, "b"]) -> tuple[Float[Tensor, "b"], Float[Tensor, "b"]]:
        """``1 - t`` and ``t``."""
        t = timesteps.float() / self.num_timesteps
        return 1.0 - t, t
