"""Made-up samples that cost what real ones cost: pictures of 1/f noise, captions, and cached features."""

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save
from torch import Tensor

from data_tools.shard_writer import open_shard
from ipa_train.data.cache import CacheDescription, shard_name

WORDS = ("a", "the", "of", "on", "with", "red", "small", "photo", "painting", "street", "river", "house", "dog", "sky")
LATENTS, EMBEDDING = (4, 64, 64), 1024
SQUARE = (512, 512)


class FeatureSample(NamedTuple):
    """What the frozen encoders of SD 1.5 make of a picture of 512 x 512 pixels: 35 kB."""

    key: str
    tensors: dict[str, Tensor]
    caption: str
    """Begins with the sample's number."""


def draw_caption(rng: np.random.Generator, *, num_words: int = 12) -> str:
    """About as long as LAION's."""
    return " ".join(rng.choice(WORDS, num_words))


def draw_picture(rng: np.random.Generator, height: int, width: int) -> Image.Image:
    """1/f noise, the spectrum of natural pictures: its JPEG is as large, and as slow to decode, as a photograph's."""
    rows, columns = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    amplitudes = 1 / np.maximum(np.hypot(rows, columns), 1 / max(height, width))
    phases = np.exp(2j * np.pi * rng.random((3, *amplitudes.shape)))
    red, *others = np.fft.irfft2(amplitudes * phases, (height, width))
    # The channels of a photograph go together: each is mostly the first.
    noise = np.stack([red, *(0.8 * red + 0.2 * other for other in others)], axis=-1)
    return Image.fromarray((128 + 28 * noise / red.std()).clip(0, 255).astype(np.uint8))


def jpeg(image: Image.Image) -> bytes:
    """2.6 bits per pixel."""
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=85)
    return buffer.getvalue()


def draw_features(number: int) -> FeatureSample:
    """The sample of that number; always the same."""
    rng = np.random.default_rng(number)
    tensors = {
        "latents_mean": torch.from_numpy(rng.standard_normal(LATENTS, np.float32).astype(np.float16)),
        "image_features": torch.from_numpy(rng.standard_normal(EMBEDDING, np.float32).astype(np.float16)),
        "crop_top_left": torch.tensor([0, int(rng.integers(200))]),
        "original_size": torch.tensor([512, 512 + int(rng.integers(400))]),
    }
    return FeatureSample(f"{number:09d}", tensors, f"{number} {draw_caption(rng)}")


def write_pictures(folder: Path, pictures: Sequence[tuple[str, bytes, str]], *, num_shards: int) -> None:
    """Shards of (key, JPEG, caption)."""
    folder.mkdir(parents=True)
    for shard in range(num_shards):
        with open_shard(folder / f"{shard:05d}.tar") as writer:
            for key, data, caption in pictures[shard::num_shards]:
                writer.write(key, {"jpg": data, "txt": caption.encode()})


def write_features(folder: Path, samples: Iterator[FeatureSample], *, num_shards: int, shard_size: int) -> None:
    """A feature cache, as ``ipa data encode`` leaves it."""
    folder.mkdir(parents=True)
    groups = [f"{shard:05d}" for shard in range(num_shards)]
    for group in groups:
        with open_shard(folder / shard_name(group, SQUARE)) as writer:
            for _, sample in zip(range(shard_size), samples, strict=False):
                writer.write(sample.key, {"safetensors": save(sample.tensors), "txt": sample.caption.encode()})
        (folder / f"{group}.json").write_text("{}")
    CacheDescription(
        encoders={},
        precision={},
        resolution=SQUARE[0],
        buckets=[list(SQUARE)],
        bucket_step=None,
        max_aspect_ratio=2.0,
        flipped=False,
        latents_std=False,
        source="synthetic",
        groups=groups,
    ).write(folder)
