"""Random draws as pure functions of (seed, position, purpose): Philox4x32-10 in torch integer arithmetic.

A sample's noise, timestep and dropped conditions depend on its place in the data stream and on nothing else, so a run
replays exactly after a resume, and on any number of ranks, workers and micro-batches. The generator is the
counter-based one of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), checked against its
published test vectors.
"""

import math
import zlib
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float32, Int64
from numpy import ndarray
from torch import Tensor

from ipa_train.runtime.device import send

Words = TypeVar("Words", Tensor, ndarray)
_HOST = torch.device("cpu")

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox(c0: Words, c1: Words, c2: Words, c3: Words, key: tuple[int, int]) -> tuple[Words, Words, Words, Words]:
    """Return four int64 tensors of uniform 32-bit words for four broadcastable int64 counters of 32 bits each.

    Tensors or arrays: the same numbers on any device.
    """
    k0, k1 = key
    for _ in range(10):
        # The 64-bit products may wrap to negative numbers: masking after the shift recovers the upper word. Lower
        # words are read through a mask only, so that theirs can wait.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = ((p1 >> 32) ^ c1 ^ k0) & _MASK, p1, ((p0 >> 32) ^ c3 ^ k1) & _MASK, p0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1 & _MASK, c2, c3 & _MASK


@dataclass(frozen=True)
class Draws:
    """The random numbers of one batch: ``draws.normal("noise", latents.shape[1:])`` and the like.

    ``purpose`` names the use, so that no two uses share a number; rows follow ``positions``, which lie on the host.
    Uniform numbers are few and drawn on the host, where most of them decide something; normal ones on ``device``.
    """

    seed: int
    positions: Int64[Tensor, "b"]
    device: torch.device = _HOST

    def uniform(self, purpose: str, shape: tuple[int, ...] = ()) -> Float32[Tensor, "b *shape"]:
        """Uniform in [0, 1), shape (b, *shape), float32 with 24 random bits."""
        count = math.prod(shape)
        # In NumPy, whose calls cost a third of torch's: with so few numbers that is all there is to pay.
        words = np.stack(self._words(purpose, self.positions.numpy(), np.arange(-(-count // 4))), axis=-1)
        numbers = (words >> 8).astype(np.float32) * np.float32(2.0**-24)
        return torch.from_numpy(numbers.reshape(len(numbers), -1)[:, :count].reshape(-1, *shape))

    def normal(self, purpose: str, shape: tuple[int, ...]) -> Float32[Tensor, "b *shape"]:
        """Standard normal, shape (b, *shape), float32 (Box-Muller)."""
        count = math.prod(shape)
        index = torch.arange(-(-count // 4), device=self.device)
        words = self._words(purpose, send(self.positions, self.device), index)
        a, b, c, d = ((w >> 8).float() for w in words)
        pairs = []
        for u, v in ((a, b), (c, d)):
            radius = torch.sqrt(-2.0 * torch.log((u + 1.0) * 2.0**-24))
            angle = v * (2.0 * math.pi * 2.0**-24)
            pairs += [radius * torch.cos(angle), radius * torch.sin(angle)]
        return torch.stack(pairs, dim=-1).flatten(1)[:, :count].reshape(-1, *shape)

    def integers(self, purpose: str, high: int) -> Int64[Tensor, "b"]:
        """Uniform in 0..high-1, one per sample; ``high`` at most 2**24."""
        return (self.uniform(purpose).double() * high).long()

    def _words(self, purpose: str, positions: Words, index: Words) -> tuple[Words, Words, Words, Words]:
        p = positions[:, None]
        stream = p * 0 + zlib.crc32(purpose.encode())
        key = self.seed & _MASK, (self.seed >> 32) & _MASK
        return philox(index[None], p & _MASK, (p >> 32) & _MASK, stream, key)
