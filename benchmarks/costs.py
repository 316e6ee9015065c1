"""What a training step costs: time, operations and arithmetic."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ipa_train.training.forecast.flops import FlopCounter

_MATMUL_SIZE = {"cpu": 2048, "cuda": 8192}


def seconds(step: Callable[[], object], device: str, num_steps: int) -> float:
    """Of one step: CPU time of this process on a CPU; on a GPU wall time until it is done, after one to warm up."""
    if device == "cpu":
        start = time.process_time()
        for _ in range(num_steps):
            step()
        return (time.process_time() - start) / num_steps
    step()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(num_steps):
        step()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / num_steps


class OperationCounter(TorchDispatchMode):
    """Counts operations that the host hands to the device within the block: all that are no mere view of a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        is_view = func.is_view or func.overloadpacket is torch.ops.aten._unsafe_view
        self.total += not is_view
        return func(*args, **(kwargs or {}))


def count(step: Callable[[], object]) -> tuple[int, int]:
    """Operations and FLOPs of one step."""
    with FlopCounter() as flops, OperationCounter() as operations:
        step()
    return operations.total, flops.total


class Matmul:
    """A product of square bf16 matrices, of a size that suits the device: the ceiling that steps are measured by."""

    def __init__(self, device: str) -> None:
        size = _MATMUL_SIZE[device]
        self._a, self._b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
        self.flops = 2 * size**3

    def __call__(self) -> None:
        torch.mm(self._a, self._b)
