"""Batches of pictures, decoded as they are loaded."""

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from ipa_train.data.batch import Batch, Pictures
from ipa_train.data.buckets import Bucket
from ipa_train.data.decode import Decoder
from ipa_train.data.embedding import read_embedding
from ipa_train.data.image_prompts import ImagePrompts
from ipa_train.data.reader import ShardReader
from ipa_train.data.scan import Extra
from ipa_train.data.transfer import BatchMemory
from ipa_train.errors import ConfigError, did_you_mean
from ipa_train.runtime.seeding import Draws

_CROPS = ("center", "random")


class PictureLoader:
    """Decodes the pictures of a batch to the size of its bucket; all that is random is keyed by position."""

    def __init__(
        self,
        reader: ShardReader,
        buckets: Sequence[Bucket],
        *,
        decoder: Decoder,
        image_prompts: ImagePrompts,
        crop: str = "center",
        flip_rate: float = 0.0,
        seed: int = 0,
    ) -> None:
        if crop not in _CROPS:
            raise ConfigError(f"data.crop={crop!r} is not a crop.{did_you_mean(crop, _CROPS)}")
        check_flip_rate(flip_rate)
        self.reader, self.buckets, self.decoder = reader, list(buckets), decoder
        self.image_prompts, self.crop, self.flip_rate, self.seed = image_prompts, crop, flip_rate, seed

    def begin(self, bucket: int, positions: Tensor) -> "PictureBatch":
        """Make room for the samples of these positions."""
        return PictureBatch(self, self.buckets[bucket], positions, draw_flips(self.seed, positions, self.flip_rate))

    def shard(self, group: int, bucket: int) -> int:
        """Pictures of all buckets lie together in one shard."""
        return group


class PictureBatch:
    """A batch of pictures in the making."""

    def __init__(self, loader: PictureLoader, size: Bucket, positions: Tensor, flips: Sequence[bool]) -> None:
        self.loader, self.flips, count = loader, flips, len(positions)
        prompts = loader.image_prompts
        sides = (count, 2), np.int64
        # Rows of pixels as decoders write them: no sample is transposed, and convolutions like this order.
        pixels, prompt_pixels = (
            ((count, *shape, 3), np.uint8) for shape in (size, (prompts.size or 0, prompts.size or 0))
        )
        embeddings = (count, *(prompts.embedding_shape or (0,))), np.float32
        self._memory = BatchMemory(((count,), np.int64), sides, sides, sides, pixels, prompt_pixels, embeddings)
        own_positions, self._original_sizes, self._crop_top_lefts, target_sizes, *content = self._memory.arrays
        self._pixels, self._prompts, self._embeddings = content
        own_positions[:] = positions
        target_sizes[:] = size
        draws = Draws(loader.seed, positions)
        self.crops = draws.uniform("crop", (2,)).tolist() if loader.crop == "random" else None
        self.changes = prompts.augment.draw(draws)

    def load(self, i: int, shard: int, row: int) -> tuple[str, str]:
        """Read and decode a sample into place ``i``; return (caption, key). Raises DataError if it is bad."""
        sample = self.loader.reader.read(shard, row)
        self.fill(i, sample.content, sample.extras)
        return sample.caption, sample.key

    def fill(self, i: int, data: bytes, extras: Mapping[Extra, bytes]) -> None:
        """Decode a stored picture, and what is stored besides, into place ``i``. Raises DataError if any is bad."""
        prompts, flip = self.loader.image_prompts, self.flips[i]
        crop_at = None if self.crops is None else tuple(self.crops[i])
        placement, picture = self.loader.decoder(data, pixels=self._pixels[i], crop_at=crop_at, flip=flip)
        if prompts.size is not None:
            change = None if self.changes is None else self.changes[i]
            prompts.fill(self._prompts[i], picture, extras, flip=flip, change=change)
        if prompts.embedding_shape is not None:
            self._embeddings[i] = read_embedding(extras["embedding"], prompts.embedding_shape)
        self._original_sizes[i] = placement.original_size
        self._crop_top_lefts[i] = placement.crop_top_left

    def finish(self, captions: list[str], keys: list[str]) -> Batch:
        """The batch of the places filled so far: all of them, or the first ones."""
        filled = [rows[: len(captions)] for rows in self._memory.hand_over()]
        positions, original_sizes, crop_top_lefts, target_sizes, pixels, prompt_pixels, embeddings = filled
        prompts = self.loader.image_prompts
        return Batch(
            content=Pictures(
                pixels=pixels.permute(0, 3, 1, 2),
                separate_prompts=None if prompts.size is None else prompt_pixels.permute(0, 3, 1, 2),
                embeddings=None if prompts.embedding_shape is None else embeddings,
            ),
            captions=captions,
            positions=positions,
            original_sizes=original_sizes,
            crop_top_lefts=crop_top_lefts,
            target_sizes=target_sizes,
            keys=keys,
        )


def check_flip_rate(flip_rate: float) -> None:
    """Raise ConfigError unless it is a rate."""
    if not 0.0 <= flip_rate <= 1.0:
        raise ConfigError(f"data.flip_rate must be between 0 and 1, got {flip_rate}.")


def draw_flips(seed: int, positions: Tensor, flip_rate: float) -> list[bool]:
    """Which samples are mirrored; the same whether they come as pictures or as features."""
    if not flip_rate:
        return [False] * len(positions)
    return (Draws(seed, positions).uniform("flip") < flip_rate).tolist()
