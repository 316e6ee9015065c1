"""Loss weights over timesteps."""

import torch
from jaxtyping import Float
from torch import Tensor


def min_snr_weights(
    signal: Float[Tensor, "b"], noise: Float[Tensor, "b"], *, gamma: float, prediction_type: str
) -> Float[Tensor, "b"]:
    """Min-SNR weights (arXiv 2303.09556, section 3.4) for the factors of signal and noise.

    min(SNR, gamma) weights the error in x_0; divided by SNR for epsilon and by SNR + 1 for v, whose squared errors are
    that much larger.
    """
    snr = (signal / noise).square()
    return torch.clamp(snr, max=gamma) / (snr if prediction_type == "epsilon" else snr + 1.0)
