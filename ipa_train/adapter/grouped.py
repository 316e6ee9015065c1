"""Image keys and values of many sites from one matrix product.

All sites of a UNet read the same image tokens, so their projections are one product with their weights side by side:
two kernels in place of hundreds. Weights stay the parameters of their branches, fp32 masters under the names of
interchange files; they are put together in the precision of the tokens at each step, which a cast would have cost too.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from ipa_train.adapter.attention import ImageAttention


class GroupedProjection(torch.autograd.Function):
    """``x @ cat(weights).T``: gradients of all the weights are slices of one product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> Tensor:
        """Project (m, c) by weights of (d_i, c) to (m, sum d_i)."""
        ctx.sizes = [len(weight) for weight in weights]
        packed = x.new_empty(sum(ctx.sizes), x.shape[1])
        torch._foreach_copy_(torch.split(packed, ctx.sizes), weights)
        ctx.save_for_backward(x, packed)
        return x @ packed.T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        """Of x in its precision, of the weights in fp32."""
        x, packed = ctx.saved_tensors
        grad_weights = (grad.T @ x).float()
        return grad @ packed, *torch.split(grad_weights, ctx.sizes)


def grouped_keys_and_values(
    image_tokens: Float[Tensor, "b n c"], branches: Sequence[ImageAttention]
) -> list[tuple[Float[Tensor, "b n d1"], Float[Tensor, "b n d2"]]]:
    """Image keys and values of each branch, in the precision of the tokens."""
    weights = [weight for branch in branches for weight in (branch.to_k_ip.weight, branch.to_v_ip.weight)]
    batch_size, num_tokens, _ = image_tokens.shape
    packed = cast(Tensor, GroupedProjection.apply(image_tokens.flatten(0, 1), *weights))  # type: ignore[no-untyped-call]
    parts = torch.split(packed.view(batch_size, num_tokens, -1), [len(weight) for weight in weights], dim=2)
    return list(zip(parts[::2], parts[1::2], strict=True))
