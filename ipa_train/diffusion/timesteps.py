"""Which timesteps a training step sees."""

from jaxtyping import Int64
from torch import Tensor

from ipa_train.runtime.seeding import Draws


class UniformTimesteps:
    """Every training timestep is equally likely, as in the paper."""

    def draw(self, draws: Draws, num_timesteps: int) -> Int64[Tensor, "b"]:
        """One timestep in 0..num_timesteps-1 for each sample."""
        return draws.integers("timestep", num_timesteps)
