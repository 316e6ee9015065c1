"""Counts the arithmetic of whatever runs."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop


def _attention_backward(grad_out: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Four products of the size of the forward's two; that fused kernels compute scores again is not counted."""
    return 2 * sdpa_flop(query, key, value)


_aten = torch.ops.aten
# The counter of torch knows the attention kernels of CUDA alone.
_FORMULAS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    _aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


class FlopCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """FLOPs of all operators within the block: 2 for each multiply-add of a matrix product, convolution or attention.

    The rest (norms, activations, optimizers) is memory traffic rather than arithmetic, and is not counted, as is usual.
    Works on the meta device.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0
        """Of all so far."""
        self.with_grad = 0
        """Of those that ran with gradients enabled."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operator and add what it takes."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        formula = _FORMULAS.get(func.overloadpacket)
        if formula is not None:
            flops = formula(*args, **kwargs, out_val=result)
            self.total += flops
            if torch.is_grad_enabled():
                self.with_grad += flops
        return result
