"""Loss weights over timesteps."""

import torch
from jaxtyping import Float
from torch import Tensor


def min_snr_weights(alphas: Float[Tensor, "b"], *, gamma: float, prediction_type: str) -> Float[Tensor, "b"]:
    """Min-SNR weights (arXiv 2303.09556, section 3.4) for the cumulative signal shares ``alphas``.

    min(SNR, gamma) weights the error in x_0; divided by SNR for epsilon and by SNR + 1 for v, whose squared errors are
    that much larger.
    """
    snr = alphas / (1.0 - alphas)
    return torch.clamp(snr, max=gamma) / (snr if prediction_type == "epsilon" else snr + 1.0)
