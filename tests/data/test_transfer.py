"""A batch crosses from a worker unchanged; where shared memory runs out, that is said."""

import errno
import os

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from ipa_train.data.transfer import BatchMemory, DeviceCopies
from ipa_train.errors import DataError
from tests.training.conftest import make_batch

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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_copied_beside_the_computation_are_whole():
    """Also where the computation is far behind, and the memory of earlier batches is asked for again."""
    copies, device, sums = DeviceCopies(), torch.device("cuda", 0), []
    busy = torch.randn(4096, 4096, device=device)
    for number in range(50):
        batch = copies(make_batch(range(8 * number, 8 * number + 8), size=256).pin_memory(), device)
        assert batch.positions.device.type == "cpu"
        busy = busy @ busy / 64.0
        sums.append(batch.content.pixels.long().sum())
    expected = [make_batch(range(8 * n, 8 * n + 8), size=256).content.pixels.long().sum() for n in range(50)]
    assert torch.stack(sums).tolist() == torch.stack(expected).tolist()


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
