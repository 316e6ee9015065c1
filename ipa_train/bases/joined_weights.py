"""Weights of a frozen UNet's layers that read the same input, side by side, so that one product serves them all."""

import itertools
from collections.abc import Iterator, Sequence
from typing import TypeGuard, cast

import torch
import torch.nn.functional as F
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from jaxtyping import Float
from torch import Tensor, nn

_MIN_GROUPS, _MAX_GROUPS, _SITES_PER_GROUP = 4, 8, 8


class JoinedWeights:
    """Weights of queries, keys and values, of the text's keys and values, and of the time embeddings.

    The layers' own weights become views of the joined ones: nothing is held twice, and diffusers' pipelines go on to
    read them. Layers that are more than a linear layer (quantised, or with a LoRA) are not joined.

    Args:
        resnets: the residual blocks, in the order of running.
        blocks: the transformer blocks, likewise.
    """

    def __init__(self, resnets: Sequence[ResnetBlock2D], blocks: Sequence[BasicTransformerBlock]) -> None:
        self._layers: list[tuple[Tensor, Sequence[nn.Module]]] = []
        self.qkv_weights = [self._join([block.attn1.to_q, block.attn1.to_k, block.attn1.to_v]) for block in blocks]
        """For each block; None where they are not joined."""
        self.groups = _groups(blocks)
        """Consecutive blocks, whose cross-attentions' keys and values are made together."""
        self._text_weights = [
            self._join([layer for block in group for layer in (block.attn2.to_k, block.attn2.to_v)])
            for group in self.groups
        ]
        self._shift_weight = cast(Tensor, self._join([block.time_emb_proj for block in resnets]))
        # The bias of the convolution that the shift is added to is a constant shift itself.
        biases = [block.time_emb_proj.bias.float() + block.conv1.bias.float() for block in resnets]
        self._shift_bias = torch.cat(biases).to(resnets[0].conv1.weight.dtype)
        self._shift_sizes = [block.conv1.out_channels for block in resnets]

    def are_current(self) -> bool:
        """Whether the layers still have these weights: they may have been moved, cast or replaced."""
        return all(
            _is_linear(layers) and _storage(layers[0].weight) == _storage(joined) for joined, layers in self._layers
        )

    def shifts(self, embedding: Float[Tensor, "b t"]) -> tuple[Float[Tensor, "b _"], ...]:
        """For each residual block its time embedding, and the bias of its first convolution."""
        shifts = F.linear(F.silu(embedding), self._shift_weight, self._shift_bias)
        return torch.split(shifts, self._shift_sizes, dim=1)

    def text_keys_and_values(self, context: Float[Tensor, "b l c"], group: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Text keys and values of each block of a group."""
        blocks, weights = self.groups[group], self._text_weights[group]
        layers = [layer for block in blocks for layer in (block.attn2.to_k, block.attn2.to_v)]
        if weights is None:
            parts = tuple(layer(context) for layer in layers)
        else:
            parts = torch.split(F.linear(context, weights), [layer.out_features for layer in layers], dim=2)
        return zip(parts[::2], parts[1::2], strict=True)

    @torch.no_grad()
    def _join(self, layers: list[nn.Module]) -> Tensor | None:
        if not _is_linear(layers):
            return None
        joined = torch.cat([layer.weight for layer in layers])
        for layer, part in zip(layers, torch.split(joined, [len(layer.weight) for layer in layers]), strict=True):
            layer.weight.data = part
        self._layers.append((joined, layers))
        return joined


def _groups(blocks: Sequence[BasicTransformerBlock]) -> list[Sequence[BasicTransformerBlock]]:
    """Four groups for 16 blocks, eight for 70, so that the last one to have its gradients holds few of them."""
    count = min(len(blocks), max(_MIN_GROUPS, min(_MAX_GROUPS, len(blocks) // _SITES_PER_GROUP)))
    ends = [round(i * len(blocks) / count) for i in range(count + 1)]
    return [blocks[start:end] for start, end in itertools.pairwise(ends)]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata  # also tells apart tensors without data, whose pointers are all zero


def _is_linear(layers: Sequence[nn.Module]) -> TypeGuard[Sequence[nn.Linear]]:
    return all(type(layer) is nn.Linear for layer in layers)
