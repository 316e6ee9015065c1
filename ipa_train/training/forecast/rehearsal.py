"""One training step without data, weights or time: on the meta device, where tensors have shapes and nothing else."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode

from ipa_train.data.batch import Batch
from ipa_train.training.forecast.flops import FlopCounter
from ipa_train.training.forecast.memory import MemoryMeter
from ipa_train.training.metrics import RunningMeans
from ipa_train.training.module import AdapterTraining


@dataclass(frozen=True)
class Rehearsal:
    """What one micro-batch took: FLOPs, and bytes on the device."""

    encoder_flops: int
    """Of all that runs before the adapter: VAE, image encoder and text encoders."""
    forward_flops: int
    """Of the denoiser with the adapter."""
    backward_flops: int
    recomputed_flops: int
    """Of forwards that are run again in the backward; of attention on a CPU, see ``adapter/decoupled.py``, a part
    counts as backward."""
    frozen_bytes: int
    """Frozen weights, and buffers."""
    trained_bytes: int
    """Trained weights; their gradients are as large."""
    activation_bytes: int
    """Kept at the end of the forward for the backward, the batch included."""
    peak_bytes: int
    """The most at any time, of all of the above, gradients and temporaries."""

    @property
    def model_flops(self) -> int:
        """FLOPs that the step has to spend: all but those of recomputation."""
        return self.encoder_flops + self.forward_flops + self.backward_flops


def rehearse(module: AdapterTraining, batch: Batch, *, accumulates: bool = False) -> Rehearsal:
    """Run forward and backward of ``module`` as it is on a batch of the shapes of ``batch``.

    Of a step in the middle of a run: the gradients of the one before are there until the backward begins, and
    throughout where the run ``accumulates`` them. Attention is taken to run in a fused kernel, as it does on CPU and
    on CUDA. What the device allocates for itself (CUDA's context, workspaces of convolutions) is not seen. The module
    is left as it was.
    """
    flops, memory = FlopCounter(), MemoryMeter()
    # A compiled block would be compiled once more for the meta device; it does what the block itself does.
    with _without_data(module), torch.compiler.set_stance("force_eager"), _FusedAttention(), memory, flops:
        trained = [p for p in module.parameters() if p.requires_grad]
        trained_bytes = memory.hold(trained)
        frozen_bytes = memory.hold((*module.parameters(), *module.buffers()))
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)
        before = memory.live
        blank = batch.blank(len(batch))
        encoder_flops = 0

        def encoded(*_: Any) -> None:
            nonlocal encoder_flops
            encoder_flops = flops.total

        with module.adapter.register_forward_pre_hook(encoded):
            loss = module.training_step(blank, 0)
        activation_bytes = memory.live - before
        forward_flops, with_grad = flops.total - encoder_flops, flops.with_grad
        if not accumulates:
            for parameter in trained:
                parameter.grad = None
        # Not ``loss.backward()``: a function mode is off within the functions that it may replace, and this is one.
        engine = torch.autograd.Variable._execution_engine
        engine.run_backward((loss,), (torch.ones_like(loss),), False, False, (), True, accumulate_grad=True)
    # With gradients enabled, a backward pass runs nothing but forwards that it lacks the results of.
    recomputed_flops = flops.with_grad - with_grad
    return Rehearsal(
        encoder_flops=encoder_flops,
        forward_flops=forward_flops,
        backward_flops=flops.total - encoder_flops - forward_flops - recomputed_flops,
        recomputed_flops=recomputed_flops,
        frozen_bytes=frozen_bytes,
        trained_bytes=trained_bytes,
        activation_bytes=activation_bytes,
        peak_bytes=memory.peak,
    )


@contextmanager
def _without_data(module: AdapterTraining) -> Iterator[None]:
    """Within the block the module's weights and buffers lie on the meta device.

    They are exchanged in place, not in a copy: whatever wraps a block holds the module it was made for. Sharded weights
    are whole there, and nothing gathers them.
    """
    stores: list[Any] = [store for part in module.modules() for store in (part._parameters, part._buffers)]
    for part in module.modules():
        if isinstance(part, FSDPModule):
            stores += [part._forward_pre_hooks, part._forward_hooks]  # type: ignore[attr-defined]
    originals = [dict(store) for store in stores]
    twins: dict[int, Tensor] = {}  # weights may be tied
    objective, metrics = module.objective, module.metrics
    # The schedule moves its table to where it is asked for; there is no way back from the meta device.
    module.objective = copy.copy(objective)
    module.objective.schedule = copy.copy(objective.schedule)
    module.metrics = RunningMeans()
    try:
        for store in stores:
            for name, value in list(store.items()):
                if isinstance(value, Tensor):
                    store[name] = twins.setdefault(id(value), _twin(value))
                elif value is not None:
                    del store[name]
        yield
    finally:
        for store, original in zip(stores, originals, strict=True):
            store.update(original)
        module.objective, module.metrics = objective, metrics


def _twin(tensor: Tensor) -> Tensor:
    if isinstance(tensor, DTensor):
        twin = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    else:
        twin = torch.empty_like(tensor, device="meta")
    return nn.Parameter(twin, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else twin


class _FusedAttention(TorchFunctionMode):
    """Let attention on the meta device keep what the kernels of real devices keep: q, k, v, output and log-sums.

    By itself the meta device takes the plain formula, which keeps the whole matrix of scores. CUDA's kernels (flash,
    memory-efficient, cuDNN) and the CPU's keep the same.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        return _attention(*args, **kwargs) if func is F.scaled_dot_product_attention else func(*args, **kwargs)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if query.ndim != 4 or enable_gqa or not query.is_meta:  # the kernel takes no others
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype)
    output, _ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
    )
    return output
