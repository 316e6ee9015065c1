"""Which timesteps a training step sees, as shares u of the way from latents (0) to noise (1)."""

from abc import ABC, abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor

from ipa_train.errors import ConfigError
from ipa_train.runtime.device import send
from ipa_train.runtime.seeding import Draws


class Timesteps(ABC):
    """A distribution of u, shifted towards the noise.

    ``shift`` above 1 gives more noise, since larger pictures need more of it to be destroyed (arXiv 2403.03206,
    eq. 23): u -> shift u / (1 + (shift - 1) u). None takes the base's own: 1 for epsilon and v, 3 for SD 3, and a
    number that grows with the picture for Flux.
    """

    def __init__(self, *, shift: float | None = None) -> None:
        if shift is not None and shift <= 0:
            raise ConfigError(f"timesteps.shift must be above 0 or null, got {shift}.")
        self.shift = shift

    def draw(self, draws: Draws, *, base_shift: float = 1.0) -> Float[Tensor, "b"]:
        """One u for each sample; ``base_shift`` is what the base would have."""
        shift = base_shift if self.shift is None else self.shift
        u = self._draw(draws)
        return u if shift == 1.0 else shift * u / (1.0 + (shift - 1.0) * u)

    @abstractmethod
    def _draw(self, draws: Draws) -> Float[Tensor, "b"]:
        """One u before the shift."""


class UniformTimesteps(Timesteps):
    """Every timestep is equally likely, as in the IP-Adapter paper."""

    def _draw(self, draws: Draws) -> Float[Tensor, "b"]:
        return send(draws.uniform("timestep"), draws.device)


class LogitNormalTimesteps(Timesteps):
    """u = sigmoid(mean + std * normal): the middle more often, as SD 3 was trained (arXiv 2403.03206, eq. 19)."""

    def __init__(self, *, mean: float = 0.0, std: float = 1.0, shift: float | None = None) -> None:
        super().__init__(shift=shift)
        if std <= 0:
            raise ConfigError(f"timesteps.std must be above 0, got {std}.")
        self.mean, self.std = mean, std

    def _draw(self, draws: Draws) -> Float[Tensor, "b"]:
        return torch.sigmoid(self.mean + self.std * draws.normal("timestep", (1,))[:, 0])
