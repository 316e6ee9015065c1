"""Batches of pictures, decoded as they are loaded."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ipa_train.data.batch import Batch, Pictures
from ipa_train.data.buckets import Bucket
from ipa_train.data.decode import Decoder
from ipa_train.data.reader import ShardReader
from ipa_train.data.transfer import empty_for_transfer
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
        return PictureBatch(self, self.buckets[bucket], positions)

    def shard(self, group: int, bucket: int) -> int:
        """Pictures of all buckets lie together in one shard."""
        return group


class PictureBatch:
    """A batch of pictures in the making."""

    def __init__(self, loader: PictureLoader, size: Bucket, positions: Tensor) -> None:
        self.loader, self.positions = loader, positions
        count, prompt_size = len(positions), loader.image_prompt_size
        # Rows of pixels as decoders write them: no sample is transposed, and convolutions like this order.
        self.pixels = empty_for_transfer((count, *size, 3), torch.uint8)
        self.prompts = None
        if prompt_size is not None:
            self.prompts = empty_for_transfer((count, prompt_size, prompt_size, 3), torch.uint8)
        self.original_sizes = torch.empty(count, 2, dtype=torch.int64)
        self.crop_top_lefts = torch.empty(count, 2, dtype=torch.int64)
        self.flips, self.crops = draw_flips(loader.seed, positions, loader.flip_rate), None
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
            pixels=self.pixels[i].numpy(),
            image_prompt=None if self.prompts is None else self.prompts[i].numpy(),
            crop_at=None if self.crops is None else tuple(self.crops[i]),
            flip=self.flips[i],
        )
        self.original_sizes[i] = torch.tensor(placement.original_size)
        self.crop_top_lefts[i] = torch.tensor(placement.crop_top_left)

    def finish(self, captions: list[str], keys: list[str]) -> Batch:
        """The batch, when every place is filled."""
        prompts = None if self.prompts is None else self.prompts.permute(0, 3, 1, 2)
        return Batch(
            content=Pictures(pixels=self.pixels.permute(0, 3, 1, 2), separate_prompts=prompts),
            captions=captions,
            positions=self.positions,
            original_sizes=self.original_sizes,
            crop_top_lefts=self.crop_top_lefts,
            target_sizes=torch.tensor(self.pixels.shape[1:3]).expand(len(captions), 2),
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
