"""Frozen linear layers in 8 bits: the weight is cast once, activations and gradients for each product.

torchao's ``Float8Linear`` is made for weights that are trained: it keeps them in their own precision, casts them at
each step, and computes their gradients. Here they never change, so they are held in 8 bits alone.

Formats after arXiv 2209.05433: e4m3 for weights and activations, e5m2 for gradients, whose range is wider.
"""

import re
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ipa_train.adapter.lora import LowRankAttention
from ipa_train.bases.base import Base
from ipa_train.errors import ConfigError

WEIGHT, GRADIENT = torch.float8_e4m3fn, torch.float8_e5m2
_MULTIPLE = 16
"""Of both widths of a layer, as the kernels ask."""
_IN_A_BLOCK = re.compile(r"\.\d+\.")
_KEPT = re.compile(r"emb|norm")
"""Layers that read the timestep (embeddings, modulation of norms): one row a picture, so nothing is won."""


class Float8Linear(nn.Module):
    """A frozen linear layer, ``y = x W^T + b``, with W in e4m3 and one scale for each of its rows.

    The rows' scales serve both directions: in ``dx = dy W`` they multiply the columns of ``dy`` before it is cast.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight, scale = _cast(linear.weight.detach(), WEIGHT)
        # Bytes, so that whatever moves, casts or broadcasts a module's weights leaves these as they are.
        self.weight = nn.Parameter(weight.view(torch.uint8), requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b e"]:
        """The layer's output, in the precision of ``x``."""
        y: Tensor = _Product.apply(x.flatten(0, -2), self.weight, self.scale)  # type: ignore[no-untyped-call]
        y = y.reshape(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias


class _Product(torch.autograd.Function):
    """``x W^T``, with a gradient of ``x`` alone."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        rows, row_scales = _cast(x, WEIGHT)
        return torch._scaled_mm(
            rows, weight.view(WEIGHT).t(), row_scales, scale.t(), out_dtype=x.dtype, use_fast_accum=True
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        weight, scale = ctx.saved_tensors
        rows, row_scales = _cast(gradient.float() * scale.t(), GRADIENT)
        # Kernels want the second factor by columns. It is laid out anew each time: a copy to keep would cost as much
        # memory as was saved.
        columns = weight.view(WEIGHT).t().contiguous().t()
        ones = torch.ones(1, columns.shape[1], device=scale.device)
        dx = torch._scaled_mm(rows, columns, row_scales, ones, out_dtype=gradient.dtype, use_fast_accum=True)
        return dx, None, None


def _cast(x: Float[Tensor, "b d"], dtype: torch.dtype) -> tuple[Tensor, Float[Tensor, "b 1"]]:
    """Return x / scale in 8 bits, and the scale by which each row just fits into their range."""
    scale = x.abs().amax(dim=1, keepdim=True).float().clamp(min=1e-12) / torch.finfo(dtype).max
    return (x.float() / scale).to(dtype), scale


def to_float8(base: Base) -> None:
    """Hold the blocks' frozen linear layers in 8 bits, but for those under a LoRA and those that read the timestep.

    Raises:
        ConfigError: a GPU without such products, or a base in another precision than bfloat16.
    """
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9):
        raise ConfigError(
            f"acceleration.float8=true needs a GPU of compute capability 8.9 (Ada, Hopper) or later, which "
            f"{torch.cuda.get_device_name()} is not: leave it out."
        )
    if base.dtype != torch.bfloat16:
        name = str(base.dtype).removeprefix("torch.")
        raise ConfigError(f"acceleration.float8=true needs base.dtype=bfloat16, got {name}.")
    updated = _updated_layers(base.denoiser)
    paths = [path for path, module in base.denoiser.named_modules() if _fits(path, module) and module not in updated]
    for path in paths:
        parent, _, name = path.rpartition(".")
        owner = base.denoiser.get_submodule(parent)
        setattr(owner, name, Float8Linear(cast(nn.Linear, base.denoiser.get_submodule(path))))


def _updated_layers(denoiser: nn.Module) -> set[nn.Module]:
    """What is under a LoRA, whose processors hold these very layers."""
    modules: list[Any] = list(denoiser.modules())
    updated = [m for m in modules if isinstance(getattr(m, "processor", None), LowRankAttention)]
    return {layer for m in updated for layer in (m.to_q, m.to_k, m.to_v, m.to_out[0])}


def _fits(path: str, module: nn.Module) -> bool:
    return (
        isinstance(module, nn.Linear)
        and _IN_A_BLOCK.search(f".{path}") is not None
        and _KEPT.search(path) is None
        and module.in_features % _MULTIPLE == module.out_features % _MULTIPLE == 0
    )
