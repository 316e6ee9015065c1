"""What the denoiser is asked for: noising, target and per-sample loss."""

from jaxtyping import Float, Int64, Num
from torch import Tensor

from ipa_train.diffusion.schedule import NoiseSchedule, PredictionType, VariancePreserving
from ipa_train.diffusion.weighting import min_snr_weights
from ipa_train.errors import ConfigError
from ipa_train.runtime.seeding import Draws


class Objective:
    """Mean squared error to a linear combination of latents and noise.

    The base fixes ``base_prediction`` and ``schedule``. The options, all off as in the IP-Adapter paper:

    - ``prediction_type``: only to make sure that the base is of that kind.
    - ``noise_offset``: adds this much of one shared normal number per sample and channel to the noise, so that overall
      brightness is learnt too.
    - ``min_snr_gamma``: weights of arXiv 2303.09556 (5.0 is its value), for epsilon and v.
    - ``zero_terminal_snr``: the last timestep is noise alone (arXiv 2305.08891), for v: epsilon says nothing there.
      Sample grids are then drawn from noise alone; other samplers must be told (``rescale_betas_zero_snr=True``,
      ``timestep_spacing="trailing"``).

    Raises:
        ConfigError: an option out of range, or one that does not go with the base.
    """

    def __init__(
        self,
        *,
        base_prediction: PredictionType,
        schedule: NoiseSchedule,
        prediction_type: PredictionType | None = None,
        noise_offset: float = 0.0,
        min_snr_gamma: float | None = None,
        zero_terminal_snr: bool = False,
    ) -> None:
        if prediction_type not in (None, base_prediction):
            raise ConfigError(
                f"objective.prediction_type={prediction_type}, but this base predicts {base_prediction}: leave it "
                "null, or choose another base."
            )
        if noise_offset < 0:
            raise ConfigError(f"objective.noise_offset must be at least 0, got {noise_offset}.")
        if min_snr_gamma is not None and min_snr_gamma <= 0:
            raise ConfigError(f"objective.min_snr_gamma must be above 0 or null, got {min_snr_gamma}.")
        if min_snr_gamma is not None and base_prediction == "flow":
            raise ConfigError("objective.min_snr_gamma is for epsilon and v prediction, and this base predicts flow.")
        if zero_terminal_snr:
            if base_prediction != "v_prediction" or not isinstance(schedule, VariancePreserving):
                raise ConfigError(
                    f"objective.zero_terminal_snr needs a base that predicts v_prediction, and this one predicts "
                    f"{base_prediction}: at pure noise its answer would say nothing."
                )
            schedule = schedule.with_zero_terminal_snr()
        self.prediction_type, self.schedule = base_prediction, schedule
        self.noise_offset, self.min_snr_gamma, self.zero_terminal_snr = noise_offset, min_snr_gamma, zero_terminal_snr

    @property
    def options(self) -> dict[str, object]:
        """What an export says of the objective it was trained with."""
        return {name: value for name, value in vars(self).items() if name != "schedule"}

    @property
    def num_timesteps(self) -> int:
        """Number of training timesteps."""
        return self.schedule.num_timesteps

    def draw_noise(
        self, draws: Draws, shape: tuple[int, ...]
    ) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b c h w"]]:
        """Standard normal noise for latents of ``shape`` (c, h, w): the posterior's, and what they are mixed with.

        The second has the offset where one is asked for. Both come of one draw, which costs the host as much as each.
        """
        posterior_noise, noise = draws.normal("noise", (2, *shape)).unbind(1)
        if self.noise_offset:
            noise = noise + self.noise_offset * draws.normal("noise_offset", (shape[0], 1, 1))
        return posterior_noise, noise

    def add_noise(
        self, latents: Float[Tensor, "b c h w"], noise: Float[Tensor, "b c h w"], timesteps: Num[Tensor, "b"]
    ) -> Float[Tensor, "b c h w"]:
        """x_t = signal x_0 + noise level * noise."""
        signal, level = self._factors(timesteps)
        return signal * latents + level * noise

    def target(
        self, latents: Float[Tensor, "b c h w"], noise: Float[Tensor, "b c h w"], timesteps: Num[Tensor, "b"]
    ) -> Float[Tensor, "b c h w"]:
        """Return what the base predicts.

        epsilon: the noise; v: sqrt(a_t) noise - sqrt(1 - a_t) x_0 (arXiv 2202.00512, appendix D); flow: the velocity
        noise - x_0 (arXiv 2209.03003).
        """
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "flow":
            return noise - latents
        signal, level = self._factors(timesteps)
        return signal * noise - level * latents

    def losses(
        self, prediction: Float[Tensor, "b c h w"], target: Float[Tensor, "b c h w"], timesteps: Num[Tensor, "b"]
    ) -> Float[Tensor, "b"]:
        """Weighted mean squared error of each sample, fp32."""
        losses = (prediction.float() - target).square().mean(dim=(1, 2, 3))
        if self.min_snr_gamma is not None:
            factors = self.schedule.signal_and_noise(timesteps)
            losses = losses * min_snr_weights(*factors, gamma=self.min_snr_gamma, prediction_type=self.prediction_type)
        return losses

    def quarters(self, timesteps: Num[Tensor, "b"]) -> Int64[Tensor, "b"]:
        """Which quarter of the schedule each timestep is in: 0 (least noise) to 3."""
        return (timesteps * 4 / self.num_timesteps).long().clamp(max=3)

    def _factors(self, timesteps: Num[Tensor, "b"]) -> tuple[Tensor, Tensor]:
        signal, level = self.schedule.signal_and_noise(timesteps)
        return signal[:, None, None, None], level[:, None, None, None]
