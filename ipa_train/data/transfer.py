"""The memory of a batch, and its way from a loader's worker to the training process, and on to the device."""

import errno
import math
import os
from itertools import accumulate

import numpy as np
import torch
from numpy import ndarray
from numpy.typing import DTypeLike
from torch import Tensor
from torch.utils.data import get_worker_info

from ipa_train.data.batch import Batch
from ipa_train.errors import DataError

_ALIGNMENT = 64


class BatchMemory:
    """Uninitialised arrays of these shapes and types, side by side in one piece of memory.

    One piece, because each that is shared is handed over through a socket of its own, at 0.5 ms of CPU time.
    """

    def __init__(self, *parts: tuple[tuple[int, ...], DTypeLike]) -> None:
        kinds = [(shape, np.dtype(dtype)) for shape, dtype in parts]
        lengths = [math.prod(shape) * dtype.itemsize for shape, dtype in kinds]
        ends = list(accumulate(-(-length // _ALIGNMENT) * _ALIGNMENT for length in lengths))
        self._starts = [0, *ends[:-1]]
        self._block = np.empty(ends[-1], np.uint8)  # not torch's: NumPy asks for huge pages
        self.arrays: list[ndarray] = [
            self._block[start : start + length].view(dtype).reshape(shape)
            for start, length, (shape, dtype) in zip(self._starts, lengths, kinds, strict=True)
        ]

    def hand_over(self) -> list[Tensor]:
        """The arrays as tensors, to be filled no more; in a worker, in memory that the training process maps.

        Raises:
            DataError: there is no shared memory left.
        """
        tensors = [torch.from_numpy(array) for array in self.arrays]
        if get_worker_info() is None or not len(self._block):  # of nothing there is no shared memory
            return tensors
        size = len(self._block)
        shared = torch.UntypedStorage._new_shared(size)  # type: ignore[no-untyped-call]
        descriptor, _ = shared._share_fd_cpu_()
        # Written as a file: to decode straight into its fresh pages costs a page fault for each, far more than a copy.
        # And where it is too small (64 MB in a container) a write fails, but a page fault kills the worker.
        try:
            written = os.pwrite(descriptor, self._block.data, 0)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            written = 0
        if written < size:
            raise DataError(
                f"no shared memory (/dev/shm) left for a batch of {size / 2**20:.0f} MiB: give the container more "
                "(docker run --shm-size), or lower data.num_workers or data.prefetch_factor."
            )
        return [
            torch.empty(0, dtype=own.dtype).set_(shared, start // own.itemsize, own.shape)  # type: ignore[call-overload]
            for start, own in zip(self._starts, tensors, strict=True)
        ]


class DeviceCopies:
    """Copies batches to the device beside the step before.

    Training waits for nothing, so a batch comes here while the device is at an earlier step; on the stream of that step
    its copy would stand in line behind it.
    """

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None

    def __call__(self, batch: Batch, device: torch.device) -> Batch:
        """Return the batch on ``device``, for the current stream."""
        if device.type != "cuda":
            return batch.to(device)
        self._stream = self._stream or torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._stream):
            batch = batch.to(device)
        computation = torch.cuda.current_stream(device)
        computation.wait_stream(self._stream)
        batch.record_stream(computation)
        return batch
