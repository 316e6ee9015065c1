"""The memory of a batch, and its way from a loader's worker to the training process."""

import errno
import math
import os

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from ipa_train.errors import DataError

_ALIGNMENT = 64


class BatchMemory:
    """Uninitialised tensors of these shapes and types, side by side in one piece of memory.

    One piece, because each that is shared is handed over through a socket of its own, at 0.5 ms of CPU time.
    """

    def __init__(self, *parts: tuple[tuple[int, ...], torch.dtype]) -> None:
        self._parts = parts
        lengths = [math.prod(shape) * dtype.itemsize for shape, dtype in parts]
        self._ends = np.cumsum([-(-length // _ALIGNMENT) * _ALIGNMENT for length in lengths]).tolist()
        self._block = np.empty(self._ends[-1], np.uint8)  # not torch's: NumPy asks for huge pages
        self.tensors = self._lay_out(torch.from_numpy(self._block).untyped_storage())

    def hand_over(self) -> list[Tensor]:
        """The tensors, to be filled no more; in a worker, in memory that the training process maps without a copy.

        Raises:
            DataError: there is no shared memory left.
        """
        if get_worker_info() is None:
            return self.tensors
        size = self._ends[-1]
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
        return self._lay_out(shared)

    def _lay_out(self, storage: torch.UntypedStorage) -> list[Tensor]:
        return [
            torch.empty(0, dtype=dtype).set_(storage, start // dtype.itemsize, shape)  # type: ignore[call-overload]
            for start, (shape, dtype) in zip([0, *self._ends[:-1]], self._parts, strict=True)
        ]
