"""How the denoiser runs: what is kept for the backward, what is compiled, in what precision frozen layers multiply."""

from ipa_train.acceleration.acceleration import Acceleration

__all__ = ["Acceleration"]
