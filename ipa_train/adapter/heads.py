"""The heads of an attention, as an axis and folded into the width."""

from jaxtyping import Float
from torch import Tensor


def split_heads(x: Float[Tensor, "b s d"], num_heads: int) -> Float[Tensor, "b heads s e"]:
    """Reshape (b, s, heads * e) to (b, heads, s, e)."""
    return x.reshape(*x.shape[:2], num_heads, -1).transpose(1, 2)


def merge_heads(x: Float[Tensor, "b heads s e"]) -> Float[Tensor, "b s d"]:
    """Invert :func:`split_heads`."""
    return x.transpose(1, 2).flatten(2)
