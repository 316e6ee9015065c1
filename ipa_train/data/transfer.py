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
    if get_worker_info() is None:
        block = torch.from_numpy(np.empty(ends[-1], np.uint8)).untyped_storage()  # NumPy asks for huge pages
    else:
        block = torch.UntypedStorage._new_shared(ends[-1])  # type: ignore[no-untyped-call]
    return [
        torch.empty(0, dtype=dtype).set_(block, start // dtype.itemsize, shape)  # type: ignore[call-overload]
        for start, (shape, dtype) in zip([0, *ends[:-1]], parts, strict=True)
    ]
