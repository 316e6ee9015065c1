"""Follows the memory that tensors hold, on the meta device too."""

import weakref
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves


class MemoryMeter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of the tensors that live within the block, and the most there ever were.

    Every storage counts once, however many views it has, from the operator that made it until nothing holds it any
    more. What a kernel uses within itself is not seen.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        """Bytes held now."""
        self.peak = 0
        """The most so far."""
        self._storages: dict[int, weakref.ref[Any]] = {}

    def hold(self, tensors: Iterable[Tensor]) -> int:
        """Count tensors that were there before; return by how many bytes that is more."""
        before = self.live
        for tensor in tensors:
            self._add(tensor)
        return self.live - before

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operator and count what it returns."""
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, Tensor):
                self._add(value)
            elif isinstance(value, (tuple, list)):
                self.hold(leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))
        return result

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages:
            return
        self._storages[key] = weakref.ref(storage, partial(self._release, key, size))
        self.live += size
        self.peak = max(self.peak, self.live)

    def _release(self, key: int, size: int, _: weakref.ref[Any]) -> None:
        del self._storages[key]
        self.live -= size


def tensor_bytes(tensor: Tensor) -> int:
    """Bytes that a tensor holds, those of quantised ones too, which say of themselves that they were fp32."""
    if is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()
        return sum(tensor_bytes(getattr(tensor, name)) for name in names)
    return tensor.untyped_storage().nbytes()
