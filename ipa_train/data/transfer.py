"""Memory that a loader's worker can hand to the training process without a copy."""

import math

import torch
from torch import Tensor
from torch.utils.data import get_worker_info


def empty_for_transfer(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor; in a worker its memory is shared, as that of torch's own default collate is."""
    if get_worker_info() is None:
        return torch.empty(shape, dtype=dtype)
    storage = torch.UntypedStorage._new_shared(math.prod(shape) * dtype.itemsize)  # type: ignore[no-untyped-call]
    return torch.empty(0, dtype=dtype).set_(storage).reshape(shape)
