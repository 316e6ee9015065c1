"""The device of a process, and the way of small tensors to it."""

import os

import torch
from torch import Tensor


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the host on ``device``; the host does not wait for the copy, nor for what runs there."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)  # from memory that may be paged out, CUDA would wait


def local_device() -> torch.device:
    """The GPU of this process among those of its machine, by its launcher's count; the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0)))
    return torch.device("cuda", local_rank % torch.cuda.device_count())  # a task may see its own GPU alone
