"""The paper's maths, in pure torch: noise schedules, objective, timesteps, loss weights."""

from ipa_train.diffusion.objective import Objective
from ipa_train.diffusion.schedule import NoiseSchedule, PredictionType, RectifiedFlow, VariancePreserving
from ipa_train.diffusion.timesteps import LogitNormalTimesteps, Timesteps, UniformTimesteps
from ipa_train.diffusion.weighting import min_snr_weights

__all__ = [
    "LogitNormalTimesteps",
    "NoiseSchedule",
    "Objective",
    "PredictionType",
    "RectifiedFlow",
    "Timesteps",
    "UniformTimesteps",
    "VariancePreserving",
    "min_snr_weights",
]
