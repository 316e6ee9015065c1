"""The paper's maths, in pure torch: objective, timesteps, loss weights."""

from ipa_train.diffusion.objective import Objective, PredictionType
from ipa_train.diffusion.timesteps import UniformTimesteps
from ipa_train.diffusion.weighting import min_snr_weights

__all__ = ["Objective", "PredictionType", "UniformTimesteps", "min_snr_weights"]
