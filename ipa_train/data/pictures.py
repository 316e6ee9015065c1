"""Batches of pictures, decoded as they are loaded."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from ipa_train.data.batch import Batch, Pictures
from ipa_train.data.buckets import Bucket
from ipa_train.data.decode import Decoder
from ipa_train.data.reader import ShardReader
from ipa_train.data.transfer import BatchMemory
from ipa_train.errors import ConfigError, did_you_mean
from ipa_train.runtime.seeding import Draws

_CROPS = ("center", "random")


class PictureLoader:
    """Decodes the pictures of a batch to the size of its bucket; random crop and flip are keyed by position.

    ``image_prompt_size`` is the image encoder's; None leaves its resizing to the device, which is right where the
    training pixels are the whole stored picture.
    """

    def __init__(
        self,
        reader: ShardReader,
        buckets: Sequence[Bucket],
        *,
        decoder: Decoder,
        image_prompt_size: int | None,
        crop: str = "center",
        flip_rate: float = 0.0,
        seed: int = 0,
    ) -> None:
        if crop not in _CROPS:
            raise ConfigError(f"data.crop={crop!r} is not a crop.{did_you_mean(crop, _CROPS)}")
        if image_prompt_size is not None and image_prompt_size < 1:
            raise ConfigError(f"data.image_prompt_size must be at least 1, got {image_prompt_size}.")
        check_flip_rate(flip_rate)
        self.reader, self.buckets, self.decoder = reader, list(buckets), decoder
        self.image_prompt_size, self.crop, self.flip_rate, self.seed = image_prompt_size, crop, flip_rate, seed

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
        sides = (count, 2), np.int64
        # Rows of pixels as decoders write them: no sample is transposed, and convolutions like this order.
        pictures = [((count, *size, 3), np.uint8)]
        if loader.image_prompt_size is not None:
            pictures.append(((count, loader.image_prompt_size, loader.image_prompt_size, 3), np.uint8))
        self._memory = BatchMemory(((count,), np.int64), sides, sides, sides, *pictures)
        own_positions, self._original_sizes, self._crop_top_lefts, target_sizes, self._pixels, *self._prompts = (
            self._memory.arrays
        )
        own_positions[:] = positions
        target_sizes[:] = size
        self.crops = None
        if loader.crop == "random":
            self.crops = Draws(loader.seed, positions).uniform("crop", (2,)).tolist()

    def load(self, i: int, shard: int, row: int) -> tuple[str, str]:
        """Read and decode a sample into place ``i``; return (caption, key). Raises DataError if it is bad."""
        data, caption, key = self.loader.reader.read(shard, row)
        self.fill(i, data)
        return caption, key

    def fill(self, i: int, data: bytes) -> None:
        """Decode a stored picture into place ``i``. Raises DataError if it is bad."""
        placement = self.loader.decoder(
            data,
            pixels=self._pixels[i],
            image_prompt=self._prompts[0][i] if self._prompts else None,
            crop_at=None if self.crops is None else tuple(self.crops[i]),
            flip=self.flips[i],
        )
        self._original_sizes[i] = placement.original_size
        self._crop_top_lefts[i] = placement.crop_top_left

    def finish(self, captions: list[str], keys: list[str]) -> Batch:
        """The batch of the places filled so far: all of them, or the first ones."""
        filled = [rows[: len(captions)] for rows in self._memory.hand_over()]
        positions, original_sizes, crop_top_lefts, target_sizes, *pictures = filled
        pixels, *prompts = (rows.permute(0, 3, 1, 2) for rows in pictures)
        return Batch(
            content=Pictures(pixels=pixels, separate_prompts=prompts[0] if prompts else None),
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
