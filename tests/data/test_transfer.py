"""A batch crosses from a worker unchanged; where shared memory runs out, that is said."""

import errno
import os

import numpy as np
import pytest
from torch.utils.data import DataLoader, Dataset

from ipa_train.data.transfer import BatchMemory
from ipa_train.errors import DataError

PARTS = [((3,), np.int64), ((3, 5), np.uint8), ((3, 2, 2), np.float16)]


class Filled(Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, number):
        memory = BatchMemory(*PARTS)
        for part, array in enumerate(memory.arrays):
            array[:] = np.arange(array.size).reshape(array.shape) + 10 * part + number
        return memory.hand_over()


@pytest.mark.parametrize("workers", [0, 1])
def test_tensors_arrive_as_they_were_filled(workers):
    for number, tensors in enumerate(DataLoader(Filled(), batch_size=None, num_workers=workers)):
        for part, ((shape, dtype), tensor) in enumerate(zip(PARTS, tensors, strict=True)):
            assert (tensor.shape, tensor.numpy().dtype) == (shape, dtype)
            assert tensor.flatten().tolist() == [10 * part + number + i for i in range(tensor.numel())]
            assert tensor.is_shared() == bool(workers)


class Full(Dataset):
    """What the system answers when /dev/shm is full; none of a size of its own can be had in a test."""

    def __len__(self):
        return 1

    def __getitem__(self, number):
        def pwrite(*_):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        os.pwrite = pwrite  # in the worker alone
        try:
            BatchMemory(*PARTS).hand_over()
        except DataError as error:
            return str(error)


def test_full_shared_memory_is_one_line_with_its_cure():
    (message,) = DataLoader(Full(), batch_size=None, num_workers=1)
    assert "no shared memory (/dev/shm) left for a batch" in message
    assert "data.num_workers" in message
