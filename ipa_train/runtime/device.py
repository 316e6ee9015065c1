"""The way of small tensors from the host to the device."""

import torch
from torch import Tensor


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the host on ``device``; the host does not wait for the copy, nor for what runs there."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)  # from memory that may be paged out, CUDA would wait
