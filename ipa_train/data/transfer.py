"""Memory that a loader's worker can hand to the training process without a copy."""

import math

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

_ALIGNMENT = 64


def empty_for_transfer(*parts: tuple[tuple[int, ...], torch.dtype]) -> list[Tensor]:
    """Uninitialised tensors of these shapes and types, side by side in one piece of memory.

    In a worker the memory is shared, as that of torch's own default collate is. Every shared piece is handed over
    through a socket of its own (0.5 ms of CPU time), so a batch should be one.
    """
    lengths = [math.prod(shape) * dtype.itemsize for shape, dtype in parts]
    ends = np.cumsum([-(-length // _ALIGNMENT) * _ALIGNMENT for length in lengths]).tolist()
    num_bytes = max(_ALIGNMENT, ends[-1])  # no memory at all has no stride, and so cannot be viewed
    if get_worker_info() is None:
        block = torch.from_numpy(np.empty(num_bytes, np.uint8))  # NumPy asks for huge pages, torch does not
    else:
        storage = torch.UntypedStorage._new_shared(num_bytes)  # type: ignore[no-untyped-call]
        block = torch.empty(0, dtype=torch.uint8).set_(storage)
    starts = [0, *ends[:-1]]
    return [
        block[start : start + length].view(dtype).view(shape)
        for start, length, (shape, dtype) in zip(starts, lengths, parts, strict=True)
    ]
